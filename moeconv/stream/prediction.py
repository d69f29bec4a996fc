"""Multi-token-prediction layers, run behind a finished stream as serving engines run them for speculative decoding.

Step d = 1, 2, ... computes for position i: project([norm(embedding of token i + d), norm(h_i)]), where h is the main
model's output behind its final norm, or the output of step d - 1; then a decoder layer (DeepSeek-V3, arXiv 2412.19437,
section 2.2). No class of transformers has these layers, but their blocks are those of the model's own layers: a
prediction layer is loaded in the place of such a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.families import packed
from moeconv.families.model import Model
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.tensors import decode_weight, plain_name


@dataclass(frozen=True)
class _Placed(Model):
    """A model in which a prediction layer of the model `whole` is in the place of one of its own layers. `names` are
    {name here: name there}."""

    whole: Model
    names: Mapping[str, str]

    @cached_property
    def stored(self) -> Mapping[str, packed.Stored]:
        """As in `Model`."""
        here = {old: new for new, old in self.names.items()}
        found: dict[str, packed.Stored] = {}
        for weight in self.whole.stored.values():
            parts = {part: here[name] for part, name in weight.parts.items() if name in here}
            if len(parts) == len(weight.parts):
                found[packed.weight_of(next(iter(parts.values())))] = replace(weight, parts=parts)
        return found


@dataclass(frozen=True, eq=False)
class Predicted:
    """A prediction layer with its weights loaded: its `number`, counted on from the model's own layers, and its inputs
    `hidden` [n, S - d, H]."""

    number: int
    layer: Layer
    hidden: Tensor


def prediction_layers(stream: LayerStream) -> Iterator[Predicted]:
    """Yield the multi-token-prediction layers that have experts, after all layers of `stream` were run. Windows that
    are too short for a step end the iteration."""
    model = stream.model
    before: LayerStream | None = None
    for step, number in enumerate(model.prediction_layers, 1):
        if not model.mtp_layers or number > model.mtp_layers[-1] or stream.windows.shape[1] <= step:
            return
        at = model.place_of_prediction(number)
        if at is None:
            return
        tail = LayerStream(
            _placed(model, number, at), stream.windows[:, step:], dtype=stream.dtype, device=stream.device,
            batch_size=stream.batch_size, max_memory=stream.max_memory, held=stream.held,
        )  # fmt: skip
        _join(model, number, stream if before is None else before, tail, final=before is None)
        layer = tail.loaded(at)
        if number in model.mtp_layers:
            yield Predicted(number, layer, tail.hidden)
        if number != model.mtp_layers[-1]:
            for _ in layer.batches(hidden=tail.hidden):  # its outputs are what the next step reads
                pass
        layer.free()
        before = tail


def _placed(model: Model, number: int, at: int) -> _Placed:
    """The model with prediction layer `number` in the place of layer `at`."""
    family = model.family
    names = {n: n for n, r in model.roles.items() if r.layer is None or (r.layer < model.num_layers and r.layer != at)}
    roles = {name: model.roles[name] for name in names}
    for name, role in model.roles.items():
        if role.layer != number:
            continue
        if role.key == "mtp.embedding":
            tokens = family.name("embedding.tokens")
            names[tokens], roles[tokens] = name, roles[tokens]
        elif role.key not in family.prediction.names:
            form = next(f for f in (family, *family.forms()) if role.key in f.tensors.names)
            target = form.name(role.key, layer=at, expert=role.expert).removesuffix(".weight")
            moved = target + name.removeprefix(packed.weight_of(name).removesuffix(".weight"))
            names[moved], roles[moved] = name, replace(role, layer=at)
    return _Placed(model.checkpoint.chosen(names), family, roles, model.dropped, model, names)


@torch.no_grad()
def _join(model: Model, number: int, before: LayerStream, tail: LayerStream, *, final: bool) -> None:
    """Replace the embeddings in `tail.hidden` by the inputs of the prediction layer. `final`: the activations `before`
    are those of the main model, which its final norm has not yet seen."""
    norm = tail.skeleton.owner(model.family.name("norm.final"))
    ours = decode_weight(model, model.family.name("norm.final"))
    of_embedding, of_hidden, project = (
        _own(model, number, f"mtp.{k}") for k in ("norm_embedding", "norm_hidden", "project")
    )

    def normed(values: Tensor, weight: Tensor) -> Tensor:
        part = copy.copy(norm)
        vars(part)["_parameters"] = {"weight": nn.Parameter(weight.to(tail.device, tail.dtype), False)}
        made: Tensor = part(values)
        return made

    matrix = project.to(tail.device, tail.dtype)
    for rows in tail.rows():
        hidden = before.hidden[rows, :-1].to(tail.device)
        hidden = normed(normed(hidden, ours) if final else hidden, of_hidden)
        embedded = normed(tail.hidden[rows].to(tail.device), of_embedding)
        tail.hidden[rows] = nn.functional.linear(torch.cat([embedded, hidden], -1), matrix).to(tail.hidden.device)


def _own(model: Model, number: int, key: str) -> Tensor:
    """A tensor that prediction layer `number` has beside its decoder layer, or that all of them share."""
    found = [(role.layer != number, name) for name, role in model.roles.items() if role.key == key]
    if not found:
        raise InputError(f"the prediction layer {number} lacks its {key}", hint="A shard is missing.")
    _, name = min(found)
    return decode_weight(model, plain_name(name, model.roles[name]))
