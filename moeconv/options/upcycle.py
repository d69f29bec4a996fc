"""The options of `moeconv upcycle`."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option
from moeconv.options.defaults import EXPERTS, TOP_K


@dataclass(frozen=True)
class UpcycleOptions:
    """Options of `moeconv upcycle` only."""

    experts: int | None = option(
        None, f"Experts per layer (default: {EXPERTS}; with --experts-from one per sibling; of an MoE source twice its "
        "own)."
    )  # fmt: skip
    top_k: int | None = option(
        None, f"Experts per token (default: {TOP_K}, or all pieces of one copy of the FFN; of an MoE source its own, "
        "times the copies)."
    )  # fmt: skip
    keep_top_k: bool = option(False, "Of an MoE source: keep its top-k, and let copies of its experts compete for it.")
    copy_scale: float | None = option(
        None, "keep-top-k: how far the logit of a copy is above the mean logit, as a share of its original's (default: "
        "0.5; 1 for top-1)."
    )  # fmt: skip
    method: str = option(
        "copy",
        "How experts are made from the FFN.",
        choices="moeconv.upcycle.methods:METHODS",
    )
    experts_from: tuple[str, ...] = option(
        (), "A sibling of SOURCE, or a LoRA adapter for it, whose FFNs become the next expert; repeatable, in order of "
        "the experts.", reads="model",
    )  # fmt: skip
    add_experts_from: tuple[str, ...] = option(
        (), "Of an MoE source: a fine-tuned copy of its dense base, a LoRA adapter for that, or a checkpoint of the "
        "same MoE, of which one expert is added; repeatable, one --data per expert.", reads="model",
    )  # fmt: skip
    sibling_expert: int | None = option(
        None, "The expert of a Mixture-of-Experts in --add-experts-from that is added.", metavar="N"
    )
    ffn_only: bool = option(
        False, "Take only the FFNs of LoRA adapters in --experts-from or --add-experts-from that also change other "
        "modules."
    )  # fmt: skip
    to: str | None = option(
        None, "Target family (default: the one that most runtimes serve).",
        aliases="moeconv.families.pairs:target_aliases", metavar="FAMILY",
    )  # fmt: skip
    text_only: bool = option(
        False, "Of a multimodal SOURCE, write the language model alone, without the tensors of images or sound."
    )
    layers: str = option(
        "all",
        "Layers to convert: all, or numbers and ranges such as 0,2,8-15; split: auto:N for the N layers that it costs "
        "least.",
        metavar="LIST",
    )
    granularity: int | None = option(
        None,
        "Pieces into which each copy of the FFN is cut, one expert per piece (default: 1; granular and shuffle: 2).",
    )
    shared_experts: str | None = option(
        None, "Part of the FFN that an always-on expert holds: full (all of it; routed experts then start by adding "
        "nothing), a share of its neurons such as 0.25, or a number of --granularity pieces (default: none).",
        metavar="PART",
    )  # fmt: skip
    router: str = option(
        "random", "Rows of the router: random; hidden (the mean of the router's inputs, one --data per "
        "expert); centroid (balanced clusters of its inputs).", choices=("random", "hidden", "centroid"),
    )  # fmt: skip
    router_std: float = option(0.02, "Standard deviation of the router's random rows.")
    drop_ratio: float = option(0.5, "drop and shuffle: share of an expert's neurons that are redrawn.")
    noise_scale: float = option(0.05, "noise: standard deviation, in units of the matrix's own.")
    noise_fraction: float = option(0.5, "noise: share of an expert's neurons that get noise.")
    clustering: str = option(
        "refined", "split: how neurons are grouped.", choices=("refined", "magnitude", "binary", "random")
    )
    stats: str | None = option(
        None,
        "split: neuron statistics of the dense model from `moeconv calibrate`; keep-top-k: statistics of the MoE.",
        reads="file",
    )
