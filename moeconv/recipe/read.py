"""Recipes: YAML -> typed steps. An unknown key or a value of the wrong kind is an error that names its line.

    name: dense-to-int4
    vars: {model: demo, work: build}
    evaluate: {data: [heldout.txt], reference: "${model}"}    # optional: run after every step that writes
    report: ${work}/report.html                               # optional: a page about the last model and all steps
    steps:
      - step: upcycle
        from: ${model}
        to: ${work}/moe
        with: {experts: 8, top_k: 2, method: drop}

The keys in `with` are the command's flags. `grid: {top_k: [1, 2], method: [copy, drop]}` beside it makes one step per
combination, whose output is named after `to` and the values. ${NAME} is a variable of the recipe, of --set, or of the
environment; ${demo} is the folder of the data that ships with moeconv. Relative paths that the steps write are relative
to the working directory, or to that of --out; all others are relative to the recipe.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

import moeconv
from moeconv import options as o
from moeconv.errors import UsageError, did_you_mean, escape
from moeconv.recipe.lines import KeyPath, read_yaml
from moeconv.requests import (
    ArrangeRequest,
    CalibrateRequest,
    CollapseRequest,
    EvaluateRequest,
    ImportRequest,
    PruneRequest,
    QuantizeRequest,
    TuneRequest,
    UpcycleRequest,
    VerifyRequest,
    groups_of,
    paths_of,
    request,
)
from moeconv.types import Config, JsonObject

Asked = (
    ImportRequest
    | UpcycleRequest
    | TuneRequest
    | PruneRequest
    | QuantizeRequest
    | ArrangeRequest
    | CollapseRequest
    | CalibrateRequest
    | EvaluateRequest
    | VerifyRequest
)
DEMO_DATA = Path(moeconv.__file__).parent / "demo_data"
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
# step -> the class of its request
REQUESTS: dict[str, type[Asked]] = {
    "import": ImportRequest,
    "upcycle": UpcycleRequest,
    "tune": TuneRequest,
    "prune": PruneRequest,
    "quantize": QuantizeRequest,
    "arrange": ArrangeRequest,
    "collapse": CollapseRequest,
    "calibrate": CalibrateRequest,
    "evaluate": EvaluateRequest,
    "verify": VerifyRequest,
}
READERS = ("evaluate", "verify")  # steps that write nothing
# option groups that only the command line has
_OUTSIDE = (o.ArtifactOptions, o.SeedOptions, o.SampleOptions, o.MergeOptions, o.DryOptions)
# step -> option groups whose fields `with` may name
GROUPS: dict[str, tuple[type, ...]] = {
    step: tuple(group for group in groups_of(kind) if group not in _OUTSIDE) for step, kind in REQUESTS.items()
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StepSpec(_Strict):
    """One step as it is written in the file."""

    step: str
    source: str = Field(alias="from")
    to: str | None = None
    name: str | None = None
    parameters: JsonObject = Field(default_factory=dict, alias="with")
    grid: dict[str, list[str | int | float | bool]] = Field(default_factory=dict)


class RecipeSpec(_Strict):
    """A recipe as it is written in the file."""

    name: str = "recipe"
    vars: dict[str, str | int | float | bool] = Field(default_factory=dict)
    evaluate: JsonObject | None = None
    report: str | None = None
    steps: list[StepSpec] = Field(min_length=1)


@dataclass(frozen=True)
class Step:
    """One step with its variables filled in, absolute paths, and parameters of the right types."""

    command: str
    name: str
    source: str
    to: str | None
    parameters: Config
    line: int = 1  # where the recipe asks for it

    @property
    def asked(self) -> Asked:
        """The request of this step."""
        return asked(self.command, self.parameters, self.source, self.to)


def asked(command: str, parameters: Config, *paths: str | None) -> Asked:
    """The request of a step. `paths` are the one that it reads and the one that it writes."""
    kind = REQUESTS[command]
    return request(kind, dict(parameters) | dict(zip(paths_of(kind), paths)))


@dataclass(frozen=True)
class Recipe:
    """What `moeconv run` runs. `path` is the file of the recipe.

    `evaluate` has the parameters of an evaluation after every step that writes a model. `report` is the HTML file to
    write at the end.
    """

    name: str
    steps: tuple[Step, ...]
    evaluate: Config | None
    report: str | None
    path: str


def load_recipe(path: str, *, settings: Sequence[str] = (), out: str | None = None) -> Recipe:
    """Read and check a recipe; `settings` are KEY=VALUE. `out` is the directory of the relative paths that its steps
    write (None: the working directory). Raises UsageError that names file and line."""
    file = Path(path)
    value, lines = read_yaml(file)
    checker = _Checker(file, lines)
    spec = checker.parse(value)
    variables = _variables(checker, spec, settings)
    checker = replace(checker, out=Path(out or ""), outputs=checker.written(spec, variables))
    steps = [(i, step) for i, s in enumerate(spec.steps) for step in checker.steps(i, s, variables)]
    checker.order(steps)
    return Recipe(
        spec.name,
        tuple(step for _, step in steps),
        None if spec.evaluate is None else checker.typed("evaluate", spec.evaluate, ("evaluate",), variables),
        None if spec.report is None else checker.path(spec.report, ("report",), variables),
        path,
    )


@dataclass(frozen=True)
class _Variables:
    """Values by name. In a path, a value of --set is relative to the working directory, and not to the recipe."""

    values: Mapping[str, str]
    given: frozenset[str]

    def get(self, name: str, *, in_path: bool) -> str | None:
        value = self.values.get(name, os.environ.get(name))
        if in_path and name in self.given and value is not None and not value.startswith("hf://"):
            return os.path.abspath(value)
        return value


def _variables(checker: _Checker, spec: RecipeSpec, settings: Sequence[str]) -> _Variables:
    values = {"demo": str(DEMO_DATA)}
    given = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in spec.vars:
            known = spec.vars or ["(the recipe has no vars)"]
            raise UsageError(
                f"--set {escape(setting)}: not KEY=VALUE with a variable of the recipe", hint=did_you_mean(key, known)
            )
        given[key] = value
    for key, default in spec.vars.items():  # a variable may use the variables above it
        text = checker.fill(str(default), ("vars", key), _Variables(values, frozenset()), in_path=False)
        values[key] = given.get(key, text)
    return _Variables(values, frozenset(given))


@dataclass(frozen=True)
class _Checker:
    """Turns the values of a YAML file into typed steps; every error names the file and the line."""

    file: Path
    lines: Mapping[KeyPath, int]
    out: Path = Path()  # where relative paths of `outputs` are
    outputs: frozenset[Path] = frozenset()

    def written(self, spec: RecipeSpec, variables: _Variables) -> frozenset[Path]:
        """The paths that the recipe writes, with variables filled in."""
        found = set() if spec.report is None else {self.fill(spec.report, ("report",), variables, in_path=True)}
        for index, step in enumerate(spec.steps):
            if step.to is not None:
                to = self.fill(step.to, ("steps", index, "to"), variables, in_path=True)
                found |= {"-".join([to, *map(str, point)]) for point in itertools.product(*step.grid.values())}
        return frozenset(Path(os.path.normpath(path)) for path in found if path)

    def fail(self, path: KeyPath, message: str, hint: str = "") -> UsageError:
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 1)
        return UsageError(f"{escape(self.file.name)}:{line}: {message}", hint=hint)

    def parse(self, value: object) -> RecipeSpec:
        if not isinstance(value, dict):
            raise UsageError(f"{escape(self.file.name)} is not a recipe", hint="It needs a list of `steps`.")
        try:
            return RecipeSpec.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            path = tuple(first["loc"])
            if first["type"] == "extra_forbidden":
                known = (
                    ("step", "from", "to", "name", "with", "grid")
                    if "steps" in path
                    else tuple(RecipeSpec.model_fields)
                )
                raise self.fail(path, f"unknown key {escape(path[-1])!r}", did_you_mean(path[-1], known)) from None
            where = ".".join(str(p) for p in path)
            raise self.fail(path, f"{escape(where)}: {escape(first['msg'])}") from None

    def order(self, steps: Sequence[tuple[int, Step]]) -> None:
        """Raises UsageError for two steps that write one path, and for a step that reads what a later one writes."""
        writers: set[str] = set()
        for at, (index, step) in enumerate(steps):
            if step.to is not None and os.path.normpath(step.to) in writers:
                raise self.fail(
                    ("steps", index, "to"), f"two steps write {escape(os.path.basename(step.to))}",
                    "Give each step a path of its own.",
                )  # fmt: skip
            later = {os.path.normpath(s.to) for _, s in steps[at:] if s.to is not None}
            if os.path.normpath(step.source) in later:
                raise self.fail(
                    ("steps", index, "from"),
                    f"{escape(os.path.basename(step.source))} is written by this step or a later one",
                    "A step can read what existed before the run, or what an earlier step wrote.",
                )
            if step.to is not None:
                writers.add(os.path.normpath(step.to))

    def steps(self, index: int, spec: StepSpec, variables: _Variables) -> list[Step]:
        """The step, or one per combination of the values in its grid; `to` and the name then end with these values."""
        if not spec.grid:
            return [self.step(index, spec, variables)]
        path = ("steps", index, "grid")
        for key, values in spec.grid.items():
            if key in spec.parameters:
                raise self.fail((*path, key), f"{escape(key)} is both in `with` and in `grid`", "Remove one.")
            if not values or len(set(map(str, values))) < len(values):
                raise self.fail((*path, key), f"grid: {escape(key)} needs a list of different values")
            if not all(re.fullmatch(r"[\w.:+-]+", str(value)) for value in values):
                raise self.fail((*path, key), f"grid: a value of {escape(key)} cannot be part of a file name")
        if spec.to is None:
            raise self.fail(path, f"{escape(spec.step)} writes nothing: grid needs `to`")
        made = []
        for point in itertools.product(*spec.grid.values()):
            chosen = dict(zip(spec.grid, point))
            to = "-".join([spec.to, *map(str, point)])
            step = self.step(
                index, spec.model_copy(update={"parameters": spec.parameters | chosen, "to": to}), variables
            )
            words = [f"{key} {value}" for key, value in chosen.items() if str(value) not in step.name.split()]
            made.append(replace(step, name=" ".join([step.name, *words])))
        return made

    def step(self, index: int, spec: StepSpec, variables: _Variables) -> Step:
        path = ("steps", index)
        if spec.step not in GROUPS:
            raise self.fail((*path, "step"), f"unknown step {escape(spec.step)!r}", did_you_mean(spec.step, GROUPS))
        if (spec.to is None) != (spec.step in READERS):
            text = f"{spec.step} writes nothing: leave out `to`" if spec.to else f"{spec.step} needs `to`"
            raise self.fail(path, text)
        source = self.path(spec.source, (*path, "from"), variables)
        to = None if spec.to is None else self.path(spec.to, (*path, "to"), variables)
        parameters = self.typed(spec.step, spec.parameters, (*path, "with"), variables)
        name = spec.name or _label(spec.step, parameters)
        return Step(spec.step, name, source, to, parameters, self.lines.get(path, 1))

    def typed(self, command: str, values: Config, path: KeyPath, variables: _Variables) -> JsonObject:
        """The values of `with`, checked against the fields of the command's option groups, with absolute paths. Raises
        UsageError for an unknown key or a value of the wrong type."""
        groups = GROUPS[command]
        fields = {name: group for group in groups for name in group.__dataclass_fields__}  # type: ignore[attr-defined]
        typed: JsonObject = {}
        for key, value in values.items():
            at = (*path, key)
            if key not in fields:
                raise self.fail(at, f"{command} has no parameter {escape(key)!r}", did_you_mean(key, fields))
            filled: object = value
            field = fields[key].__dataclass_fields__[key]  # type: ignore[attr-defined]
            in_path = bool(field.metadata["reads"])
            if in_path and isinstance(field.default, tuple):
                listed = value if isinstance(value, list) else [value]
                filled = tuple(self.path(v, at, variables) if isinstance(v, str) else v for v in listed)
            elif isinstance(value, str):
                filled = self.path(value, at, variables) if in_path else self.scalar(value, at, variables)
            if isinstance(filled, int | float) and not isinstance(filled, bool) and _is_text(fields[key], key):
                filled = str(filled)  # such as group_size, which may be a number or a name
            try:
                checked: object = TypeAdapter(fields[key]).validate_python({key: filled})
                o.from_keywords(fields[key], {key: getattr(checked, key)})
            except ValidationError as error:
                raise self.fail(at, f"{escape(key)}: {escape(error.errors()[0]['msg'])}") from None
            except UsageError as error:
                raise self.fail(at, error.message, error.hint) from None
            typed[key] = getattr(checked, key)
        return typed

    def scalar(self, text: str, path: KeyPath, variables: _Variables) -> object:
        """A value with its variables filled in. A value that is a single ${variable} is parsed as YAML, so that 4 is a
        number."""
        filled = self.fill(text, path, variables, in_path=False)
        try:
            return yaml.safe_load(filled) if _VARIABLE.fullmatch(text) else filled
        except (yaml.YAMLError, ValueError):
            raise self.fail(path, f"{escape(text)} is {escape(filled)!r}, which is not YAML", "Quote it.") from None

    def fill(self, text: str, path: KeyPath, variables: _Variables, *, in_path: bool) -> str:
        def value(match: re.Match[str]) -> str:
            found = variables.get(match[1], in_path=in_path)
            if found is None:
                hint = did_you_mean(match[1], variables.values)
                raise self.fail(path, f"no variable ${{{escape(match[1])}}}", hint)
            return found

        return _VARIABLE.sub(value, text)

    def path(self, text: str, path: KeyPath, variables: _Variables) -> str:
        """A path: what the recipe writes, and what lies in it, is in the directory of the outputs, and anything else
        in that of the recipe. Absolute paths and names on the hub stay as they are, but a path has one spelling: that
        of the output which it names or lies in, however it is written (./a, b/../a)."""
        filled = self.fill(text, path, variables, in_path=True)
        if not filled.strip():
            raise self.fail(path, f"{escape(path[-1])} is empty", "Name a path.")
        if filled.startswith("hf://") or filled == "-":
            return filled
        place = Path(os.path.normpath(filled))
        ours = not self.outputs.isdisjoint((place, *place.parents))
        return self._spelled(str((self.out if ours else self.file.parent) / filled))

    def _spelled(self, path: str) -> str:
        """The path as the outputs of the recipe are spelled, where it is one of them or lies in one."""
        there = Path(os.path.realpath(path))
        for output in self.outputs:
            base = self.out / output
            if there.is_relative_to(real := os.path.realpath(base)):
                return str(base / there.relative_to(real))
        return path


def _is_text(group: type, key: str) -> bool:
    """Whether an option is a word that may be a number."""
    hint = get_type_hints(group)[key]
    return hint is str or hint == str | None


def _label(command: str, parameters: Config) -> str:
    words = [str(parameters[k]) for k in ("method", "objective", "criterion", "scheme") if parameters.get(k)]
    return " ".join([command, *words])
