"""Heals a pruned layer: its kept experts and its router are trained to give the output of the unpruned layer.

The inputs are those of the pruned model, so that each layer also corrects the errors of the layers before it. Only one
layer is trained at a time, so that any model that can be run layer by layer can be healed. The next layer is measured
on the outputs of the healed one. Of several processes, each computes the gradient of its part of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeconv.data.heldout import clearly_less
from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.families.packed import SHARED
from moeconv.families.spec import Role
from moeconv.randomness import generator
from moeconv.stream.finite import not_finite
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.skeleton import own_parameters
from moeconv.stream.stored import class_forward, is_transposed, module_of, takes_index
from moeconv.tune.optimise import Outcome, Schedule, optimise
from moeconv.tune.parameters import Piece
from moeconv.world import summed

# Peak learning rates times the hidden size, as in tune (job.py). Measured on one model only: a Qwen3-MoE of 12 M
# parameters (hidden size 256) with half of its experts removed, seed 0 (docs/benchmarks.md).
_EXPERTS, _ROUTER, _MOST = 1.0, 0.128, 0.01


@dataclass(frozen=True)
class Heal:
    """The settings: optimiser `steps` per layer, and the `seed` of the order of the batches."""

    steps: int
    seed: int = 0


@dataclass(frozen=True)
class HealOutcome:
    """The result of healing a layer on its held-out tokens: the squared errors of its output, relative to what the
    layer adds to the residual stream, before and after, and whether the new weights are used (`kept`)."""

    layer: int
    error_before: float
    error_after: float
    kept: bool


@dataclass(frozen=True, eq=False)
class LayerData:
    """The windows of one layer: `inputs` [n, S, H] of the pruned model, the `wanted` outputs [n, S, H], and which
    tokens are for training and which are `held` out, bool [n, S] each."""

    inputs: Tensor
    wanted: Tensor
    training: Tensor
    held: Tensor


@dataclass(frozen=True, eq=False)
class Healed:
    """What became of one layer: the parameters of its kept experts {leaf: [n, ...]}, its router's weight [E, H], and
    the figures."""

    experts: Mapping[str, Tensor]
    router: Tensor
    outcome: HealOutcome


@contextmanager
def kept_alone(layer: Layer, kept: Sequence[int], *, num_experts: int) -> Iterator[nn.Module]:
    """Inside the block, the layer computes with a module that holds only the `kept` experts, which are its parameters.

    Raises InputError for experts that are not parameters of one module, or whose weights multiply their inputs.
    """
    experts = layer.experts
    assert experts is not None
    own = own_parameters(experts)
    weights = {leaf: p.detach()[list(kept)] for leaf, p in own.items() if len(p) == num_experts}
    whole = len(weights) == len(list(experts.parameters()))
    if not weights or not whole or not takes_index(experts):
        raise InputError(
            f"--heal cannot train the experts of {type(experts).__name__}",
            hint="Leave out --heal. --refit and --distill may take this model.",
        )
    part = module_of(experts, weights, of=num_experts)
    place = torch.zeros(num_experts, dtype=torch.int64, device=next(iter(weights.values())).device)
    place[list(kept)] = torch.arange(len(kept), device=place.device)
    before = vars(experts).get("forward")
    experts.forward = lambda hidden, index, by: class_forward(part)(hidden, place[index], by)
    try:
        yield part
    finally:
        del experts.forward
        if before is not None:
            experts.forward = before


def heal_layer(
    stream: LayerStream, layer: Layer, part: nn.Module, data: LayerData, heal: Heal, dtypes: Mapping[str, str], *,
    trains: Tensor | None = None,
) -> Healed:  # fmt: skip
    """Train the parameters of `part` and the router of a layer. They keep the values that they had where the new ones
    are not clearly better on the held-out tokens. `dtypes` are those on disk, of "router" and "experts". With `trains`
    bool [n, I], the columns of all other neurons in the down projections stay as they are."""
    assert layer.router is not None
    router = layer.router.get_parameter("weight")
    pieces = [Piece("router", dtypes["router"], "router", router)]
    pieces += [Piece(leaf, dtypes["experts"], "experts", p) for leaf, p in own_parameters(part).items()]
    norm = _added(data)
    order = _batches(stream, data, seed=heal.seed, layer=layer.index)
    first, old = _errors(stream, layer, data), [p.parameter.detach().clone() for p in pieces]

    def step(_: int) -> float:
        rows = next(order)
        if rows is None:  # only other processes have a part of this batch
            summed(torch.zeros((), dtype=torch.int64, device=stream.device))
            return 0.0
        used = data.training[rows].to(stream.device)
        off = layer.run(data.inputs[rows].to(stream.device), rows) - data.wanted[rows].to(stream.device)
        loss = off.float().square().sum(-1)[used].sum() / (summed(used.sum()) * norm).clamp_min(1e-30)
        loss.backward()
        if (only := trains) is not None:
            gradient = part.get_parameter("down_proj").grad
            assert gradient is not None
            gradient.mul_(only[:, :, None] if is_transposed(part) else only[:, None])
        return float(loss.detach())

    rates = {"experts": _EXPERTS, "router": _ROUTER}
    outcome: Outcome[Tensor] = optimise(
        pieces,
        schedule=Schedule(heal.steps, {word: min(_MOST, by / stream.model.hidden_size) for word, by in rates.items()}),
        step=step,
        measure=lambda: _errors(stream, layer, data),
        score=lambda errors: float(errors.mean()),
        note=lambda _step, _loss, _measured: None,
        not_finite=lambda: not_finite(stream.model, layer.index, dtype=stream.dtype),
    )
    better = outcome.improved and clearly_less(outcome.after.numpy(), first.numpy())
    if not better:
        for piece, values in zip(pieces, old):
            piece.parameter.detach().copy_(values)
    figures = HealOutcome(layer.index, _root(first, norm), _root(outcome.after, norm), kept=better)
    return Healed({leaf: p.detach() for leaf, p in own_parameters(part).items()}, router.detach(), figures)


def _root(errors: Tensor, norm: Tensor) -> float:
    return float((errors.mean() / norm.double().cpu().clamp_min(1e-30)).sqrt())


def _added(data: LayerData) -> Tensor:
    """The mean squared norm of what the unpruned layer's output has that the input lacks, per token."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for inputs, wanted in zip(data.inputs.split(8), data.wanted.split(8)):
        total += (wanted.float() - inputs.float()).square().sum(dtype=torch.float64)
        count += inputs.shape[0] * inputs.shape[1]
    both = summed(torch.stack([total, torch.tensor(count, dtype=torch.float64)]))
    return (both[0] / both[1]).float().to(data.inputs.device)


