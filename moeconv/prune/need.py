"""The memory that it takes to run a pruned model beside the unpruned one, computed from the headers. Imports no
torch."""

from __future__ import annotations

from moeconv.families.model import Model
from moeconv.stream.need import WorkloadFields

_REFITTED = 4  # activations in a refit: the inputs of the experts, what the layer lacks in float32 and in float64
_BYTES = 8 + 4  # per refitted weight: its change in float64, and the old weight, which the new one replaces


def pruned_workload(model: Model, *, refitted: int, variants: int = 1) -> WorkloadFields:
    """The workload of running pruned `variants` beside the model, one variant after the other. At most `refitted`
    experts of a layer are refitted (0: none).

    `flows` counts the activations of the model and of the variants, which can be in a file. What a refit adds is in
    memory.
    """
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
    return {"flows": flows, "resident": _REFITTED, "results": refitted * weights * _BYTES}
