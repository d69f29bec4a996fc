"""What can be said of a checkpoint that no step takes, for its architecture or its quantization: all that its headers
and config.json say."""

from __future__ import annotations

from typing import Any

from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import InputError, Unsupported, escape
from moeconv.families import packed
from moeconv.families.find import find_family
from moeconv.families.foreign import bits_of, recognise
from moeconv.families.methods import quantization_method
from moeconv.families.model import Model


def inspect_unknown(checkpoint: Checkpoint, why: Unsupported) -> dict[str, Any]:
    """The JSON object of `moeconv inspect`; what only a row of the families could say is null."""
    config, refs = checkpoint.config, checkpoint.tensors
    dtypes: dict[str, int] = {}
    for ref in refs.values():
        dtypes[ref.dtype] = dtypes.get(ref.dtype, 0) + ref.nbytes
    names, layers = config.get("architectures"), config.get("num_hidden_layers")
    found: dict[str, Any] = {
        "path": str(checkpoint.path),
        "model_type": escape(config["model_type"]) if isinstance(config.get("model_type"), str) else None,
        "kind": None,
        "architecture": escape(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else None,
        "layers": layers if type(layers) is int else None,
        "moe_layers": None,
        "mtp_layers": None,
        "num_experts": None,
        "top_k": None,
        "shared_experts": None,
        "parameters": {"total": _total(checkpoint), **dict.fromkeys(("active", "experts", "router", "prediction"))},
        "parameters_by_role": {},
        "bytes_by_role": {},
        "bytes": checkpoint.nbytes,
        "dtypes": dict(sorted(dtypes.items())),
        "flops_per_token": None,
        "quantization": _quantization(checkpoint),
        "tensors": len(refs),
        "shards": len(checkpoint.shards),
        "identity": checkpoint.identity(),
        "warnings": [*checkpoint.warnings, said(why)],
    }
    return found | _of_family(checkpoint)


def _of_family(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json says of a family that is known, where only the weights are not read."""
    try:
        model = Model(checkpoint, find_family(checkpoint.config), {}, ())
        return {
            "kind": model.family.kind,
            "architecture": model.family.architecture,
            "layers": model.num_layers,
            "moe_layers": list(model.moe_layers),
            "num_experts": model.num_experts,
            "top_k": model.top_k,
        }
    except InputError:
        return {}


def _total(checkpoint: Checkpoint) -> int | None:
    """Parameters of the model; None where the headers do not tell, as of codes that are not read."""
    if recognise(checkpoint.config, checkpoint.tensors) is not None:
        return None
    bits, value = packed.bits_of(checkpoint.config), packed.quantization(checkpoint.config)
    parts = {name: packed.split_part(name) if value else None for name in checkpoint.tensors}
    return sum(
        packed.elements(ref, (parts[name] or ("", ""))[1], bits=bits) for name, ref in checkpoint.tensors.items()
    )


def _quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How a checkpoint is quantized, by config.json or by its names."""
    foreign = recognise(checkpoint.config, checkpoint.tensors)
    value = packed.quantization(checkpoint.config)
    if foreign is not None:
        way, settings = foreign
        word, bits, scheme = settings.get("quant_method") or way.name, bits_of(way, settings), None
    elif value is not None:
        word, bits, scheme = quantization_method(value), packed.bits_of(checkpoint.config), value.get("format")
    else:
        return None
    return {"format": escape(word), "bits": bits, "scheme": None if scheme is None else escape(scheme), "roles": []}


def said(why: Unsupported) -> str:
    """The warning of a command that answers for such a checkpoint all the same."""
    return f"no step takes this checkpoint: {why.message}"
