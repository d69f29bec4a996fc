"""The options of `moeconv tune`."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option
from moeconv.options.defaults import LOOKS


@dataclass(frozen=True)
class TuneOptions:
    """Options of `moeconv tune` only."""

    objective: str = option("layerwise", "What the training minimises.", choices=("layerwise", "distill", "lm"))
    teacher: str | None = option(
        None, "The dense source, or the model before it was edited (required by layerwise and distill).", reads="model"
    )
    train: str = option(
        "router",
        "Parts to train, separated by commas: router, experts, shared, ffn (of dense layers), norms.",
        metavar="PARTS",
    )
    steps: int = option(100, "Optimiser steps (per layer with layerwise).")
    learning_rate: float | None = option(
        None, "Peak learning rate of everything that trains (default: by width, objective and --train)."
    )
    schedule: str = option(
        "cosine", "The learning rate after the warmup: falling to a tenth of the peak, or constant.",
        choices=("cosine", "linear", "constant"),
    )  # fmt: skip
    warmup: float = option(0.1, "Share of the steps in which the rate rises to its peak.")
    look_every: int | None = option(
        None,
        "Steps between evaluations on the held-out tenth of the data; the best is kept "
        f"(default: {LOOKS} evaluations).",
    )
    patience: int | None = option(
        None, "Stop early after this many evaluations without improvement (default: all steps)."
    )
    balance: float = option(0.01, "Weight of the load-balance loss, taken per layer.")
    bias_update: float = option(
        0.0, "Move the router's correction bias by this much after each step, towards an even load, in families that "
        "have one; 0.001 is usual (default: off)."
    )  # fmt: skip
    z_loss: float = option(0.0, "Weight of the router z-loss.")
    router_noise: float = option(0.0, "While training: standard deviation of noise on the router's logits.")
    temperature: float = option(1.0, "While training: divisor of the router's logits.")
    capacity_factor: float | None = option(
        None, "While training: an expert takes at most ceil(F * tokens * top-k / experts) tokens of a batch, those "
        "with the largest weights (default: no limit)."
    )  # fmt: skip
    straight_through: bool | None = option(
        None, "Router gradient through all experts, DenseMixer (default: unless experts train too, and where the one "
        "weight of a token is always 1)."
    )  # fmt: skip
    balance_only: bool = option(False, "Train on the balance loss alone, also where experts are identical.")
