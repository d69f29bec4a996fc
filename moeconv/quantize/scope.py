"""The weights of each --scope: matrices that multiply activations, but never router, embedding, norm or head."""

from __future__ import annotations

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.quantize.spec import Format, SchemeInfo

# The groups of a scope. No router is packed, also not that of the shared expert ("shared.router"): the CPU kernel of
# bitsandbytes needs 32 rows, and the few rows of a router matter more than the memory that they take.
GROUPS = {
    "experts": ("expert",),
    "experts+shared": ("expert", "shared"),
    "all-linear": ("expert", "shared", "ffn", "attention"),
}


WHOLE = "all"  # every weight for which the scheme has a type


def choose_scope(model: Model, format: Format, info: SchemeInfo, scope: str | None) -> str:
    """The scope for --scope, or for a scheme without it; all linear weights of a model without experts. Raises
    UsageError where the two contradict each other, and where the format does not decide every tensor."""
    if info.whole and scope not in (None, WHOLE):
        raise UsageError(
            f"--scheme {info.name} decides the type of every tensor, but --scope {scope} leaves some out",
            hint="Leave --scope out, or name the type of the experts, such as --scheme q4_k.",
        )
    if scope == WHOLE and format.covers is None:
        raise UsageError(f"--format {format.name} does not support --scope all", hint="Use --scope all-linear.")
    chosen = scope or (WHOLE if info.whole else "experts")
    return chosen if model.moe_layers or chosen == WHOLE else "all-linear"


def in_scope(model: Model, scope: str, format: Format) -> list[TensorRef]:
    """The weights that a scope packs, in file order."""
    if scope == WHOLE:
        assert format.covers is not None
        return format.covers(model)
    chosen, left = [], format.leaves(model.family)
    for name, ref in model.checkpoint.tensors.items():
        role = model.roles.get(name)
        if role is None or role.group not in GROUPS[scope] or role.key in left:
            continue
        layout = model.family.tensors.packed.get(role.key) if role.expert is None else None
        if not name.endswith(".weight") and (layout is None or layout.parts[0].endswith("_bias")):
            continue
        if role.key != "shared.router" and (role.group == "expert" or len(ref.shape) == 2):
            chosen.append(ref)
    return chosen
