"""What a file of another kind leaves out of a model, and the warnings about it."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.families.model import Model
from moeconv.families.spec import BESIDE
from moeconv.quantize.spec import Format
from moeconv.units import counted


def left_out_of(model: Model, format: Format) -> dict[str, None]:
    """The tensors that a GGUF file leaves out: those of multi-token prediction, since llama.cpp predicts one token, and
    those of images and audio, which llama.cpp reads from a file of their own."""
    if format.shard is None:
        return {}
    ahead = model.prediction_layers
    return {name: None for name, role in model.roles.items() if role.layer in ahead or role.group in BESIDE}


def why_left_out(model: Model, left_out: Mapping[str, None]) -> list[str]:
    """A warning for each kind of tensors that are left out."""
    beside = sum(model.roles[name].group in BESIDE for name in left_out)
    found = []
    if len(left_out) > beside:
        found.append(
            f"the multi-token-prediction layers {list(model.prediction_layers)} "
            f"({counted(len(left_out) - beside, 'tensor')}) are left out, since llama.cpp does not run them"
        )
    if beside:
        found.append(
            f"the file has the language model alone: {counted(beside, 'tensor')} of images or audio are left out, "
            "which llama.cpp reads from a file of their own (mmproj, by its converter)"
        )
    return found
