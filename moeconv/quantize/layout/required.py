"""The layout of experts that a format packs: the plan that writes it, and the families that have none."""

from __future__ import annotations

from dataclasses import replace

from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.plan.fuse import fuse
from moeconv.plan.plan import Plan
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.layout.planner import plan_layout
from moeconv.quantize.spec import BY_DATA, Format


def layout_for(model: Model, format: Format) -> Plan | None:
    """The plan that writes the experts in the layout that a format packs; None where they have it.

    Raises InputError for a family that the format cannot store."""
    form = format.form(model.family)
    if form is None and (why := format.why_not(model.family)):
        raise InputError(f"--format {format.name}: {why}", hint="`moeconv families` shows the formats of each family.")
    return plan_layout(model, form, prediction=format.prediction)


def fused_with_layout(layout: Plan, plan: Plan) -> Plan:
    """The plan with the one before it that changes only the layout of the experts.

    The manifest does not list the latter as a step, because the model is the same."""
    fused = fuse(layout, plan)
    assert fused is not None  # the plan before it moves the matrices of one expert at a time
    return replace(fused, earlier=plan.earlier)


def check_layout(model: Model, format: Format, method: str) -> None:
    """Raises InputError for stacked experts, all of a layer in one tensor, that the format or its loader cannot
    pack."""
    meant = format.packs_as_stored(model.family)
    if model.family.only_served and (method in BY_DATA or not meant):
        what = f"--method {method}" if method in BY_DATA else f"--format {format.name}"
        raise InputError(
            f"the class of {model.family.model_type} in transformers stacks the experts of a layer, so that {what} "
            "cannot be used for experts in separate tensors",
            hint="Use --method rtn or mse, with --format compressed-tensors, which vLLM reads.",
        )
    if not model.packed_experts or meant:
        return
    # transformers loads codes per expert, see planner.py
    apart = any(not way.packed for way in model.family.tensors.layouts)
    if format.stack is None or method in BY_DATA or apart:
        what = f"--method {method}" if method in BY_DATA else f"--format {format.name}"
        why = model.family.tensors.unserved
        raise InputError(
            f"{model.family.model_type} keeps all experts of a layer in one tensor, and {what} needs one tensor per "
            "expert, as do the runtimes that read packed weights" + (f": {why}" if why and not apart else ""),
            hint=_stacking(model),
        )
    if model.family.tensors.layouts and model.family.tensors.packed != model.family.tensors.layouts[0].packed:
        raise InputError(
            f"the expert matrices of this {model.family.model_type} are stored transposed to those of its class in "
            "transformers, so that their codes would not fit the matrices that the class computes with",
            hint="Load the model in transformers 5 and save it, which transposes them; then quantize the saved one.",
        )
    if "expert.gate" in model.family.tensors.packed:
        raise InputError(
            f"{model.family.model_type} keeps the gate matrices of all experts of a layer in one tensor and the up "
            "matrices in another, which its class in transformers joins; the loader of packed experts cannot do that",
            hint="`moeconv prune`, `calibrate` and `evaluate` support the model as it is.",
        )
    if any(layout.flat for layout in model.family.tensors.packed.values()):
        raise InputError(
            f"{model.family.model_type} keeps all experts of a layer in one tensor without an axis for the experts. "
            "Its class in transformers divides this tensor, which the loader of packed experts cannot do",
            hint="`moeconv prune`, `calibrate` and `evaluate` support the model as it is.",
        )


def _stacking(model: Model) -> str:
    """The formats for stacked experts."""
    usual = " or ".join(f.name for f in FORMATS.values() if f.stack is not None and f.imports)
    own = [f.name for f in FORMATS.values() if f.packs_as_stored(model.family)]
    return f"Use --format {usual} --method rtn: after `import moeconv.hf`, transformers loads the result." + "".join(
        f" Or --format {name}, the layout that {model.family.model_type} is published in." for name in own
    )
