"""Makes a sub-package callable that has the name of a function: calling it calls the function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType


class _CallablePackage(ModuleType):
    """`moeconv.evaluate` becomes a package when any module in it is imported, but `moeconv.evaluate(...)` must work."""

    def __call__(self, *arguments: object, **parameters: object) -> object:
        function: Callable[..., object] = getattr(import_module("moeconv.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **parameters)


def make_callable(package: str) -> None:
    """Make a package callable. Call this in its `__init__` with `__name__`."""
    sys.modules[package].__class__ = _CallablePackage
