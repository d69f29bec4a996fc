"""Proof after writing: decode a sample of every layer's packed experts and compare it with the source's weights.

Imports torch, and only when called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.errors import CheckError, escape
from moeconv.families.model import Model
from moeconv.families.spec import FFN_PARTS

# Relative RMS error above which packed weights cannot be what the scheme makes of any sane matrix.
_LIMIT = {"int4": 0.35, "nf4": 0.3, "fp4": 0.4, "int8": 0.05}


def packing_error(source: Model, packed: Model, *, schemes: Mapping[str, str]) -> dict[str, Any]:
    """{relative_rms: {mean, max}, layers: [{layer, relative_rms}], sampled}: the weights' error over gate, up and down
    of two experts in every layer. `schemes` is a scheme by layer.

    Raises CheckError when a decoded weight is further from its source than the scheme can be.
    """
    from moeconv.plan.kernels.pack import relative_rms
    from moeconv.tensors import decode_weight, read_tensor

    errors: list[float] = []
    rows = []
    for layer in source.moe_layers:
        scheme, found = schemes[str(layer)], []
        for expert in sorted({0, source.num_experts - 1}):
            for part in FFN_PARTS:
                name = source.expert_name(part, layer=layer, expert=expert)
                weight = read_tensor(source.checkpoint, name).float()
                error = relative_rms(weight, decode_weight(packed, name, weight.dtype))
                if not error <= _LIMIT[scheme]:
                    raise CheckError(
                        f"{escape(name)} decodes with a relative error of {error:.3f}, too much for {scheme}",
                        hint="Are there extreme outliers in the weights? Try a smaller --group-size or int8.",
                    )
                found.append(error)
        rows.append({"layer": layer, "relative_rms": sum(found) / len(found)})
        errors += found
    return {
        "relative_rms": {"mean": sum(errors) / len(errors), "max": max(errors)},
        "layers": rows,
        "sampled": len(errors),
    }
