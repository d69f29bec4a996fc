"""What can be said of a checkpoint of an architecture that no step takes: all that its headers and config.json say."""

from __future__ import annotations

from typing import Any

from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import Unsupported
from moeconv.families import packed


def inspect_unknown(checkpoint: Checkpoint, why: Unsupported) -> dict[str, Any]:
    """The JSON object of `moeconv inspect`; what only a row of the families could say is null."""
    config, refs = checkpoint.config, checkpoint.tensors
    dtypes: dict[str, int] = {}
    for ref in refs.values():
        dtypes[ref.dtype] = dtypes.get(ref.dtype, 0) + ref.nbytes
    bits = packed.bits_of(config)
    value = packed.quantization(config)
    parts = {name: packed.split_part(name) if value else None for name in refs}
    total = sum(packed.elements(ref, (parts[name] or ("", ""))[1], bits=bits) for name, ref in refs.items())
    names = config.get("architectures")
    layers = config.get("num_hidden_layers")
    return {
        "path": str(checkpoint.path),
        "model_type": config.get("model_type") if isinstance(config.get("model_type"), str) else None,
        "kind": None,
        "architecture": names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None,
        "layers": layers if type(layers) is int else None,
        "moe_layers": None,
        "mtp_layers": None,
        "num_experts": None,
        "top_k": None,
        "shared_experts": None,
        "parameters": {"total": total, "active": None, "experts": None, "router": None, "prediction": None},
        "parameters_by_role": {},
        "bytes_by_role": {},
        "bytes": checkpoint.nbytes,
        "dtypes": dict(sorted(dtypes.items())),
        "flops_per_token": None,
        "quantization": None if value is None else
        {"format": value.get("quant_method"), "bits": bits, "scheme": None, "roles": []},
        "tensors": len(refs),
        "shards": len(checkpoint.shards),
        "identity": checkpoint.identity(),
        "warnings": [*checkpoint.warnings, said(why)],
    }  # fmt: skip


def said(why: Unsupported) -> str:
    """The warning of a command that answers for such a checkpoint all the same."""
    return f"no step takes this checkpoint: {why.message}"
