"""The memory that it takes to run a pruned model beside the unpruned one, computed from the headers. Imports no
torch."""

from __future__ import annotations

from moeconv.families.model import Model
from moeconv.stream.need import WorkloadFields

_REFITTED = 4  # activations in a refit: the inputs of the experts, what the layer lacks, and copies of it
REFIT_BYTES = 1 << 29  # of experts that are refitted at the same time; at least one expert
_BYTES = 4 + 4 + 4  # per refitted weight: its change, the old weight and the new one


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
    hidden = model.expert_dimension
    inner = max(1, weights // hidden)
    block = min(REFIT_BYTES, refitted * fitted_bytes(hidden, inner))
    work = max(block, fitted_bytes(hidden, inner))
    return {"flows": flows, "resident": _REFITTED, "results": refitted * weights * _BYTES + work}


def fitted_bytes(hidden: int, inner: int) -> int:
    """The bytes for the refit of one expert's down projection [hidden, inner]: its Gram matrix and the factor of it in
    float64, and the vectors of conjugate gradients."""
    return inner * (16 * inner + 20 * hidden)
