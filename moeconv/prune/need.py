"""The memory that it takes to run a pruned model beside the unpruned one, computed from the headers. Imports no
torch."""

from __future__ import annotations

from moeconv.families.model import Model
from moeconv.stream.need import WorkloadFields

_REFITTED = 4  # activations in a refit: the inputs of the experts, what the layer lacks, and copies of it
_COPIES = 3  # of the experts of a layer that is healed: as loaded, those that train, and what the backward pass keeps
_TRAINED = 4 * 5  # bytes per trained weight: gradient, two moments, the values before and the best ones
REFIT_BYTES = 1 << 29  # of experts that are refitted at the same time; at least one expert
ROWS_BYTES = 1 << 28  # of the inputs of these experts' down projections that are computed once for all steps
_BYTES = 4 + 4 + 4  # per refitted weight: its change, the old weight and the new one
_CUT = 6 * 4  # per weight of experts that lose neurons: as in a refit, and the fits that held-out tokens compare


def pruned_workload(
    model: Model, *, refitted: int, healed: int = 0, narrowed: int = 0, variants: int = 1, shared: bool = False
) -> WorkloadFields:
    """The workload of running pruned `variants` beside the model, one variant after the other. At most `refitted`
    experts of a layer are refitted, `healed` are trained, and `narrowed` lose neurons (0: none). With `shared`, the
    shared expert may lose neurons, before the other experts do.

    `flows` counts the activations of the model and of the variants, which can be in a file. What a refit adds is in
    memory.
    """
    found: WorkloadFields = {"flows": 1 + variants}
    if refitted or narrowed:
        found = _refit(model, max(refitted, narrowed), narrows=narrowed > 0) | found
    if shared and _each(model, ".down", "shared"):
        alone = _refit(model, 1, narrows=True, group="shared")
        found |= {"resident": _REFITTED, "results": max(found.get("results", 0), alone.get("results", 0))}
    if healed:
        trained = healed * _each(model, "") * _TRAINED
        found |= {"copies": _COPIES, "results": found.get("results", 0) + trained}
    return found


def _each(model: Model, key: str, group: str = "") -> int:
    """The number of weights of one expert, or of the FFN of a dense model, in its tensors whose key ends with `key`, in
    the largest layer; with `group` "shared", of the shared expert."""
    sizes: dict[int | None, int] = {}
    group = group or ("expert" if model.num_experts else "ffn")
    for name, role in model.roles.items():
        if role.group == group and role.key.endswith(key):
            numel = model.numel(model.checkpoint.tensors[name])
            shares = max(1, model.num_experts) if role.expert is None and group == "expert" else 1
            if role.expert in (None, 0):
                sizes[role.layer] = sizes.get(role.layer, 0) + numel // shares
    return max(sizes.values(), default=0)


def _refit(model: Model, fitted: int, *, narrows: bool, group: str = "") -> WorkloadFields:
    weights = _each(model, ".down", group)
    hidden = model.expert_dimension if model.num_experts and group != "shared" else model.hidden_size
    inner = max(1, weights // hidden)
    of_one = narrowed_bytes(hidden, inner) if narrows else fitted_bytes(hidden, inner)
    work = max(min(REFIT_BYTES, fitted * of_one), of_one)
    work += ROWS_BYTES
    return {"resident": _REFITTED, "results": fitted * weights * (_CUT if narrows else _BYTES) + work}


def fitted_bytes(hidden: int, inner: int) -> int:
    """The bytes for the refit of one expert's down projection [hidden, inner]: its Gram matrix and the factor of it in
    float64, and the vectors of conjugate gradients."""
    return inner * (16 * inner + 20 * hidden)


def narrowed_bytes(hidden: int, inner: int) -> int:
    """The bytes for choosing the neurons of one expert: its Gram matrix and the inverse, the products of the columns
    and two temporary matrices in float64, the changes of a batch of removals, and two fits of [hidden, inner]."""
    return inner * (5 * 8 * inner + 2 * 8 * hidden + 8 * 8 * 64)
