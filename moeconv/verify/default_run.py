"""Runs a checkpoint as its users do: in the dtype of its weights, with the default kernels of transformers.

The comparison with the source runs in float64 with a plain loop over the experts. That loop accepts shapes which the
default kernels refuse, so it does not show whether the model runs for its users.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import InputError, escape
from moeconv.families.model import Model, open_model
from moeconv.families.widths import why_not
from moeconv.plan.kernels.stored import TORCH_DTYPES
from moeconv.stream.layers import LayerStream
from moeconv.stream.silence import transformers_silenced
from moeconv.tensors import all_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 16


def streamed_problem(model: Model) -> str | None:
    """What keeps the model from running, in one sentence; None if it runs and all logits are finite. The model runs one
    layer at a time, in its own dtype and with the default implementation."""
    ids = torch.tensor([_ids(model)])
    try:
        stream = LayerStream(model, ids, dtype=TORCH_DTYPES[model.dtype], experts=model.family.experts.implementation)
        for layer in stream.layers():
            for batch in layer.batches():
                if not all_finite(batch.outputs):
                    return f"layer {layer.index} gives NaN or infinite values in {model.dtype}"
        finite = all(all_finite(part) for _, part in stream.logits())
        return None if finite else f"the logits are NaN or infinite in {model.dtype}"
    except Exception as error:  # whatever a kernel raises is the finding
        return _problem(model, error)


def loaded_problem(checkpoint: Checkpoint, module: PreTrainedModel) -> str | None:
    """What keeps the model that from_pretrained returned from running; None if it runs and all logits are finite."""
    try:
        model = open_model(checkpoint)
    except InputError as error:
        return error.message
    try:
        with transformers_silenced(), torch.no_grad():
            logits = module.eval()(torch.tensor([_ids(model)]), use_cache=False).logits
        return None if all_finite(logits) else "the logits are NaN or infinite"
    except Exception as error:
        return _problem(model, error)


def _ids(model: Model) -> list[int]:
    """Token ids that stand for text: the first ones of the vocabulary to which config.json gives no special meaning."""
    parts = (model.checkpoint.config, model.config)
    taken = [value for part in parts for key, value in part.items() if "token" in key]
    return [i for i in range(int(model.value("vocab_size"))) if i not in taken][:TOKENS]


def _problem(model: Model, error: Exception) -> str:
    """The first line of the error. Kernels complain about strides; the sizes that cause this are named instead."""
    text = error.message if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    if model.num_experts and "strid" in text:
        width = model.value(model.family.experts.width)
        text = why_not(model.family, width=width, hidden=model.hidden_size, dtype=model.dtype) or text
    return escape(text.strip().splitlines()[0])[:300]
