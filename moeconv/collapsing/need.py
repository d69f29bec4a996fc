"""The memory that a collapse takes beside the stream of the model, computed from the headers. Imports no torch."""

from __future__ import annotations

from moeconv.families.model import Model
from moeconv.stream.need import WorkloadFields

CANDIDATES = 2  # neurons among which the surgeon chooses, per neuron that stays; also limited by the tokens
_SQUARES = (
    8  # matrices [n, n] in float64: the moments with and without the ridge, factors, and what the surgeon updates
)
_RESIDENT = 3  # activations: the inputs of a layer's FFN, the wanted outputs, and copies of them


def collapse_workload(model: Model, width: int) -> WorkloadFields:
    """The workload of running a model beside its collapsed twin with FFNs of `width` neurons."""
    experts = model.num_experts * model.expert_width
    many = min(CANDIDATES * width, experts + width)
    stored = (experts + width) * model.hidden_size * (3 * 4 + 8 + 4)  # the neurons of a layer, and their sums
    return {
        "flows": 2, "resident": _RESIDENT,
        "results": stored + many * (8 * many * _SQUARES + 5 * 8 * model.hidden_size),
    }  # fmt: skip
