"""Does a checkpoint run as its users run it: in the dtype it is written in, with transformers' default kernels?

Comparisons run in float64 with plain loops over the experts, which take shapes that the default kernels refuse.
"""

from __future__ import annotations

from typing import Any

import torch

from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import InputError, escape
from moeconv.families.model import Model, open_model
from moeconv.families.widths import why_not
from moeconv.plan.kernels.stored import TORCH_DTYPES
from moeconv.stream.layers import LayerStream
from moeconv.stream.silence import transformers_silenced

TOKENS = 16


def streamed_problem(model: Model) -> str | None:
    """What stops the model, a layer at a time in its own dtype with the default implementation; None when nothing
    does, and all logits are finite."""
    ids = torch.tensor([_ids(model)])
    try:
        stream = LayerStream(model, ids, dtype=TORCH_DTYPES[model.dtype], experts=model.family.experts.implementation)
        for layer in stream.layers():
            for batch in layer.batches():
                if not torch.isfinite(batch.outputs).all():
                    return f"layer {layer.index} gives NaN or infinite values in {model.dtype}"
        finite = all(bool(torch.isfinite(part).all()) for _, part in stream.logits())
        return None if finite else f"the logits are NaN or infinite in {model.dtype}"
    except Exception as error:  # whatever a kernel raises is the answer to the question
        return _said(model, error)


def loaded_problem(checkpoint: Checkpoint, module: Any) -> str | None:
    """The same of the whole model, as from_pretrained gave it."""
    try:
        model = open_model(checkpoint)
    except InputError as error:
        return error.message
    try:
        with transformers_silenced(), torch.no_grad():
            logits = module.eval()(torch.tensor([_ids(model)]), use_cache=False).logits
        return None if bool(torch.isfinite(logits).all()) else "the logits are NaN or infinite"
    except Exception as error:
        return _said(model, error)


def _ids(model: Model) -> list[int]:
    """Token ids that stand for text: the first of the vocabulary that config.json gives no other meaning."""
    parts = (model.checkpoint.config, model.config)
    taken = [value for part in parts for key, value in part.items() if "token" in key]
    return [i for i in range(int(model.value("vocab_size"))) if i not in taken][:TOKENS]


def _said(model: Model, error: Exception) -> str:
    """The error's first line; in place of a kernel's complaint about strides the sizes that make it."""
    text = error.message if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    if model.num_experts and "strid" in text:
        width = model.value(model.family.experts.width)
        text = why_not(model.family, width=width, hidden=model.hidden_size, dtype=model.dtype) or text
    return escape(text.strip().splitlines()[0])[:300]
