"""The options of `moeconv prune`."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option


@dataclass(frozen=True)
class PruneOptions:
    """Options of `moeconv prune` only."""

    keep: int | None = option(None, "Experts to keep in every layer.")
    ratio: float | None = option(None, "Share of the experts to remove, such as 0.5.")
    max_bytes: str | None = option(
        None, "Largest size of the result, such as 20GB; removes as few as fit.", metavar="SIZE"
    )
    width: int | None = option(
        None, "Neurons to keep in every expert (or FFN of a dense model); used alone, it removes no experts."
    )
    width_ratio: float | None = option(
        None, "Share of the neurons to remove from every expert (or FFN of a dense model), such as 0.25."
    )
    shared_width: int | None = option(None, "Neurons to keep in the shared expert; used alone, it removes no experts.")
    mix: str | None = option(
        None, "Divide what --ratio, --max-bytes or --max-loss-increase removes between experts and neurons, as "
        "measured on --data.",
        choices=("auto",),
    )  # fmt: skip
    multiple: int | None = option(
        None, "Make the width that --width-ratio or --mix chooses a multiple of N (default: 64, or less for narrow "
        "experts)."
    )  # fmt: skip
    max_loss_increase: float | None = option(
        None, "Remove as many experts as possible while the loss on --data rises by at most this (nats per token)."
    )
    threshold: float | None = option(
        None, "Remove only experts for which another one is at least this similar, such as 0.8 (redundancy)."
    )
    criterion: str | None = option(
        None, "How the experts to remove are chosen (default: reconstruction with data, aimer without).",
        choices="moeconv.prune.criteria:CRITERIA", aliases="moeconv.prune.criteria:criterion_aliases",
    )  # fmt: skip
    similarity: str = option(
        "output",
        "Measure of the similarity of experts (redundancy, merge).",
        choices=("output", "aligned", "raw", "router"),
    )
    stats: str | None = option(None, "Statistics from `moeconv calibrate`.", reads="file")
    refit: bool = option(
        False, "Refit the down_proj of the kept experts on --data to the output of the unpruned layer."
    )
    refit_strength: float = option(0.3, "Ridge of --refit, in units of the mean squared activation.")
    refit_sweeps: int = option(2, "Passes of --refit over the experts of a layer.")
    heal: int = option(
        0, "Steps of training per layer, after --refit, of the kept experts and the router, to the output of the "
        "unpruned layer on --data, such as 100."
    )  # fmt: skip
    rescale: bool | None = option(
        None, "Fold the least-squares scale into down_proj (default: where the router does not renormalise)."
    )
    sequential: bool = option(
        False, "Choose the experts of each layer with the layers before it already pruned (--data)."
    )
    merge: bool = option(False, "Average each removed expert into the most similar kept one, with aligned neurons.")
    distill: int = option(0, "Steps of router distillation from the unpruned model on --data, such as 100.")
    top_k: int | None = option(None, "Experts per token of the result; this option alone removes no expert.")
    curve: bool = option(
        False, "Print the loss and KL on --data for every ratio, and write no model (OUT: .json, .png, .svg)."
    )
    protect_coverage: float | None = option(
        None, "For each data source, keep the experts that make up this share of its saliency, such as 0.5."
    )
    target: tuple[str, ...] = option(
        (), "Runtime that must run the result: transformers, vllm, sglang or llama.cpp; repeatable.", metavar="RUNTIME"
    )
    protect: str | None = option(
        None, "Experts to keep, as LAYER:EXPERT pairs such as 0:3,5:1 or *:0.", metavar="PAIRS"
    )
