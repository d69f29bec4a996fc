"""The weights that serving engines join to one matrix, for formats in which such a matrix has one scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.model import Model

# keys of weights that vLLM and SGLang join: gate and up of an expert or a feed-forward block, queries, keys and values,
# and the first projections of multi-head latent attention
_JOINED = (
    *((f"{group}.gate", f"{group}.up") for group in ("expert", "shared", "ffn")),
    ("attention.q", "attention.k", "attention.v"),
    ("attention.q_a", "attention.kv_a"),
)
_SET_OF = {key: keys for keys in _JOINED for key in keys}


def joined(model: Model, weights: Iterable[TensorRef]) -> Mapping[str, list[TensorRef]]:
    """The weights, out of `weights`, that an engine joins with a weight: its name -> the others, in the order of the
    matrix; no entry for a weight that stays alone."""
    sets: dict[tuple[int | None, int | None, tuple[str, ...]], dict[str, TensorRef]] = {}
    for ref in weights:
        role = model.roles[ref.name]
        if keys := _SET_OF.get(role.key):
            sets.setdefault((role.layer, role.expert, keys), {})[role.key] = ref
    return {
        ref.name: others
        for (_, _, keys), of in sets.items()
        for key, ref in of.items()
        if (others := [of[other] for other in keys if other != key and other in of])
    }
