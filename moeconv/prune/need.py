"""The memory that running a pruned model beside the whole one takes, from the headers. Imports no torch."""

from __future__ import annotations

from moeconv.families.model import Model
from moeconv.stream.need import WorkloadFields

_BYTES = 8 + 4  # of a refitted weight: its change in float64, and the old one, which the new one follows


def pruned_workload(model: Model, *, refitted: int, variants: int = 1) -> WorkloadFields:
    """The workload of pruned `variants` beside the model, of which at most so many experts of a layer are `refitted`
    (0: none), one variant after the other.

    `flows` are the activations of all, and in a refit what the experts read and what the layer lacks, in float32 and
    in float64."""
    flows = 1 + variants
    if not refitted:
        return {"flows": flows}
    weights = max(
        (
            model.numel(model.checkpoint.tensors[name]) // (1 if role.expert is not None else model.num_experts)
            for name, role in model.roles.items()
            if role.group == "expert" and role.key.endswith(".down")
        ),
        default=0,
    )
    return {"flows": flows + 4, "results": refitted * weights * _BYTES}
