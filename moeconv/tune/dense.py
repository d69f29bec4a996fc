"""What of `tune` a dense student takes: its FFNs and norms train through the whole model. Imports no torch."""

from __future__ import annotations

from moeconv.errors import InputError, UsageError
from moeconv.families.model import Model
from moeconv.options import TuneOptions, flag_of

_OF_ROUTERS = ("bias_update", "z_loss", "router_noise", "temperature", "capacity_factor", "straight_through")


def check_dense(model: Model, options: TuneOptions, train: tuple[str, ...], objective: str) -> None:
    """Raises InputError for parts that a dense model does not have, UsageError for an objective or an option that only
    concerns routers. The weight of the load-balance loss has no effect."""
    missing = [word for word in train if word not in ("ffn", "norms")]
    if missing:
        raise InputError(
            f"{model.family.model_type} is dense: it has no {missing[0]} to tune",
            hint="Pass --train ffn to train its FFNs, or first make it a Mixture-of-Experts with `moeconv upcycle`.",
        )
    if objective not in ("distill", "lm"):
        raise UsageError(
            f"--objective {objective} trains Mixtures-of-Experts, and {model.family.model_type} is dense",
            hint="Pass --objective distill with the --teacher, or --objective lm.",
        )
    defaults = TuneOptions()
    for name in _OF_ROUTERS:
        if getattr(options, name) != getattr(defaults, name):
            raise UsageError(
                f"{flag_of(name)} concerns routers, and {model.family.model_type} is dense",
                hint=f"Leave out {flag_of(name)}.",
            )
