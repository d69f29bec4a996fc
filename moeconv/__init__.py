"""moeconv: dense checkpoints to Mixture-of-Experts, pruned and quantized, exactly and in constant memory.

`moeconv.api` is the Python interface; its functions are also names of this package. `import moeconv` loads neither
torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# These names belong to functions and to sub-packages. The packages can be called, so it makes no difference which of
# the two was imported first (see callable_package.py).
_PACKAGES = ("calibrate", "evaluate", "tune")
_FUNCTIONS = (
    "execute",
    "follow_links",
    "inspect",
    "plan_overlay",
    "plan_prune",
    "plan_quantize",
    "plan_upcycle",
    "verify",
)

__all__ = ["__version__", "api", *_PACKAGES, *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name in ("api", *_PACKAGES):
        return import_module(f"moeconv.{name}")
    if name == "open":  # not in __all__: `import *` must leave the built-in alone
        name = "open_model"
    elif name not in _FUNCTIONS:
        raise AttributeError(f"module 'moeconv' has no attribute {name!r}")
    return getattr(import_module("moeconv.api"), name)
