"""A sub-package that has the name of a function can be called as that function."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """`moeconv.evaluate` is a package as soon as anything of it is imported, and `moeconv.evaluate(...)` must work."""

    def __call__(self, *arguments: Any, **parameters: Any) -> Any:
        function = getattr(import_module("moeconv.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **parameters)


def make_callable(package: str) -> None:
    """Make a package callable: to be called with `__name__` in its `__init__`."""
    sys.modules[package].__class__ = _CallablePackage
