"""plan_overlay: makes a Plan from a model and the header of an overlay. Reads no weights and imports no torch.

The tensors of the overlay replace those of the model; every other tensor is carried over unchanged.
"""

from __future__ import annotations

from dataclasses import replace as replace_fields
from typing import Any

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.overlay import Overlay, provenance
from moeconv.checkpoint.safetensors_file import SafetensorsFile, TensorRef
from moeconv.errors import InputError, escape
from moeconv.families.head import head_warnings, with_head
from moeconv.families.model import Model
from moeconv.families.written import written_config
from moeconv.options import PlanOptions, TuneOptions, check_names, from_keywords, parameters_of
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, carry, carry_all, count_planned, parse_dtype
from moeconv.plan.overlay import ORIGIN, fingerprint
from moeconv.plan.plan import Item, Plan
from moeconv.tune.words import BIAS, parse_train, tensors_of
from moeconv.types import JsonObject


def plan_overlay(model: Model, overlay: Overlay | SafetensorsFile, **parameters: Any) -> Plan:
    """Plan the model with the tensors of the overlay in place of its own. `parameters` are the fields of PlanOptions.

    Run it with `execute(plan, source=model.checkpoint, origins={"overlay": overlay}, out=...)`.
    Raises InputError for an overlay of another model, or one with a name, shape or dtype that the model does not have.
    """
    check_names(parameters, PlanOptions)
    return overlay_plan(model, overlay, from_keywords(PlanOptions, parameters))


def plan_unmade(model: Model, options: TuneOptions, common: PlanOptions) -> Plan:
    """The plan of a training that was not run (for a dry run): the same tensors, with the bytes of the source."""
    opened = set(tensors_of(model, (*parse_train(options.train), *([BIAS] if options.bias_update else []))))
    dtype = parse_dtype(common.dtype)

    def replace(ref: TensorRef) -> list[Item] | None:
        role = model.roles[ref.name]
        made = carry(ref, role=role.key, dtype=dtype, params=model.numel(ref), changed=role.group)
        return [made] if ref.name in opened else None

    items = carry_all(model, dtype=dtype, replace=replace)
    block = {"objective": "balance" if options.balance_only else options.objective, "steps": options.steps}
    return _plan(model, items, common, parameters=parameters_of(common), block=block)


def overlay_plan(model: Model, overlay: Overlay | SafetensorsFile, common: PlanOptions) -> Plan:
    """`plan_overlay`, with its parameters as options."""
    made_with = provenance(
        overlay, identity=model.identity, checkpoint=model.checkpoint,
        hint="Apply it to the model that it was trained on, or run `moeconv tune` on this one.",
    )  # fmt: skip
    _check(model, overlay)
    dtype = parse_dtype(common.dtype)
    replaced = overlay.tensors

    def replace(ref: TensorRef) -> list[Item] | None:
        if ref.name not in replaced:
            return None
        role = model.roles[ref.name]
        return [
            carry(
                replaced[ref.name], role=role.key, dtype=dtype, params=model.numel(ref), changed=role.group,
                origin=ORIGIN,
            )
        ]  # fmt: skip

    items = carry_all(model, dtype=dtype, replace=replace)
    about = {"overlay": fingerprint(overlay), "made_with": made_with}
    block = {"objective": made_with.get("objective")}
    plan = _plan(model, items, common, parameters=parameters_of(common) | about, block=block)
    return replace_fields(plan, promise=_promise(model, overlay))


def _plan(model: Model, items: list[Item], common: PlanOptions, *, parameters: JsonObject, block: JsonObject) -> Plan:
    total, active = count_planned(
        items, model.family, layers=model.num_layers, top_k=model.top_k, num_experts=model.num_experts
    )
    return Plan(
        command="tune",
        parameters=parameters,
        identity=model.identity,
        config=_config(model, parse_dtype(common.dtype)),
        shards=arrange(items, common, model.family),
        params_total=total,
        params_active=active,
        block=block,
        warnings=(*model.warnings, *head_warnings(model)),
        dropped=model.dropped,
    )


def _check(model: Model, overlay: Overlay | SafetensorsFile) -> None:
    if not overlay.tensors:
        raise InputError(f"{overlay.label} contains no tensor", hint="Run `moeconv tune` again.")
    for name, info in overlay.tensors.items():
        ref = model.checkpoint.tensors.get(name)
        if ref is None or name not in model.roles:
            raise InputError(
                f"{overlay.label}: the model has no tensor {escape(name)!r}", hint="Run `moeconv tune` again."
            )
        floats = info.dtype in FLOAT_DTYPES and ref.dtype in FLOAT_DTYPES
        if info.shape != ref.shape or not (floats or info.dtype == ref.dtype):
            raise InputError(
                f"{overlay.label}: tensor {escape(name)!r} is {info.dtype} {list(info.shape)}, "
                f"in the model {ref.dtype} {list(ref.shape)}",
                hint="Run `moeconv tune` again.",
            )


def _config(model: Model, dtype: str | None) -> JsonObject:
    """The config.json of the source. Only --dtype changes it, and keys that some reader needs are added."""
    return written_config(with_head(model), model.family, dtype=TORCH_NAMES[dtype] if dtype else None)


def _promise(model: Model, overlay: Overlay | SafetensorsFile) -> dict[str, int]:
    promise: dict[str, int] = {}
    for name in overlay.tensors:
        group = model.roles[name].group
        promise[group] = promise.get(group, 0) + 1
    return promise
