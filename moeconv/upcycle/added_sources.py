"""The siblings of --add-experts-from, opened as experts of a Mixture-of-Experts: a checkpoint of the same model, a
fine-tuned copy of its dense base, or a LoRA adapter of that base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeconv.checkpoint.hub import resolve
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.meaning import meaning
from moeconv.families.model import Model, open_model
from moeconv.options import PlanOptions, UpcycleOptions
from moeconv.plan.planned import planned_model
from moeconv.upcycle.adapter import CONFIG_NAME, Adapter, is_adapter, open_adapter
from moeconv.upcycle.added import Added
from moeconv.upcycle.siblings import place_of

_BASE = "base_model_name_or_path"


def open_added(model: Model, options: UpcycleOptions) -> list[Added]:
    """The new experts behind the values of --add-experts-from. Raises InputError for what cannot be an expert of the
    model."""
    found = [_open(model, Path(resolve(path)), options) for path in options.add_experts_from]
    if options.ffn_only and not any(is_adapter(Path(resolve(path))) for path in options.add_experts_from):
        raise UsageError("--ffn-only is for LoRA adapters in --add-experts-from", hint="Leave it out.")
    if options.sibling_expert is not None and all(one.keys is not None for one in found):
        raise UsageError(
            "--sibling-expert names an expert of a Mixture-of-Experts in --add-experts-from, and none is given",
            hint="Leave it out: a dense sibling has one FFN per layer.",
        )
    return found


def _open(model: Model, path: Path, options: UpcycleOptions) -> Added:
    label = escape(path)
    if is_adapter(path):
        base = open_model(_base_of(path))
        adapter = open_adapter(path, base, ffn_only=options.ffn_only)
        return _of_dense(model, base, label, adapter=adapter)
    sibling = open_model(path)
    if sibling.quantization:
        raise InputError(f"{label} is quantized", hint="Give the unquantized checkpoint.")
    if sibling.family.kind == "dense":
        return _of_dense(model, sibling, label)
    if options.sibling_expert is None:
        raise UsageError(
            f"{label} has {sibling.num_experts} experts, of which one becomes the new expert",
            hint="Name it: --sibling-expert N.",
        )
    return Added(sibling, options.sibling_expert, f"{sibling.identity}:{options.sibling_expert}", label)


def _of_dense(model: Model, dense: Model, label: str, *, adapter: Adapter | None = None) -> Added:
    """What the dense model becomes in the family of `model`, made in memory when it is read: two equal experts, since
    some routers need two."""
    from moeconv.upcycle.planner import origins_of, upcycle_plan

    siblings: Sequence[Adapter] = [] if adapter is None else [adapter, adapter]
    paths = tuple(str(place_of(one)) for one in siblings)
    options = UpcycleOptions(experts=2, top_k=2, to=model.family.model_type, experts_from=paths)
    plan = upcycle_plan(dense, options, PlanOptions(), siblings=siblings)
    origins = {"source": dense.checkpoint, **origins_of(siblings)}
    made = planned_model(plan, companions=dense.checkpoint.path, origins=origins)
    sizes = {"intermediate_size", model.family.experts.width, model.family.experts.dense_width}
    identity = dense.identity if adapter is None else adapter.identity
    # only what the dense model states too: the routing is the model's own
    return Added(made, 0, identity, label, frozenset(meaning(dense)) - sizes)


def _base_of(adapter: Path) -> str:
    """The directory of the dense model that an adapter was trained for."""
    name = read_json_object(adapter / CONFIG_NAME, what=CONFIG_NAME).get(_BASE)
    where = Path(str(name))
    for path in (where, adapter / where):
        if (path / "config.json").is_file():
            return str(path)
    raise InputError(
        f"{escape(adapter)}: its base {escape(name)} is not a directory here",
        hint=f"Set {_BASE} in its {CONFIG_NAME} to the directory of the dense base, or merge the adapter first.",
    )
