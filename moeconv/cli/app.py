"""The typer app, built from the table of verbs, and the way from an exception to an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import signal
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from moeconv import __version__
from moeconv.checkpoint.paths import follow_links
from moeconv.cli.commands import VERBS, Positional, Verb
from moeconv.cli.progress import make_meter
from moeconv.cli.sink import Sink, debug, open_streams
from moeconv.cli.stdin import model_from_stdin
from moeconv.errors import Interrupted, MoeconvError, UsageError, escape
from moeconv.options import choices_of, flag_of, help_of, reads_of
from moeconv.plan.memory import calm_collector
from moeconv.plan.meter import SilentMeter
from moeconv.requests import request
from moeconv.world import World, current, first, join, launched, settle

_SINK = Sink()
_LOST = ("gloo", "NCCL", "Connection", "TCPStore")  # what a collective's error speaks of when a peer has died
_OUTPUT_FLAGS = (
    ("json", Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]),
    ("quiet", Annotated[bool, typer.Option("--quiet", "-q", help="Print only the output path.")]),
    ("verbose", Annotated[bool, typer.Option("--verbose", "-v", help="Identities, hashes and sizes on stderr.")]),
)


def _annotation(kind: Any, name: str, help: str, choices: Sequence[str] = ()) -> Any:
    """The typer annotation of a flag; a bool that is not off by default gets a --no- twin."""
    if typing.get_origin(kind) in (tuple, list):
        kind = list[str]
    text = f"{help} One of: {', '.join(choices)}." if choices else help
    return Annotated[kind, typer.Option(flag_of(name), help=text)]


def _flag_parameters(verb: Verb, *, whole: bool) -> list[tuple[str, Any, Any]]:
    """(name, annotation, default) of every flag of a verb; its help is `whole`, with what registries have, or not."""
    flags: list[tuple[str, Any, Any]] = []
    for group in verb.groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            help, choices = (help_of(field), choices_of(field)) if whole else (field.metadata["help"], ())
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            if field.default is True or hints[field.name] == (bool | None):
                spelled = f"{flag_of(field.name)}/--no-{field.name.replace('_', '-')}"
                kind: Any = Annotated[hints[field.name], typer.Option(spelled, help=help)]
            else:
                kind = _annotation(hints[field.name], field.name, help, choices)
            flags.append((field.name, kind, default))
    return flags


def _argument(positional: Positional) -> Any:
    kind: Any = str if positional.required else str | None
    return Annotated[kind, typer.Argument(help=positional.help, metavar=positional.name.upper())]


def _command(verb: Verb, *, whole: bool) -> types.FunctionType:
    """The function that typer sees: the verb's parameters as its signature, with their `whole` help or a part of it."""
    names: list[tuple[str, Any, Any]] = [
        (p.name, _argument(p), inspect.Parameter.empty if p.required else None) for p in verb.positionals
    ]
    names += _flag_parameters(verb, whole=whole)
    names += [(name, kind, False) for name, kind in _OUTPUT_FLAGS]

    def command(**values: Any) -> int:
        return _call(verb, values)

    command.__name__, command.__doc__ = verb.name, verb.help
    command.__annotations__ = {name: kind for name, kind, _ in names}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
            for name, kind, default in names
        ]
    )
    return typing.cast(types.FunctionType, command)


def _call(verb: Verb, values: dict[str, Any]) -> int:
    """Run a verb and print its result. Returns the exit code."""
    _SINK.mode = "json" if values.pop("json") else "quiet" if values.pop("quiet", False) else "human"
    _meet(verb, launched())
    _SINK.verbose = values.pop("verbose")
    values.pop("quiet", None)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    _read_stdin(verb, values)
    _guard(verb, values)
    meter = SilentMeter() if _SINK.mute else make_meter()
    try:
        with follow_links(bool(values.get("follow_links"))):
            result = verb.run(request(verb.request, values), meter)
    finally:
        if not isinstance(meter, SilentMeter):
            meter.close()
    if (lost := settle(None)) is not None:
        raise lost
    failure = verb.failed(result)
    _SINK.result(result, table=verb.table)
    if failure is None:
        return 0
    if _SINK.mode != "json":
        _SINK.error(failure)
    return failure.exit_code


