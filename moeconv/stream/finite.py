"""Finds the origin of NaN and infinity: the first layer whose output has such values, and its first such tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.tensors import all_finite, decode_weight, plain_names

HINT = "The checkpoint is damaged. Download it again, or use the checkpoint that it was made from."
_WIDER = "Pass --dtype float32 if the command has this option, or use a checkpoint whose activations fit the dtype."


class NotFiniteError(InputError):
    """A model computes NaN or infinite values; the message names the layer and the tensor. `overflows` is True if all
    tensors are finite, so that the values overflow the dtype of the computation."""

    overflows = False


def check_finite(model: Model, values: Tensor, *, layer: int | None) -> None:
    """Raises NotFiniteError if `values`, the output of a layer (None: of the embeddings), are not all finite."""
    if not all_finite(values):
        raise not_finite(model, layer, dtype=values.dtype)


def not_finite(model: Model, layer: int | None, *, dtype: torch.dtype) -> NotFiniteError:
    """The error for a layer that computes NaN or infinity (None: for the embeddings, final norm and output head)."""
    what = "the embeddings and the output head compute" if layer is None else f"layer {layer} computes"
    bad = first_bad_tensor(model, layer)
    path = escape(model.checkpoint.path.name)
    if bad is None:
        return _overflow(
            f"{what} NaN or infinite values in {path}, although its weights are finite: the values overflow in "
            f"{_name(dtype)}"
        )
    return NotFiniteError(f"{what} NaN or infinite values: tensor {escape(bad)!r} of {path} contains them", hint=HINT)


def first_bad_tensor(model: Model, layer: int | None) -> str | None:
    """The first tensor of a layer that is not finite throughout; packed tensors are decoded first. None if all are."""
    for name, at in plain_names(model):
        if at == layer and not all_finite(decode_weight(model, name)):
            return name
    return None


def scanned(model: Model, *, dtype: torch.dtype) -> NotFiniteError:
    """The error for a model that was run as a whole and whose loss is not finite. It names the first tensor, in the
    order of the layers, that is not finite."""
    for layer in (*range(model.num_layers), None):
        if first_bad_tensor(model, layer) is not None:
            return not_finite(model, layer, dtype=dtype)
    path = escape(model.checkpoint.path.name)
    return _overflow(
        f"the loss of {path} is NaN or infinite, although its weights are finite: the values overflow in {_name(dtype)}"
    )


def _overflow(text: str) -> NotFiniteError:
    error = NotFiniteError(text, hint=_WIDER)
    error.overflows = True
    return error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
