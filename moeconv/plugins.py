"""What packages outside add to moeconv, by entry points: loaded when a command first asks for their kind."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from moeconv.errors import InputError, escape

T = TypeVar("T")


def added(group: str, kind: type[T]) -> tuple[T, ...]:
    """The objects that installed packages register under the entry point `group`, each an instance of `kind`, sorted by
    package and name so that the order does not depend on the installation.

    Raises InputError, which names the package, for one that cannot be imported or is of another kind.
    """
    return tuple(_load(point, kind) for point in _registered(group))


@cache
def _registered(group: str) -> tuple[EntryPoint, ...]:
    # the same package can be found twice, e.g. in a checkout and in site-packages
    found = {(_package(point), point.name): point for point in reversed(list(entry_points(group=group)))}
    return tuple(found[key] for key in sorted(found))


def _load(point: EntryPoint, kind: type[T]) -> T:
    try:
        value = point.load()
    except Exception as error:  # whatever a package of others raises while it is imported
        raise _broken(point, f"cannot be loaded: {type(error).__name__}: {escape(error)}") from error
    if not isinstance(value, kind):
        raise _broken(point, f"is of type {type(value).__name__}, where a {kind.__name__} is expected")
    return value


def _broken(point: EntryPoint, what: str) -> InputError:
    package = _package(point)
    return InputError(
        f"the package {escape(package)} adds {escape(point.value)} to {point.group}, which {what}",
        hint=f"Update it (pip install --upgrade {escape(package)}) or remove it (pip uninstall {escape(package)}).",
    )


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module
