"""The words of --train, and the tensors of a checkpoint that each of them makes trainable. Imports no torch."""

from __future__ import annotations

from moeconv.errors import UsageError, did_you_mean, escape
from moeconv.families.model import Model
from moeconv.families.spec import Role

WORDS = ("router", "experts", "shared", "ffn", "norms")
BIAS = "bias"  # the correction bias, which --bias-update changes; it is not a word of --train
_CORRECTIONS = ("router.correction", "router.correction_row")


def parse_train(text: str) -> tuple[str, ...]:
    """The words of a value such as `router,experts`, in the order of WORDS. Raises UsageError for an unknown word."""
    words = {w.strip() for w in text.split(",")}
    for word in words:
        if word not in WORDS:
            raise UsageError(f"--train {escape(text)}: unknown word {escape(word)!r}", hint=did_you_mean(word, WORDS))
    return tuple(w for w in WORDS if w in words)


def word_of(role: Role) -> str | None:
    """The word that makes a tensor trainable; None for a tensor that never changes."""
    if role.key in _CORRECTIONS:
        return BIAS
    if role.group == "router" and role.key != "router.weight":
        return None
    return {"router": "router", "expert": "experts", "shared": "shared", "ffn": "ffn", "norm": "norms"}.get(role.group)


def correction_names(model: Model) -> dict[int, str]:
    """{layer: name on disk of its correction bias}; empty for a family or checkpoint without such biases."""
    found = {role.layer: name for name, role in model.roles.items() if role.key in _CORRECTIONS}
    return {layer: name for layer, name in found.items() if layer is not None and name in model.checkpoint.tensors}


def tensors_of(model: Model, train: tuple[str, ...]) -> list[str]:
    """The names on disk of all tensors that train, in the order of the checkpoint."""
    return [name for name in model.checkpoint.tensors if name in model.roles and word_of(model.roles[name]) in train]
