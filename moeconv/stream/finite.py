"""Where NaN and infinity come from: the first layer whose output holds them, and the first tensor of it that does."""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.tensors import decode_weight, plain_names

HINT = "Repair or replace the checkpoint: download it again, or take the one that it was made from."
_WIDER = "Pass --dtype float32 where the command has it, or take a checkpoint whose activations fit."


class NotFiniteError(InputError):
    """A model computes NaN or infinite values; the message names the layer and the tensor. `overflows` where all
    tensors are finite."""

    overflows = False


def check_finite(model: Model, values: Tensor, *, layer: int | None) -> None:
    """Raises NotFiniteError for what a layer makes of finite inputs (None: the embeddings), where it is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise not_finite(model, layer, dtype=values.dtype)


def not_finite(model: Model, layer: int | None, *, dtype: torch.dtype) -> NotFiniteError:
    """The error for a layer that makes NaN or infinity (None: what is in front of the layers and behind them)."""
    what = "the embeddings and the output head compute" if layer is None else f"layer {layer} computes"
    bad = first_bad_tensor(model, layer)
    path = escape(model.checkpoint.path.name)
    if bad is None:
        return _overflow(
            f"{what} NaN or infinite values in {path} from finite weights: they overflow in {_word(dtype)}"
        )
    return NotFiniteError(f"{what} NaN or infinite values: tensor {escape(bad)!r} of {path} holds them", hint=HINT)


def first_bad_tensor(model: Model, layer: int | None) -> str | None:
    """The first tensor of a layer, decoded where it is packed, that is not finite throughout."""
    for name, at in plain_names(model):
        if at == layer and not bool(torch.isfinite(decode_weight(model, name)).all()):
            return name
    return None


def scanned(model: Model, *, dtype: torch.dtype) -> NotFiniteError:
    """The error for a model run as a whole with a loss that is not finite: its first bad tensor in order of layers."""
    for layer in (*range(model.num_layers), None):
        if first_bad_tensor(model, layer) is not None:
            return not_finite(model, layer, dtype=dtype)
    path = escape(model.checkpoint.path.name)
    return _overflow(
        f"the loss of {path} is NaN or infinite, and its weights are finite: they overflow in {_word(dtype)}"
    )


def _overflow(text: str) -> NotFiniteError:
    error = NotFiniteError(text, hint=_WIDER)
    error.overflows = True
    return error


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
