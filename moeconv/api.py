"""The Python interface: one function per command, and the functions that they are made of, each loaded on first use.

`import moeconv.api` loads neither torch nor transformers. The functions are named after the commands, and their
parameters after the options.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeconv.checkpoint.paths import follow_links as follow_links
    from moeconv.families.model import open_model as open_model
    from moeconv.plan.execute import execute as execute
    from moeconv.prune.planner import plan_prune as plan_prune
    from moeconv.quantize.planner import plan_quantize as plan_quantize
    from moeconv.tune.planner import plan_overlay as plan_overlay
    from moeconv.upcycle.planner import plan_upcycle as plan_upcycle
    from moeconv.verbs import arrange as arrange
    from moeconv.verbs import calibrate as calibrate
    from moeconv.verbs import collapse as collapse
    from moeconv.verbs import evaluate as evaluate
    from moeconv.verbs import import_gguf as import_gguf
    from moeconv.verbs import inspect as inspect
    from moeconv.verbs import prune as prune
    from moeconv.verbs import quantize as quantize
    from moeconv.verbs import report as report
    from moeconv.verbs import run as run
    from moeconv.verbs import tune as tune
    from moeconv.verbs import upcycle as upcycle
    from moeconv.verbs import verify as verify

_VERBS = (
    "inspect", "upcycle", "calibrate", "tune", "prune", "quantize", "import_gguf", "arrange", "collapse", "evaluate",
    "verify", "report", "run",
)  # fmt: skip
_HOMES = dict.fromkeys(_VERBS, "moeconv.verbs") | {
    "execute": "moeconv.plan.execute",
    "follow_links": "moeconv.checkpoint.paths",
    "open_model": "moeconv.families.model",
    "plan_overlay": "moeconv.tune.planner",
    "plan_prune": "moeconv.prune.planner",
    "plan_quantize": "moeconv.quantize.planner",
    "plan_upcycle": "moeconv.upcycle.planner",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
