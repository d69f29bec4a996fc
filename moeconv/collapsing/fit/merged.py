"""The distinct neurons of a layer, and what each adds to its output on average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeconv.collapsing.fit.neurons import SHARED, Neurons, equal_to
from moeconv.families.model import Model


@dataclass(frozen=True, eq=False)
class Merged:
    """The distinct `neurons` [u] of a layer that add to its output, `down` float64 [u, H]: the sum of the columns of
    equal neurons, each times the mean weight of its expert. `members` int64 [n] is the number in `neurons` of every
    neuron of the layer, -1 for those that add nothing. `shared` bool [u] marks the neurons of the shared expert."""

    neurons: Neurons
    down: Tensor
    members: Tensor
    shared: Tensor

    def __len__(self) -> int:
        return len(self.down)

    def summed(self, values: Tensor) -> Tensor:
        """[u, ...]: the sums over equal neurons of `values` [n, ...]."""
        some = self.members >= 0
        made = values.new_zeros(len(self), *values.shape[1:])
        return made.index_add_(0, self.members[some], values[some])


def merge_equal(neurons: Neurons, weight: Tensor) -> Merged:
    """Merge equal neurons. `weight` float64 [n] is the mean weight of each neuron's expert."""
    first = equal_to(neurons)
    down = torch.zeros(neurons.down.shape, dtype=torch.float64)
    down.index_add_(0, first, neurons.down.double() * weight[:, None])
    adds = torch.zeros(len(first), dtype=torch.bool)
    adds[first[(neurons.down != 0).any(1)]] = True
    number = torch.where(adds, adds.cumsum(0) - 1, -1)
    which = adds.nonzero().flatten()
    shared = torch.zeros(len(first), dtype=torch.bool)
    shared[first[neurons.expert == SHARED]] = True
    return Merged(neurons.some(which), down[which], number[first], shared[which])


def assumed_weights(model: Model, neurons: Neurons) -> Tensor:
    """float64 [n]: the mean weight of each neuron's expert if the router chose all experts equally often and gave them
    equal weights; a shared expert behind a gate is weighted as if the weights of the gate were zero."""
    rule, experts = model.family.experts.routing, model.num_experts
    assert rule is not None
    if model.renormalises or rule.score == "sparsemixer":
        total = rule.total
    elif rule.score == "sigmoid":
        total = model.top_k / 2
    else:
        total = model.top_k / experts if rule.score == "softmax" else 1.0
    if rule.scaling:
        total *= float(model.value(rule.scaling) or 1.0)
    routed = total / experts * model.routed_share
    return torch.where(neurons.expert == SHARED, shared_weight(model), routed).double()


def shared_weight(model: Model) -> float:
    """The weight of the shared expert's output in that of the layer, behind a gate with weights of zero."""
    experts = model.family.experts
    averaged = experts.averaged and model.value(experts.averaged[0]) == experts.averaged[1]
    return experts.shared_weight * (model.routed_share if averaged else 1.0)
