"""The weights of each --scope: matrices that multiply activations, but never router, embedding, norm or head."""

from __future__ import annotations

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.model import Model

# The groups of a scope. No router is packed, also not that of the shared expert ("shared.router"): the CPU kernel of
# bitsandbytes needs 32 rows, and the few rows of a router matter more than the memory that they take.
GROUPS = {
    "experts": ("expert",),
    "experts+shared": ("expert", "shared"),
    "all-linear": ("expert", "shared", "ffn", "attention"),
}


def scope_of(model: Model, scope: str) -> str:
    """The scope that is meant: all linear weights of a model without experts."""
    return scope if model.moe_layers else "all-linear"


def in_scope(model: Model, scope: str) -> list[TensorRef]:
    """The weights that a scope packs, in file order."""
    chosen = []
    for name, ref in model.checkpoint.tensors.items():
        role = model.roles.get(name)
        if role is None or role.group not in GROUPS[scope]:
            continue
        layout = model.family.tensors.packed.get(role.key) if role.expert is None else None
        if not name.endswith(".weight") and (layout is None or layout.parts[0].endswith("_bias")):
            continue
        if role.key != "shared.router" and (role.group == "expert" or len(ref.shape) == 2):
            chosen.append(ref)
    return chosen
