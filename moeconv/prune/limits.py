"""The checks of a prune before anything is measured: budgets, options that contradict, router groups, top-k."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.families.neurons import Narrow
from moeconv.families.served import check_served
from moeconv.options import PlanOptions, PruneOptions, flag_of, parse_index, parse_size
from moeconv.plan.arrange import arrange
from moeconv.plan.build import parse_dtype
from moeconv.prune.cutting import pruned_items
from moeconv.prune.named_modules import check_renumbering
from moeconv.prune.width import asks_width, check_dense, check_width, chosen_width
from moeconv.units import counted

BUDGETS = ("keep", "ratio", "max_bytes", "threshold", "max_loss_increase")


def check_prune(model: Model, options: PruneOptions, common: PlanOptions) -> int | None:
    """Check everything that can be checked before anything is measured. Returns the number of experts left per layer,
    or None where measurements decide it (--threshold, --max-loss-increase, --mix).

    Raises UsageError for options that cannot be used, InputError for a model that cannot be pruned so."""
    dense = model.family.kind != "moe"
    if dense:
        check_dense(model, options)
    _check_quantized(model, options, common)
    if options.distill and model.family.multimodal.beside:
        raise InputError(
            f"--distill trains only the language model, and {model.family.model_type} is multimodal",
            hint="Leave out --distill. --refit needs no training.",
        )
    if not model.moe_layers and not dense:
        raise InputError(
            "according to config.json, no layer of this model is a Mixture-of-Experts",
            hint="There is nothing to prune.",
        )
    check_served(model.family.model_type, options.target)
    protected = parse_protect(options.protect, model)
    check_width(model, options)
    left = budget(model, options, common)
    _check_numbers(options)
    _check_together(options)
    if left == model.num_experts:
        _check_removes_none(options)
    _check_top_k(model, options, left)
    alone = options.top_k is not None or asks_width(options)
    if left is not None and not (alone and left == model.num_experts):
        check_feasible(model, left, protected, options.top_k or model.top_k)
    return left


def budget(model: Model, options: PruneOptions, common: PlanOptions) -> int | None:
    """The number of experts left in every layer, from exactly one of --keep, --ratio, --max-bytes, --threshold and
    --max-loss-increase. It is None for the last two and with --mix, and all experts for --top-k or --width alone.
    Raises UsageError."""
    given = [f for f in BUDGETS if getattr(options, f) is not None]
    width = chosen_width(model, options, common)
    if (options.top_k is not None or width is not None) and not given:
        return model.num_experts
    if len(given) != 1:
        raise UsageError(
            "give exactly one of --keep, --ratio, --max-bytes, --threshold and --max-loss-increase"
            + (f", not {len(given)}" if given else ""),
            hint="For half of the experts: --ratio 0.5.",
        )
    experts = model.num_experts
    if options.ratio is not None and not 0 < options.ratio < 1:
        raise UsageError(f"--ratio {options.ratio} must lie between 0 and 1", hint="For half: --ratio 0.5.")
    if options.mix is not None or given[0] in ("threshold", "max_loss_increase"):
        return None
    if options.keep is not None:
        return options.keep
    if options.ratio is not None:
        removed = round(options.ratio * experts)
        if removed == 0:
            raise UsageError(
                f"--ratio {options.ratio} of {experts} experts rounds to 0 experts",
                hint=f"The smallest ratio is {1 / experts:.3f}.",
            )
        return experts - removed
    limit = parse_size(str(options.max_bytes), flag="--max-bytes")
    for left in range(experts - 1, 0, -1):
        neurons, shared = (None, None) if width is None else (width.after, width.shared)
        if planned_bytes(model, common, left, neurons, shared=shared) <= limit:
            return left
    raise UsageError(
        f"--max-bytes {escape(options.max_bytes)} is too small even for one expert per layer",
        hint="Allow more bytes, or quantize the model too.",
    )


def planned_bytes(
    model: Model, common: PlanOptions, left: int, width: int | None, *, shared: int | None = None
) -> int:  # fmt: skip
    """The bytes of the model with `left` experts per layer, the largest ones, of `width` neurons (None: all), and a
    shared expert of `shared` neurons (None: as `width` has it)."""
    keep = {layer: sorted(order[:left]) for layer, order in _largest_first(model).items()}
    narrow = None if width is None else Narrow(model, width, shared)
    items = pruned_items(model, keep, parse_dtype(common.dtype), narrow=narrow)
    return sum(shard.nbytes for shard in arrange(items, common, model.family))


def feasible(model: Model, left: int, options: PruneOptions) -> bool:
    """Whether the router works with `left` experts."""
    try:
        check_feasible(model, left, parse_protect(options.protect, model), options.top_k or model.top_k)
    except UsageError:
        return False
    return True


def _largest_first(model: Model) -> dict[int, list[int]]:
    """{layer: its experts, the largest first}. A checkpoint of mixed precision stores some experts in more bits, and
    the budget must hold whichever of them are kept."""
    sizes = {layer: [0] * model.num_experts for layer in model.moe_layers}
    for name, role in model.roles.items():
        if role.expert is not None and role.layer in sizes:
            sizes[role.layer][role.expert] += model.checkpoint.tensors[name].nbytes
    return {layer: sorted(range(len(each)), key=lambda e: -each[e]) for layer, each in sizes.items()}


def _check_quantized(model: Model, options: PruneOptions, common: PlanOptions) -> None:
    """A quantized source is sliced as it is stored: its tensors cannot be cast or changed, and the experts that its
    config names must be renumbered."""
    if model.quantization is None:
        return
    if common.dtype:
        raise UsageError(
            "--dtype cannot cast a quantized source",
            hint="Leave out --dtype: codes and scales stay as they are stored.",
        )
    for name in ("refit", "heal", "merge", "rescale", "distill"):
        if getattr(options, name):
            raise UsageError(
                f"{flag_of(name)} changes weights, and the weights of this source are quantized",
                hint=f"Leave out {flag_of(name)}, or prune the unquantized checkpoint and quantize the result.",
            )
    check_renumbering(model, model.quantization)


def _check_numbers(options: PruneOptions) -> None:
    """Raises UsageError for a number outside its range."""
    for name in ("threshold", "protect_coverage"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= 1:
            raise UsageError(f"{flag_of(name)} {value} must lie between 0 and 1", hint=f"Example: {flag_of(name)} 0.8.")
    gate = options.max_loss_increase
    if gate is not None and not (math.isfinite(gate) and gate >= 0):
        raise UsageError(f"--max-loss-increase {gate}: expected a number of nats per token, at least 0")
    if not (math.isfinite(options.refit_strength) and options.refit_strength > 0):
        raise UsageError(
            f"--refit-strength {options.refit_strength}: expected a number above 0",
            hint="Values between 0.1 and 1 are usual.",
        )
    if not 1 <= options.refit_sweeps <= 100:
        raise UsageError(f"--refit-sweeps {options.refit_sweeps}: expected 1 to 100")
    if options.heal < 0:
        raise UsageError(f"--heal {options.heal}: expected a number of steps", hint="100 is usual.")
    if options.distill < 0:
        raise UsageError(f"--distill {options.distill}: expected a number of steps, at least 0")


def _check_together(options: PruneOptions) -> None:
    """Raises UsageError for options that do not go together."""
    for one, other in (("merge", "refit"), ("merge", "heal"), ("merge", "sequential")):
        if getattr(options, one) and getattr(options, other):
            raise UsageError(f"{flag_of(one)} and {flag_of(other)} exclude each other", hint="Pass one of them.")
    for name in ("refit", "heal", "merge"):  # these repairs already adapt the scale of the experts
        if options.rescale and getattr(options, name):
            raise UsageError(f"--rescale and {flag_of(name)} exclude each other", hint="Pass one of them.")
    for name in ("refit_strength", "refit_sweeps"):
        if getattr(options, name) != getattr(PruneOptions(), name) and not options.refit:
            raise UsageError(f"{flag_of(name)} goes with --refit", hint="Add --refit and --data FILE.")
    if options.sequential and (options.threshold is not None or options.max_loss_increase is not None):
        raise UsageError(
            "--sequential needs to know how many experts are kept before it starts", hint="Pass --ratio or --keep."
        )


def _check_removes_none(options: PruneOptions) -> None:
    """Raises UsageError for options that choose experts to remove, where --top-k or --width alone removes none."""
    asked = [n for n in ("top_k", "width", "width_ratio", "shared_width") if getattr(options, n) is not None]
    for name in ("merge", "sequential", "protect_coverage", "protect", "rescale"):
        if asked and getattr(options, name):
            raise UsageError(
                f"{flag_of(name)} is about which experts are kept, and {flag_of(asked[0])} alone removes none",
                hint=f"Leave out {flag_of(name)}, or also pass --ratio or --keep.",
            )


def _check_top_k(model: Model, options: PruneOptions, left: int | None) -> None:
    """Raises UsageError for a --top-k that the model cannot have, or that changes nothing."""
    if options.top_k is None:
        return
    limit = model.num_experts if left is None else left
    if not 1 <= options.top_k <= limit:
        raise UsageError(f"--top-k {options.top_k}: expected 1 to {limit}, the experts of a layer")
    if left == model.num_experts and options.top_k == model.top_k:
        raise UsageError(
            f"--top-k {options.top_k} is the value that the model has",
            hint="Pass another number: this one would change nothing.",
        )
    routing = model.family.experts.routing
    if routing is not None and routing.top_k is not None and options.top_k != routing.top_k:
        raise UsageError(
            f"--top-k {options.top_k}: {model.family.model_type} routes to exactly {counted(routing.top_k, 'expert')}"
        )


def parse_protect(text: str | None, model: Model) -> dict[int, frozenset[int]]:
    """{layer: protected experts} of a value of --protect such as `0:3,5:1,*:0`. Raises UsageError for any other
    form."""
    protected: dict[int, set[int]] = {layer: set() for layer in model.moe_layers}
    for word in text.split(",") if text else ():
        first, _, second = word.strip().partition(":")
        layer, expert = parse_index(first), parse_index(second)
        layers = model.moe_layers if first == "*" else (layer,) if layer in protected else ()
        if not layers or expert is None:
            raise UsageError(
                f"--protect {escape(word)!r}: this is not LAYER:EXPERT of this model", hint="Example: 0:3,*:0."
            )
        if expert >= model.num_experts:
            raise UsageError(f"--protect {escape(word)!r}: the model has experts 0 to {model.num_experts - 1}")
        for at in layers:
            protected[at].add(expert)
    return {layer: frozenset(chosen) for layer, chosen in protected.items()}


def check_feasible(model: Model, left: int, protected: Mapping[int, frozenset[int]], top_k: int) -> None:
    """Raises UsageError if a layer cannot keep `left` experts: the router needs more, or more are protected."""
    if not 1 <= left < model.num_experts:
        raise UsageError(
            f"a prune cannot keep {left} of {model.num_experts} experts",
            hint=f"Keep {top_k} to {model.num_experts - 1} experts.",
        )
    if left < top_k:
        raise UsageError(
            f"{counted(left, 'expert is', 'experts are')} fewer than the {top_k} that every token is routed to",
            hint=f"Keep at least {top_k}: with fewer the model loads and fails at its first token.",
        )
    groups, used = model.groups
    if left % groups:
        raise UsageError(
            f"{counted(left, 'expert does', 'experts do')} not form {groups} groups of equal size, "
            "and this router chooses among such groups",
            hint=f"Keep a multiple of {groups}.",
        )
    rule = model.family.experts.routing
    least = 1 if rule is None else rule.best_of_group if groups > 1 else rule.least
    if left // groups < least:
        raise UsageError(
            f"{counted(left, 'expert leaves', 'experts leave')} {left // groups} in each of "
            f"{counted(groups, 'group')}, "
            "and this router ranks groups by "
            f"their best {least}",
            hint=f"Keep at least {least * groups}.",
        )
    if used * (left // groups) < top_k:
        raise UsageError(
            f"a token is routed to {top_k} experts in {used} of {groups} groups, and "
            f"{counted(left, 'expert leaves', 'experts leave')} only "
            f"{used * (left // groups)} in so many groups",
            hint=f"Keep at least {groups * -(-top_k // used)}.",
        )
    size = model.num_experts // groups
    for layer, chosen in protected.items():
        for group in range(groups):
            here = sum(group * size <= expert < (group + 1) * size for expert in chosen)
            if here > left // groups:
                where = f"layer {layer}" + (f", group {group}" if groups > 1 else "")
                raise UsageError(
                    f"--protect names {counted(here, 'expert')} of {where}, and only {left // groups} are kept there",
                    hint="Protect fewer experts, or keep more.",
                )