def _batches(stream: LayerStream, data: LayerData, *, seed: int, layer: int) -> Iterator[slice | None]:
    """The batches of the stream that have tokens for training, in random order, again and again. Of several processes,
    each has the part of a batch that is in its windows, or None."""
    own = list(stream.rows())
    trains = torch.zeros(stream.share.windows, dtype=torch.int64)  # at least as many as there are batches
    trains[: len(own)] = torch.tensor([int(data.training[rows].any()) for rows in own])
    every = summed(trains).nonzero().flatten().tolist()
    draw = generator((seed, "heal", layer))
    while True:
        for i in draw.permutation(len(every)):
            yield own[every[i]] if every[i] < len(own) else None


@torch.no_grad()
def _errors(stream: LayerStream, layer: Layer, data: LayerData) -> Tensor:
    """The squared error of the output for each held-out token of all processes, float64 [t]."""
    found = [torch.empty(0, dtype=torch.float64)]
    for rows in stream.rows():
        held = data.held[rows]
        if bool(held.any()):
            off = layer.run(data.inputs[rows].to(stream.device), rows).cpu() - data.wanted[rows]
            found.append(off[held].double().square().sum(-1))
    return stream.share.gathered(torch.cat(found), data.held)


def dtypes_of(model: Model, layer: int) -> dict[str, str]:
    """The dtypes on disk of the tensors that are trained in a layer: of its "router" and its "experts"."""
    found = {role.group: model.checkpoint.tensors[name].dtype for name, role in trained(model, layer)}
    return {"router": found["router"], "experts": found["expert"]}


def trained(model: Model, layer: int) -> list[tuple[str, Role]]:
    """(name, role) of the tensors that are trained in a layer of the unpruned model."""
    return [
        (name, role)
        for name, role in model.roles.items()
        if role.layer == layer and ((role.group == "expert" and role.part not in SHARED) or role.key == "router.weight")
    ]
