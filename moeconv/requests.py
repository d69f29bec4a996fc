"""One frozen request per command: everything that a command line, a step of a recipe or a program asks for.

The order of the fields is the order of the flags in the help texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar, get_type_hints

from moeconv import options as o

R = TypeVar("R")


@dataclass(frozen=True)
class InspectRequest:
    """`moeconv inspect`."""

    model: str
    read: o.ReadOptions


@dataclass(frozen=True)
class UpcycleRequest:
    """`moeconv upcycle`."""

    source: str
    out: str
    upcycle: o.UpcycleOptions
    statistics: o.StatisticsOptions
    data: o.DataOptions
    measure: o.MeasureOptions
    calibrate: o.CalibrateOptions
    plan: o.PlanOptions
    write: o.WriteOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class CalibrateRequest:
    """`moeconv calibrate`; `stats` is None where an importance matrix is written."""

    model: str
    stats: str | None
    calibrate: o.CalibrateOptions
    data: o.DataOptions
    measure: o.MeasureOptions
    artifact: o.ArtifactOptions
    random: o.SeedOptions
    merge: o.MergeOptions
    imatrix: o.ImatrixOptions
    dry: o.DryOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class TuneRequest:
    """`moeconv tune`."""

    model: str
    out: str
    tune: o.TuneOptions
    data: o.DataOptions
    measure: o.MeasureOptions
    plan: o.PlanOptions
    write: o.WriteOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class PruneRequest:
    """`moeconv prune`; `out` is None where --curve only prints."""

    model: str
    out: str | None
    prune: o.PruneOptions
    statistics: o.StatisticsOptions
    data: o.DataOptions
    measure: o.MeasureOptions
    calibrate: o.CalibrateOptions
    plan: o.PlanOptions
    write: o.WriteOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class QuantizeRequest:
    """`moeconv quantize`."""

    model: str
    out: str
    quantize: o.QuantizeOptions
    statistics: o.StatisticsOptions
    data: o.DataOptions
    measure: o.MeasureOptions
    plan: o.PlanOptions
    write: o.WriteOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class ImportRequest:
    """`moeconv import`."""

    gguf: str
    out: str
    plan: o.ImportOptions
    write: o.WriteOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class ArrangeRequest:
    """`moeconv arrange`."""

    model: str
    out: str
    arrange: o.ArrangeOptions
    statistics: o.StatisticsOptions
    plan: o.PlanOptions
    write: o.WriteOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class CollapseRequest:
    """`moeconv collapse`."""

    model: str
    out: str
    collapse: o.CollapseOptions
    data: o.DataOptions
    measure: o.MeasureOptions
    plan: o.PlanOptions
    write: o.WriteOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class EvaluateRequest:
    """`moeconv evaluate`."""

    model: str
    evaluate: o.EvaluateOptions
    data: o.DataOptions
    measure: o.MeasureOptions
    sample: o.SampleOptions
    dry: o.DryOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class VerifyRequest:
    """`moeconv verify`."""

    model: str
    verify: o.VerifyOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class ReportRequest:
    """`moeconv report`."""

    model: str
    out: str
    report: o.ReportOptions
    artifact: o.ArtifactOptions
    read: o.ReadOptions


@dataclass(frozen=True)
class RunRequest:
    """`moeconv run`."""

    recipe: str
    run: o.RunOptions


@dataclass(frozen=True)
class RecipesRequest:
    """`moeconv recipes`; `name` is None to list them, `dest` is None for the working directory."""

    name: str | None
    dest: str | None


@dataclass(frozen=True)
class FamiliesRequest:
    """`moeconv families`."""

    families: o.FamiliesOptions


@dataclass(frozen=True)
class FormatsRequest:
    """`moeconv formats`."""

    formats: o.FormatsOptions


@dataclass(frozen=True)
class SchemaRequest:
    """`moeconv schema`; `command` is None for all."""

    command: str | None


@dataclass(frozen=True)
class DemoRequest:
    """`moeconv demo`; `dir` is None for a temporary directory."""

    dir: str | None
    demo: o.DemoOptions


def groups_of(kind: type) -> tuple[type, ...]:
    """The option groups of a request, in order."""
    return tuple(group for _, group in _fields(kind) if group is not None)


def request(kind: type[R], values: Mapping[str, object]) -> R:
    """The request of class `kind` from values by name; options that are missing take their defaults. Raises UsageError
    for a value that is not among the choices of its option."""
    given = {name: values[name] if group is None else o.from_keywords(group, values) for name, group in _fields(kind)}
    return kind(**given)


def paths_of(kind: type) -> tuple[str, ...]:
    """The fields of a request that are paths and not option groups: the source, then the output."""
    return tuple(name for name, group in _fields(kind) if group is None)


def _fields(kind: type) -> Iterator[tuple[str, type | None]]:
    """(field, its option group; None for a path)."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        yield field.name, hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None
