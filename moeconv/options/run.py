"""The options of `moeconv run` and `moeconv demo`."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option


@dataclass(frozen=True)
class RunOptions:
    """Options of `moeconv run` only."""

    set: tuple[str, ...] = option((), "Set a variable of the recipe: KEY=VALUE; repeatable.", metavar="KEY=VALUE")
    out: str | None = option(
        None, "Directory for the relative output paths of the recipe (default: the working directory).", metavar="DIR"
    )
    dry_run: bool = option(False, "Print the steps and sizes, write nothing.", panel="Running")


@dataclass(frozen=True)
class DemoOptions:
    """Options of `moeconv demo` only."""

    where: bool = option(False, "Only print where its model and texts are.")