def _meet(verb: Verb, world: World) -> None:
    """Under a launcher: join the other processes, and let the first one speak. Raises UsageError for other verbs."""
    _SINK.mute = not world.leads
    if world.size == 1:
        return
    if not verb.distributed:
        able = ", ".join(v.name for v in VERBS if v.distributed)
        raise UsageError(
            f"{verb.name} runs in one process, and the launcher started {world.size}",
            hint=f"Run it without torchrun; these share their work: {able}.",
        )
    join()


def _read_stdin(verb: Verb, values: dict[str, Any]) -> None:
    """Put what standard input names in the place of `-`."""
    dashes = [p.name for p in verb.positionals if p.model and values[p.name] == "-"]
    dashes += ["data"] * list(values.get("data", ())).count("-")
    if len(dashes) > 1:
        raise UsageError("standard input can be read once: only one argument may be -", hint="Give a path.")
    if dashes and dashes[0] != "data":
        values[dashes[0]] = first(lambda: model_from_stdin(sys.stdin.buffer.read()))


def _guard(verb: Verb, values: Mapping[str, Any]) -> None:
    """Refuse an output that is, holds or lies in anything that the command reads. Raises OutputError."""
    from moeconv.checkpoint.guard import guard  # what only the version or help asks for reads nothing

    given = [(p, values[p.name]) for p in verb.positionals if values[p.name]]
    reads = [(p.name.upper(), path) for p, path in given if p.reads] + reads_of(values, *verb.groups)
    for path in (path for p, path in given if p.writes):
        guard(path, reads)


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """The typer app with every verb. Only where `arguments` ask for a verb's help are the registries loaded that have
    the choices of its parameters and other words of its help."""
    asks = "--help" in arguments
    app = typer.Typer(
        name="moeconv", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
        help="Convert dense checkpoints to Mixture-of-Experts, tune, prune and quantize them.",
    )  # fmt: skip

    @app.callback(invoke_without_command=True)
    def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
        if version:
            print(f"moeconv {__version__}")
            raise typer.Exit()

    for verb in VERBS:
        app.command(verb.name, help=verb.help)(_command(verb, whole=asks and verb.name in arguments))
    return app


def _on_signal(number: int, _frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise Interrupted(f"stopped by {signal.Signals(number).name}", signal_number=number,
                      hint="Run the same command again to resume.")  # fmt: skip


def run(arguments: Sequence[str]) -> int:
    """Run the command line. Returns the exit code; prints errors, never a traceback unless MOECONV_DEBUG is set."""
    _SINK.mode, _SINK.deaf = "json" if "--json" in arguments else "human", False
    _SINK.mute = not launched().leads
    open_streams()
    calm_collector()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread: a caller's business
            signal.signal(number, _on_signal)
    try:
        code = 0
        with contextlib.suppress(BrokenPipeError, SystemExit):  # of help, raised by rich: the sink catches its own
            code = typer.main.get_command(build_app(arguments)).main(
                args=list(arguments), prog_name="moeconv", standalone_mode=False
            )
        with _SINK.printing():  # what help left in the buffer
            pass
        return int(code or 0)
    except (Exception, Interrupted) as error:
        return _failed(error)


def _failed(error: Exception | Interrupted) -> int:
    known = settle(_as_moeconv_error(error))
    assert known is not None  # of several processes, the first one's
    if debug() and not isinstance(known, UsageError):
        traceback.print_exception(error)
    _SINK.error(known)
    return known.exit_code


def _as_moeconv_error(error: Exception | Interrupted) -> MoeconvError | Interrupted:
    if isinstance(error, MoeconvError | Interrupted):
        return error
    # typer carries its own copy of click, so its usage errors are known by what they can do
    if hasattr(error, "format_message") and getattr(error, "exit_code", None) is not None:
        context = getattr(error, "ctx", None)
        hint = f"See `{context.command_path} --help`." if context is not None else "See `moeconv --help`."
        return UsageError(escape(error.format_message()), hint=hint)
    if isinstance(error, RuntimeError) and current().size > 1 and any(word in str(error) for word in _LOST):
        return MoeconvError("another process of this command is gone", hint="See its messages, and the system's log.")
    if isinstance(error, MemoryError):
        return MoeconvError("out of memory", hint="Lower --jobs or --batch-size.")
    where: Mapping[str, Any] = {}
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        where = {"file": os.path.basename(frames[-1].filename), "line": frames[-1].lineno}
    return MoeconvError(
        f"a bug of moeconv: {type(error).__name__}: {escape(error)} {dict(where) or ''}".strip(),
        hint="Please report it, with the traceback that MOECONV_DEBUG=1 prints.",
    )
