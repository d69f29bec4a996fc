"""GPTQ's codes of one layer's experts.

The codes of gate and up are chosen first, by the inputs of the expert. The codes of down follow, by the hidden
activations that the quantized gate and up compute, so that down corrects a part of their error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.levels import Coded
from moeconv.quantize.gptq.groups import Group, by_matrix
from moeconv.quantize.gptq.hidden import hidden_activations
from moeconv.quantize.gptq.moments import moments
from moeconv.quantize.gptq.solve import damped, gptq, retarget
from moeconv.quantize.gptq.work import ExpertInputs, LayerWork, Made, Parts, packed_parts, shared_tokens


def gptq_codes(work: LayerWork, seen: ExpertInputs, gates: Sequence[Group], downs: Sequence[Group]) -> list[Parts]:
    """Choose the codes of all experts and put the resulting weights into them. Returns the tensors to write."""
    packed = work.each(gates, partial(_code_gate_up, work, seen, _pooled(work, seen)))
    return packed + work.each(downs, partial(_code_down, work, seen))


def _code_gate_up(work: LayerWork, seen: ExpertInputs, pooled: Tensor, group: Group) -> Made:
    """The codes of the matrices that read the input of the expert."""
    own, device = [seen.tokens[e] for e in group.experts], work.stream.device
    rows, weights = torch.cat([s.rows for s in own]), torch.cat([s.weights for s in own])

    def take(at: Tensor) -> tuple[Tensor, Tensor]:
        x = seen.inputs[rows[at.cpu()]].to(device)
        return x, x

    total = moments(take, weights.to(device), [len(s.rows) for s in own])
    rest = torch.tensor([s.rest for s in own], dtype=total.dtype, device=total.device)
    total.flatten(1).addr_(rest, pooled.flatten())
    return _made(work, group, work.stacked(group), damped(total, work.settings.damping))


def _code_down(work: LayerWork, seen: ExpertInputs, group: Group) -> Made:
    """The codes of the down projections, which correct a part of the error of gate and up."""
    hessian, gap = _hidden_hessian(work, seen, group)
    weight = retarget(work.stacked(group), gap, hessian)
    del gap
    return _made(work, group, weight, hessian)


def _hidden_hessian(work: LayerWork, seen: ExpertInputs, group: Group) -> tuple[Tensor, Tensor]:
    """(damped second moment of the hidden activations, moment of their error with them in the same units), both float64
    [E, I, I]. The error is the difference between the hidden activations of the source and those of the quantized gate
    and up."""
    device = work.stream.device
    rows, share, counts = shared_tokens(seen, group, device)
    sizes = torch.tensor(counts)
    expert = torch.tensor(group.experts).repeat_interleave(sizes)
    given = hidden_activations(work.experts.module, seen.inputs, rows, expert, device)
    expert = torch.arange(len(counts)).repeat_interleave(sizes)
    source = hidden_activations(work.experts.source(group.experts), seen.inputs, rows, expert, device)
    gap = moments(_rows_of(source.sub_(given), given), share, counts)
    del source
    moment = moments(_rows_of(given, given), share, counts)
    mean = moment.diagonal(dim1=1, dim2=2).mean(-1)
    gap /= torch.where(mean > 0, mean, torch.inf)[:, None, None]
    return damped(moment, work.settings.damping), gap


def _made(work: LayerWork, group: Group, weight: Tensor, hessian: Tensor) -> Made:
    """The coded weights of a group by matrix, with their tensors as on disk."""
    coded: Coded = gptq(weight, hessian, group.grid, group=group.size, ordered=work.settings.ordered)
    return Made(by_matrix(group, coded.decoded()), packed_parts(group, coded))


def _pooled(work: LayerWork, seen: ExpertInputs) -> Tensor:
    """The second moment of the pool, float64 [H, H]."""
    x = seen.inputs[seen.pool].to(work.stream.device)
    return moments(lambda at: (x[at], x[at]), torch.ones(len(x), device=x.device), [len(x)])[0]


def _rows_of(left: Tensor, right: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function that returns the rows of both at given positions, for `moments`."""
    return lambda at: (left[at], right[at])
