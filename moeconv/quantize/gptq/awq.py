"""AWQ (arXiv 2306.00978) for experts: columns with large inputs are multiplied by factors before they are rounded.

The factors are a power alpha of the mean magnitude of each input, rounded to powers of two (see fold.py). The input of
the experts has one vector of factors for all experts of a layer, chosen by the error of the layer's output; the input
of the down projections has one per expert, chosen by the error of its output. Weights are then rounded to the nearest
level, with scales of least error weighted by the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.plan.kernels.pack.levels import Coded, divided, nearest_scales, round_to_nearest, with_scales
from moeconv.plan.kernels.pack.scales import search_scales
from moeconv.quantize.gptq.fold import linear_in_up, power_of_two, reads_alone
from moeconv.quantize.gptq.groups import Group, by_matrix, weight_name
from moeconv.quantize.gptq.hidden import hidden_activations
from moeconv.quantize.gptq.moments import moments, sums
from moeconv.quantize.gptq.work import (
    ExpertInputs,
    LayerWork,
    Made,
    Parts,
    Target,
    packed_parts,
    shared_tokens,
)
from moeconv.stream.share import copied_from

ALPHAS = tuple(i / 20 for i in range(20))
_GIVEN_UP = 4.0  # limit of the squared error of the weights of a scale, in units of that of round-to-nearest
_ROWS = 4096  # tokens that are summed at a time


class CannotFoldError(InputError):
    """A layer without a place into which factors can be folded."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of one layer: `norm` float32 [H] of the input of the experts, None where they cannot be folded into
    the norm; `inner`, per expert, float32 [I] of the input of its down projection, empty where they cannot be folded
    into up."""

    norm: Tensor | None
    inner: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def folded(self) -> list[str]:
        """What the factors are folded into."""
        return ["norm"] * (self.norm is not None) + ["up"] * bool(self.inner)


NO_FACTORS = Factors(None)


@dataclass(frozen=True, eq=False)
class _Inner:
    """The factors [I] of an expert's down projection, and the mean squares [I] of its inputs."""

    factors: Tensor
    energy: Tensor

    @property
    def stacked(self) -> Tensor:
        """Both [2, I]."""
        return torch.stack([self.factors, self.energy])


def awq_codes(
    work: LayerWork, seen: ExpertInputs, target: Target, gates: Sequence[Group], downs: Sequence[Group]
) -> tuple[list[Parts], Factors]:
    """Choose factors and codes of all experts and put the resulting weights into them, with the factors divided out
    again. Returns the tensors to write, and the factors. `target` has the unquantized outputs for the tokens by which
    the factors are chosen.

    Raises CannotFoldError where the factors cannot be folded into anything.
    """
    experts = sorted({e for group in downs for e in group.experts})
    inner: dict[int, _Inner] = {}
    folds_up, folds_norm = linear_in_up(work, seen, experts), reads_alone(work)
    if not (folds_up or folds_norm):
        raise CannotFoldError(
            f"--method awq has nothing to fold its factors into in layer {work.layer.index}: the norm in front of the "
            "experts has other readers or does not multiply by its weight alone, and down is not linear in up",
            hint="Use --method gptq.",
        )
    for source, made in work.dealt(downs, partial(_inner, work, seen, search=folds_up)):
        found = copied_from(source, None if made is None else {str(e): one.stacked for e, one in made.items()})
        inner |= {int(e): _Inner(*both) for e, both in found.items()}
    work.round((*gates, *downs))
    norm = _input_factors(work, seen, target, gates) if folds_norm else None
    plain = torch.ones(work.model.expert_dimension, device=work.stream.device)
    packed = work.each(gates, partial(_code_gate_up, work, seen, plain if norm is None else norm, inner))
    packed += work.each(downs, partial(_code_down, work, inner))
    return packed, Factors(norm, {e: one.factors for e, one in inner.items()} if folds_up else {})


def candidates(magnitude: Tensor) -> list[Tensor]:
    """The vectors of factors [..., n] to try for inputs of mean `magnitude` [..., n]: powers of it between 0 and 1 that
    are centred on 1 and rounded to powers of two. The first one is 1 everywhere."""
    mean = magnitude.double().clamp(min=1e-12)
    found: list[Tensor] = []
    for alpha in ALPHAS:
        factors = mean**alpha
        centre = (factors.amax(-1, keepdim=True) * factors.amin(-1, keepdim=True)).sqrt()
        rounded = power_of_two(factors / centre)
        if not any(torch.equal(rounded, other) for other in found):
            found.append(rounded)
    return found


