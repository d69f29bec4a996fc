"""The options of `moeconv verify`, `report`, `families` and `formats`, which write no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `moeconv verify` only."""

    source: str | None = option(None, "Compare unchanged tensors with this checkpoint.", reads="model")
    load: bool = option(False, "Also load the model in transformers, strictly, and run it.")


@dataclass(frozen=True)
class ReportOptions:
    """Options of `moeconv report` only."""

    stats: str | None = option(
        None, "Statistics from `moeconv calibrate`, of this model or of one it was made from.", reads="file"
    )
    results: tuple[str, ...] = option((), "JSON that a command printed with --json; repeatable.", reads="file")
    reference: str | None = option(None, "Checkpoint to compare sizes with, such as the dense source.", reads="model")
    title: str | None = option(None, "Title of the page (default: the directory's name).")
    markdown: bool = option(False, "Also write a Markdown summary (.md) beside OUT, for comments on pull requests.")
    samples: bool = option(
        False, "Also show what the model, and before it --reference, write after a few prompts (greedy; each is loaded "
        "whole, and has two minutes)."
    )  # fmt: skip
    prompts: str | None = option(
        None, "Prompts for --samples, one per line of a text file (default: four short ones).", reads="file"
    )
    card: bool = option(
        False, "Also write the task results in --results into MODEL's model card, as the hub's model-index."
    )


@dataclass(frozen=True)
class FamiliesOptions:
    """Options of `moeconv families` only."""

    model: str | None = option(None, "Only the family of this model: a hub name, such as Kimi-K2, or a model_type.")


@dataclass(frozen=True)
class FormatsOptions:
    """Options of `moeconv formats` only."""

    for_: str | None = option(
        None, "List only what loads in this runtime or on this machine, with size, error and command.",
        choices="moeconv.quantize.listing:places",
    )  # fmt: skip
