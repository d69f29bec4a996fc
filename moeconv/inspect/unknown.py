"""Describes a checkpoint whose architecture or quantization is not supported, from its headers and config.json."""

from __future__ import annotations

from moeconv.checkpoint.reader import Checkpoint
from moeconv.contract import Inspected, Quantization
from moeconv.errors import InputError, Unsupported, escape
from moeconv.families import packed
from moeconv.families.find import find_family
from moeconv.families.foreign import bits_of, recognise
from moeconv.families.methods import quantization_method
from moeconv.families.model import Model


def inspect_unknown(checkpoint: Checkpoint, why: Unsupported) -> Inspected:
    """The JSON object of `moeconv inspect`; fields that need a known family are null. `why` is the reason for which no
    step accepts the checkpoint."""
    config, refs = checkpoint.config, checkpoint.tensors
    dtypes: dict[str, int] = {}
    for ref in refs.values():
        dtypes[ref.dtype] = dtypes.get(ref.dtype, 0) + ref.nbytes
    names, layers = config.get("architectures"), config.get("num_hidden_layers")
    found: Inspected = {
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
        "parameters": {
            "total": _total(checkpoint), "active": None, "experts": None, "router": None, "prediction": None,
        },
        "parameters_by_role": {},
        "bytes_by_role": {},
        "bytes": checkpoint.nbytes,
        "dtypes": dict(sorted(dtypes.items())),
        "flops_per_token": None,
        "quantization": _quantization(checkpoint),
        "tensors": len(refs),
        "shards": len(checkpoint.shards),
        "identity": checkpoint.identity(),
        "warnings": [*checkpoint.warnings, unsupported_warning(why)],
    }  # fmt: skip
    _add_family(found, checkpoint)
    return found


def _add_family(found: Inspected, checkpoint: Checkpoint) -> None:
    """Fill in what config.json states where the family is known and only its weights cannot be read."""
    try:
        model = Model(checkpoint, find_family(checkpoint.config), {}, ())
        kind, architecture, layers = model.family.kind, model.family.architecture, model.num_layers
        moe_layers, num_experts, top_k = list(model.moe_layers), model.num_experts, model.top_k
    except InputError:
        return
    found["kind"], found["architecture"], found["layers"] = kind, architecture, layers
    found["moe_layers"], found["num_experts"], found["top_k"] = moe_layers, num_experts, top_k


def _total(checkpoint: Checkpoint) -> int | None:
    """Parameters of the model; None where the headers do not show them, as for codes of an unknown layout."""
    if recognise(checkpoint.config, checkpoint.tensors) is not None:
        return None
    bits, value = packed.bits_of(checkpoint.config), packed.quantization(checkpoint.config)
    parts = {name: packed.split_part(name) if value else None for name in checkpoint.tensors}
    return sum(
        packed.elements(ref, (parts[name] or ("", ""))[1], bits=bits) for name, ref in checkpoint.tensors.items()
    )


def _quantization(checkpoint: Checkpoint) -> Quantization | None:
    """How a checkpoint is quantized, according to config.json or to the names of its tensors."""
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


def unsupported_warning(why: Unsupported) -> str:
    """The warning of a command that describes or checks an unsupported checkpoint nevertheless."""
    return f"no step accepts this checkpoint: {why.message}"
