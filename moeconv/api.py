"""The Python interface: the functions that a program calls, each loaded on first use.

`import moeconv.api` loads neither torch nor transformers. The functions are named after the commands, and their
parameters after the flags.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeconv.calibrate.run import calibrate as calibrate
    from moeconv.checkpoint.paths import follow_links as follow_links
    from moeconv.evaluate.run import evaluate as evaluate
    from moeconv.families.model import open_model as open_model
    from moeconv.inspect.run import inspect as inspect
    from moeconv.plan.execute import execute as execute
    from moeconv.prune.planner import plan_prune as plan_prune
    from moeconv.quantize.planner import plan_quantize as plan_quantize
    from moeconv.tune.planner import plan_overlay as plan_overlay
    from moeconv.tune.run import tune as tune
    from moeconv.upcycle.planner import plan_upcycle as plan_upcycle
    from moeconv.verify.run import verify as verify

_HOMES = {
    "calibrate": "moeconv.calibrate.run",
    "evaluate": "moeconv.evaluate.run",
    "execute": "moeconv.plan.execute",
    "follow_links": "moeconv.checkpoint.paths",
    "inspect": "moeconv.inspect.run",
    "open_model": "moeconv.families.model",
    "plan_overlay": "moeconv.tune.planner",
    "plan_prune": "moeconv.prune.planner",
    "plan_quantize": "moeconv.quantize.planner",
    "plan_upcycle": "moeconv.upcycle.planner",
    "tune": "moeconv.tune.run",
    "verify": "moeconv.verify.run",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
