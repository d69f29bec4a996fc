"""The function of each command that typer sees: its signature is made of the command's arguments and option groups."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, NamedTuple

import typer

from moeconv import options as o
from moeconv.cli.commands import Positional, Verb

_PRINTING = (
    ("json", ("--json",), "Print one JSON object on stdout."),
    ("quiet", ("--quiet", "-q"), "Print only the output path, and no progress."),
    ("verbose", ("--verbose", "-v"), "Identities, hashes and sizes on stderr."),
)
PRINTING = tuple(name for name, _, _ in _PRINTING)  # the flags that every command has


class Parameter(NamedTuple):
    """A parameter of the function that typer sees. `annotation` is a type with typer's metadata, as in source code."""

    name: str
    annotation: object
    default: object


def _flag(group: type, field: dataclasses.Field[object], kind: object, *, whole: bool) -> Parameter:
    """The flag of one option. With `whole` its help includes the words of the registries, which must be loaded."""
    help, choices = (o.help_of(field), o.choices_of(field)) if whole else (field.metadata["help"], ())
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    metavar = o.metavar_of(field, kind, choices)
    if choices and not metavar.startswith("["):
        help = f"{help} One of: {', '.join(choices)}."
    spelled = o.flag_of(field.name)
    if field.default is True or kind == (bool | None):
        spelled = f"{spelled}/--no-{field.name.replace('_', '-')}"
    if typing.get_origin(kind) in (tuple, list):
        kind = list[str]
    option = typer.Option(
        spelled, help=help, metavar=metavar, rich_help_panel=o.panel_of(group, field),
        autocompletion=_completion(field),
    )  # fmt: skip
    return Parameter(field.name, Annotated[kind, option], default)


def _completion(field: dataclasses.Field[object]) -> Callable[[str], list[str]] | None:
    """What the shell completes: the choices of the option, which are loaded only then."""
    if not field.metadata["choices"]:
        return None
    return lambda incomplete: [word for word in o.choices_of(field) if word.startswith(incomplete)]


def _flags(verb: Verb, *, whole: bool) -> list[Parameter]:
    """Every flag of a command, those of one panel of the help text together."""
    found = [
        (o.panel_of(group, field), _flag(group, field, hints[field.name], whole=whole))
        for group in verb.groups
        for hints in (typing.get_type_hints(group),)
        for field in dataclasses.fields(group)
    ]
    for name, flags, help in _PRINTING:
        option = typer.Option(*flags, help=help, metavar="", rich_help_panel="Output")
        found.append(("Output", Parameter(name, Annotated[bool, option], False)))
    return [flag for _, flag in sorted(found, key=lambda pair: o.PANELS.index(pair[0]))]


def _argument(positional: Positional) -> Parameter:
    argument = typer.Argument(help=positional.help, metavar=positional.name.upper())
    if positional.required:
        return Parameter(positional.name, Annotated[str, argument], inspect.Parameter.empty)
    return Parameter(positional.name, Annotated[str | None, argument], None)


def function_of(verb: Verb, call: Callable[[Verb, dict[str, object]], int], *, whole: bool) -> types.FunctionType:
    """The function that typer sees. It hands the values of the parameters to `call`. `whole` as for the flags."""
    parameters = [_argument(p) for p in verb.positionals] + _flags(verb, whole=whole)

    def command(**values: object) -> int:
        return call(verb, values)

    command.__name__, command.__doc__ = verb.name, verb.help
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(p.name, inspect.Parameter.KEYWORD_ONLY, annotation=p.annotation, default=p.default)
            for p in parameters
        ]
    )
    return typing.cast(types.FunctionType, command)
