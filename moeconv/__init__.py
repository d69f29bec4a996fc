"""moeconv: dense checkpoints to Mixture-of-Experts, pruned and quantized, exactly and in constant memory.

The library face, imported lazily: `import moeconv` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FACE = {
    "open": "moeconv.families.model:open_model",
    "plan_upcycle": "moeconv.upcycle.planner:plan_upcycle",
    "plan_prune": "moeconv.prune.planner:plan_prune",
    "plan_quantize": "moeconv.quantize.planner:plan_quantize",
    "plan_overlay": "moeconv.tune.planner:plan_overlay",
    "execute": "moeconv.plan.execute:execute",
    "calibrate": "moeconv.calibrate.run:calibrate",
    "tune": "moeconv.tune.run:tune",
    "evaluate": "moeconv.evaluate.run:evaluate",
    "verify": "moeconv.report.verify:verify",
    "inspect": "moeconv.report.inspect:inspect",
}

__all__ = ["__version__", *sorted(_FACE)]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'moeconv' has no attribute {name!r}")
    module, _, attribute = _FACE[name].partition(":")
    return getattr(import_module(module), attribute)