def _input_factors(work: LayerWork, seen: ExpertInputs, target: Target, gates: Sequence[Group]) -> Tensor:
    """The factors [H] of the experts' input with the least error of the layer's output, with round-to-nearest."""
    free = (~seen.held).nonzero().flatten()
    total = torch.zeros(seen.inputs.shape[1], dtype=torch.float64)
    for part in free.split(_ROWS):
        total += seen.inputs[part].abs().double().sum(0)

    def rounded(factors: Tensor, group: Group) -> Mapping[str, Tensor]:
        coded = round_to_nearest(work.stacked(group) * factors, group.grid, group=group.size)
        return by_matrix(group, coded.decoded() / factors)

    best, least = None, torch.inf
    for factors in candidates(total.to(work.stream.device) / max(1, len(free))):
        for weights in work.workers.map(torch.no_grad()(partial(rounded, factors)), gates):
            work.experts.put(weights)
        error = float(work.squares(seen, target).sum())
        if best is None or error < least:
            best, least = factors, error
    assert best is not None
    return best


def _inner(work: LayerWork, seen: ExpertInputs, group: Group, *, search: bool) -> dict[int, _Inner]:
    """Per expert of a group, the factors of its down projection with the least error of its output; with `search` False
    they are 1."""
    device = work.stream.device
    rows, share, counts = shared_tokens(seen, group, device)
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    hidden = hidden_activations(work.experts.source(group.experts), seen.inputs, rows, expert, device)
    energy = sums(hidden.square(), share, counts).float()
    best = torch.ones_like(energy)
    if search:
        moment = moments(lambda at: (hidden[at], hidden[at]), share, counts).float()
        weight = work.stacked(group)
        least = torch.full((len(counts),), torch.inf, device=device)
        for factors in candidates(sums(hidden.abs_(), share, counts)):
            coded = round_to_nearest(weight * factors[:, None], group.grid, group=group.size)
            left = coded.decoded().div_(factors[:, None]).sub_(weight)
            error = torch.bmm(left, moment).mul_(left).sum((1, 2))
            better = error < least
            best = torch.where(better[:, None], factors, best)
            least = torch.where(better, error, least)
    return {e: _Inner(best[i], energy[i]) for i, e in enumerate(group.experts)}


def _code_gate_up(
    work: LayerWork, seen: ExpertInputs, factors: Tensor, inner: Mapping[int, _Inner], group: Group
) -> Made:  # fmt: skip
    """The codes of the matrices that read the input of the expert; those of up with rows divided by the factors of
    down."""
    device = work.stream.device
    rows, share, counts = shared_tokens(seen, group, device)
    energy = torch.cat(
        [
            sums(seen.inputs[r].to(device).square(), s, [len(r)])
            for r, s in zip(rows.split(counts), share.split(counts), strict=True)
        ]
    ).float()
    weight = work.stacked(group)
    by_row = _row_factors(work.view, inner, group, weight.shape[1], device)[..., None]
    coded = _rounded(weight / by_row, factors.expand_as(energy), energy, group)
    return Made(by_matrix(group, coded.decoded() * by_row / factors), packed_parts(group, coded))


def _row_factors(
    view: Model, inner: Mapping[int, _Inner], group: Group, out: int, device: torch.device
) -> Tensor:  # fmt: skip
    """The divisors of the rows of a group's matrices: [E, out], 1 except in up."""
    found = torch.ones(len(group.experts), out, device=device)
    parts = by_matrix(group, found)
    for expert, items in zip(group.experts, group.items, strict=True):
        for name in map(weight_name, items):
            if view.roles[name].key == "expert.up":
                parts[name].copy_(inner[expert].factors)  # a view of `found`
    return found


def _code_down(work: LayerWork, inner: Mapping[int, _Inner], group: Group) -> Made:
    """The codes of the down projections."""
    factors, energy = (torch.stack([getattr(inner[e], name) for e in group.experts]) for name in ("factors", "energy"))
    coded = _rounded(work.stacked(group), factors, energy, group)
    return Made(by_matrix(group, coded.decoded() / factors[:, None]), packed_parts(group, coded))


def _rounded(weight: Tensor, factors: Tensor, energy: Tensor, group: Group) -> Coded:
    """The codes of `weight` [E, out, in] times the `factors` [E, in] of its columns, with scales of the least error
    weighted by the mean squares `energy` [E, in] of the inputs."""
    multiplied = weight * factors[:, None]
    unit = group.grid.unit(multiplied)
    multiplied = divided(multiplied, unit)
    usual = nearest_scales(multiplied, group.grid, group=group.size)
    scales = search_scales(multiplied, energy / factors.square(), group.grid, group=group.size)
    # where nearly all weight is on few inputs, the search would give up the others
    errors, least = (_by_scale(multiplied, with_scales(multiplied, s, group.grid)) for s in (scales, usual))
    scales = torch.where(errors > _GIVEN_UP * least, usual, scales)
    return replace(with_scales(multiplied, scales, group.grid), unit=unit)


def _by_scale(weight: Tensor, coded: Coded) -> Tensor:
    """The squared error of the weights of each scale: [E, out, groups]."""
    left = coded.decoded().sub_(weight)
    squares: Tensor = left.square_().unflatten(-1, (coded.scales.shape[-1], -1)).sum(-1)
    return squares
