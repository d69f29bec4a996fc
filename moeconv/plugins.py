"""Registries: records of this package by name, and those that other packages add by entry points. The latter are loaded
when a command first needs records of their kind."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from moeconv.errors import InputError, escape

T = TypeVar("T")


def added(group: str, kind: type[T], *, accept: Callable[[T], object] = lambda _thing: None) -> tuple[T, ...]:
    """The objects that installed packages register under the entry point `group`, each an instance of `kind`, sorted by
    package and name so that the order does not depend on the installation. `accept` is called with each, and raises
    ValueError to refuse it.

    Raises InputError, which names the package, for an object that cannot be imported, has another type or is refused.
    """
    return tuple(_load(point, kind, accept) for point in _registered(group))


@cache
def _registered(group: str) -> tuple[EntryPoint, ...]:
    # the same package can be found twice, e.g. in a checkout and in site-packages
    found = {(_package(point), point.name): point for point in reversed(list(entry_points(group=group)))}
    return tuple(found[key] for key in sorted(found))


def _load(point: EntryPoint, kind: type[T], accept: Callable[[T], object]) -> T:
    try:
        value = point.load()
    except (Exception, SystemExit) as error:  # a foreign package may raise anything while it is imported
        raise _broken(point, f"cannot be loaded: {type(error).__name__}: {escape(error)}") from error
    if not isinstance(value, kind):
        raise _broken(point, f"is of type {type(value).__name__}, where a {kind.__name__} is expected")
    try:
        accept(value)
    except ValueError as error:
        raise _broken(point, f"is refused: {escape(error)}") from error
    return value


def _broken(point: EntryPoint, what: str) -> InputError:
    package = _package(point)
    return InputError(
        f"the package {escape(package)} adds {escape(point.value)} to {point.group}, which {what}",
        hint=f"Update it (pip install --upgrade {escape(package)}) or remove it (pip uninstall {escape(package)}).",
    )


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


class Named(Protocol):
    """A record of a registry."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Named)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Registry(Mapping[str, R], Generic[R]):
    """Records of one kind by name, in the order in which they were added; those of the entry point `group` come last.

    Packages are loaded when the registry is first read, and not when it is made, because they import the modules that
    they extend. Reading raises InputError for a package that is broken, or that adds a name which is taken.
    """

    def __init__(self, kind: type[R], group: str, own: Iterable[R] = ()) -> None:
        self._kind, self._group = kind, group
        self._records: dict[str, R] = {}
        self._complete, self._lock = False, threading.RLock()
        for record in own:
            self.add(record)

    def add(self, record: R) -> R:
        """Add a record and return it. Raises ValueError for an invalid name, or for one that another record has."""
        if not isinstance(record.name, str) or not _NAME.fullmatch(record.name):
            raise ValueError(f"{record.name!r} is not a name")
        if self._records.setdefault(record.name, record) is not record:
            raise ValueError(f"the name {record.name} is taken")
        return record

    def __getitem__(self, name: str) -> R:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, R]:
        with self._lock:
            if not self._complete:
                self._complete = True  # first: a package that is loaded may read the registry
                try:
                    added(self._group, self._kind, accept=self.add)
                except BaseException:
                    self._complete = False
                    raise
        return self._records
