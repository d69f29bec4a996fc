"""Families whose class is code in their checkpoints, which moeconv never runs: what runs in its place, if anything."""

from __future__ import annotations

from moeconv.errors import Unsupported
from moeconv.families.spec import Family
from moeconv.types import Config, JsonObject


def stock_config(family: Family, config: Config) -> Config:
    """The config.json with which a class of transformers computes what the family computes: for a family that has a
    class itself, the same one.

    Raises Unsupported for a family whose computation no class of transformers has.
    """
    if family.runs_as is not None:
        raise Unsupported(
            f"{family.model_type} cannot be run: its class is code in the checkpoint, which moeconv never runs",
            hint="`moeconv upcycle` writes it as a stock family, which can be run. Methods that measure nothing need "
            "no run of the source.",
        )
    if family.remote is None:
        return config
    if not family.remote.like:
        raise Unsupported(
            f"{family.model_type} cannot be run: its class is code in the checkpoint, which moeconv never runs, and no "
            "class of transformers computes the same",
            hint="inspect, verify, prune by a criterion that needs no data (--criterion random or magnitude), and "
            "quantize --method rtn or mse need no run.",
        )
    stated: JsonObject = {
        key: family.config.value(key, config)
        for key in family.config.defaults
        if key not in config and family.config.value(key, config) is not None
    }
    return {**stated, **{key: value for key, value in config.items() if key != "auto_map"},
            "model_type": family.remote.like}  # fmt: skip
