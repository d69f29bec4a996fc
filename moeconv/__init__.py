"""moeconv: dense checkpoints to Mixture-of-Experts, pruned and quantized, exactly and in constant memory.

`moeconv.api` is the Python interface; its functions are also names of this package. `import moeconv` loads neither
torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeconv.api import arrange as arrange
    from moeconv.api import calibrate as calibrate
    from moeconv.api import collapse as collapse
    from moeconv.api import evaluate as evaluate
    from moeconv.api import execute as execute
    from moeconv.api import follow_links as follow_links
    from moeconv.api import import_gguf as import_gguf
    from moeconv.api import inspect as inspect
    from moeconv.api import open_model as open  # noqa: F401
    from moeconv.api import plan_overlay as plan_overlay
    from moeconv.api import plan_prune as plan_prune
    from moeconv.api import plan_quantize as plan_quantize
    from moeconv.api import plan_upcycle as plan_upcycle
    from moeconv.api import prune as prune
    from moeconv.api import quantize as quantize
    from moeconv.api import report as report
    from moeconv.api import run as run
    from moeconv.api import tune as tune
    from moeconv.api import upcycle as upcycle
    from moeconv.api import verify as verify

__version__ = "0.1.0"

# These names belong to functions and to sub-packages. The packages can be called, so it makes no difference which of
# the two was imported first (see callable_package.py).
_PACKAGES = ("calibrate", "evaluate", "inspect", "prune", "quantize", "report", "tune", "upcycle", "verify")
_FUNCTIONS = (
    "arrange",
    "collapse",
    "execute",
    "follow_links",
    "import_gguf",
    "plan_overlay",
    "plan_prune",
    "plan_quantize",
    "plan_upcycle",
    "run",
)

__all__ = ["__version__", "api", *_PACKAGES, *_FUNCTIONS]


def __getattr__(name: str) -> object:
    if name in ("api", *_PACKAGES):
        return import_module(f"moeconv.{name}")
    if name == "open":  # not in __all__: `import *` must leave the built-in alone
        name = "open_model"
    elif name not in _FUNCTIONS:
        raise AttributeError(f"module 'moeconv' has no attribute {name!r}")
    return getattr(import_module("moeconv.api"), name)
