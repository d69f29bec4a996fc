"""`--method split`: what the options mean for an FFN that is cut into shared and routed experts by measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.families.pairs import find_conversion
from moeconv.options import UpcycleOptions, parse_index, parse_layers
from moeconv.plan.partition import ROUTER_SCALE, Partition
from moeconv.types import JsonObject
from moeconv.upcycle.cut import counts, cut_ffn
from moeconv.upcycle.limits import check_numbers

MEASURE = "Run without --dry-run, with --data FILE or with --stats from `moeconv calibrate {source} STATS --data FILE`."


@dataclass(frozen=True, slots=True)
class SplitShape:
    """The sizes that do not depend on data. `varied`: the target's router has a correction bias, so that each layer can
    have its own number of experts that are always on. `best`: the number of layers that are converted, those with the
    smallest error; None for all of `layers`."""

    experts: int
    top_k: int
    shared: int  # neurons
    width: int  # neurons of a routed expert
    layers: tuple[int, ...]
    best: int | None
    varied: bool


def split_options(model: Model, options: UpcycleOptions) -> UpcycleOptions:
    """The options with the numbers of shared experts and of pieces filled in: E routed experts and a shared expert as
    wide as S of them are E + S pieces of one FFN. By default, S is 1 where a target with a shared expert exists and
    E + 1 divides the FFN, and otherwise 0.

    Raises UsageError for an option that split does not use.
    """
    if options.granularity is not None:
        raise UsageError(
            "--method split does not use --granularity: it cuts the FFN into as many equal pieces as --experts and "
            "--shared-experts are together",
            hint="Leave --granularity out.",
        )
    shared = options.shared_experts
    if shared is None:
        _, target = find_conversion(model.family, options.to, shared=True, text_only=options.text_only)
        even = model.ffn_width % (counts(options)[0] + 1) == 0
        shared = "1" if target.experts.shared_width and even else "none"
    held = 0 if shared in ("none", "0") else parse_index(shared)
    if held is None:
        raise UsageError(
            f"--shared-experts {escape(shared)}: --method split needs a number of experts that are always on",
            hint="Example: with --experts 7 --shared-experts 1 --top-k 3, half of the FFN is active.",
        )
    experts, top_k = counts(options)
    return replace(
        options, experts=experts, top_k=top_k, shared_experts=str(held) if held else None, granularity=experts + held
    )


def split_shape(model: Model, options: UpcycleOptions) -> SplitShape:
    """The sizes for these options, which `split_options` has filled in. Raises UsageError for numbers out of their
    range, InputError where data would choose layers that the target cannot leave dense."""
    shared = options.shared_experts is not None
    _, target = find_conversion(model.family, options.to, shared=shared, text_only=options.text_only)
    cut = cut_ffn(model.ffn_width, granularity=options.granularity or 1, shared=options.shared_experts)
    experts, top_k = counts(options)
    check_numbers(options, target, replace(cut, experts=experts, top_k=top_k))  # before anything is measured
    best = auto_layers(options.layers, layers=model.num_layers)
    if best is not None and target.experts.placement.can != "any layer" and best < model.num_layers:
        raise InputError(
            f"--layers {escape(options.layers)}: data chooses the layers, and {target.model_type} cannot leave each of "
            "them dense",
            hint="Choose a target that can (--to qwen2_moe for llama), or give the numbers of the layers.",
        )
    text = "all" if best is not None else options.layers
    layers = model.with_ffn(parse_layers(text, layers=model.num_layers), every=text == "all")
    varied = any(key.startswith("router.correction") for key in target.tensors.names)
    return SplitShape(experts, top_k, cut.shared, cut.width, layers, best, varied)


def auto_layers(text: str, *, layers: int) -> int | None:
    """N of `auto:N`; None for any other word. Raises UsageError for a number that is not from 1 to `layers`."""
    word, colon, number = text.strip().partition(":")
    if word != "auto" or not colon:
        return None
    count = parse_index(number)
    if count is None or not 1 <= count <= layers:
        raise UsageError(f"--layers {escape(text)}: auto needs a number from 1 to the model's {layers} layers")
    return count


def split_layers(model: Model, options: UpcycleOptions, partition: Partition | None) -> tuple[int, ...]:
    """The layers that are converted. Raises UsageError where a measurement chooses them and was not made yet."""
    if auto_layers(options.layers, layers=model.num_layers) is None:
        return model.with_ffn(parse_layers(options.layers, layers=model.num_layers), every=options.layers == "all")
    if partition is None:
        raise UsageError(
            f"--layers {escape(options.layers)}: data chooses the layers, so that the sizes are not known yet",
            hint=MEASURE.format(source="SOURCE"),
        )
    return partition.layers


def check_partition(model: Model, options: UpcycleOptions, partition: Partition, shape: SplitShape) -> None:
    """Raises InputError unless the partition was measured on this model for these options."""
    experts, top_k = counts(options)
    partition.check(identity=model.identity, experts=experts, top_k=top_k, width=shape.width, shared=shape.shared)
    missing = set(split_layers(model, options, partition)) - set(partition.layers)
    if missing:
        raise InputError(f"the partition does not hold layer {min(missing)}", hint="Measure again.")


def split_parameters(partition: Partition | None) -> dict[str, object]:
    """The parameters by which the plan's id and the manifest depend on the measurement, and the factor of the router
    rows, which `moeconv tune` divides out again."""
    made: JsonObject = partition.metadata if partition else {}
    known = ("clustering", "tokens", "sample_tokens", "seq_len", "sources", "stats_of_twin")
    return {
        "stats": None,
        "partition": partition.fingerprint if partition else None,
        "measured": {key: made[key] for key in known if key in made},
        "router_scale": ROUTER_SCALE,
    }


def split_block(partition: Partition | None, shape: SplitShape) -> dict[str, object]:
    """The part of the JSON for this method: the share of neurons that are active, and what was measured per layer."""
    active = shape.shared + shape.top_k * shape.width
    block: dict[str, object] = {"active_share": round(active / (shape.shared + shape.experts * shape.width), 6)}
    if partition is not None:
        block["layers"] = [dict(row) for row in partition.metadata["layers"]]
        if "stats_of_twin" in partition.metadata:
            block["stats_of_twin"] = partition.metadata["stats_of_twin"]
    block["compensation"] = "none: what is not chosen counts as zero (compensated_error: with its mean added)"
    return block
