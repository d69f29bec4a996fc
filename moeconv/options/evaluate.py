"""The options of `moeconv evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `moeconv evaluate` only."""

    reference: str | None = option(None, "Model to compare with: KL, agreement, loss increase.", reads="model")
    max_loss_increase: float | None = option(None, "Gate: loss at most this much above the reference (nats per token).")
    max_kl: float | None = option(None, "Gate: KL(reference || model) at most this (nats per token).")
    min_agreement: float | None = option(None, "Gate: share of tokens with the reference's top-1 at least this.")


@dataclass(frozen=True)
class SampleOptions:
    """How a sample of the data is drawn."""

    seed: int = option(0, "Seed of the sample when --tokens is given.")
