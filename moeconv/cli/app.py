"""The typer app, built from the table of commands, and the exit code of every exception."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from moeconv import __version__
from moeconv.checkpoint.paths import follow_links
from moeconv.cli.commands import VERBS, Verb
from moeconv.cli.examples import PAGES, epilog
from moeconv.cli.parameters import PRINTING, function_of
from moeconv.cli.progress import make_meter
from moeconv.cli.sink import Sink, debug, open_streams
from moeconv.cli.stdin import model_from_stdin
from moeconv.errors import Interrupted, MoeconvError, UsageError, escape
from moeconv.options import reads_of
from moeconv.plan.memory import configure_collector
from moeconv.plan.meter import SilentMeter
from moeconv.requests import request
from moeconv.versions import untested_transformers
from moeconv.world import World, current, end_together, first, join, launched

_SINK = Sink()
_LOST_PEER = ("gloo", "NCCL", "Connection", "TCPStore")  # words in the error of a collective whose peer has died


def _call(verb: Verb, values: dict[str, object]) -> int:
    """Run a command and print its result. Returns the exit code."""
    json, quiet, verbose = (bool(values.pop(name)) for name in PRINTING)
    _SINK.mode = "json" if json else "quiet" if quiet else "human"
    _join_processes(verb, launched())
    _SINK.verbose = verbose
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    _read_stdin(verb, values)
    _guard(verb, values)
    meter = SilentMeter() if _SINK.silent or quiet else make_meter()
    try:
        with follow_links(bool(values.get("follow_links"))):
            result = verb.run(request(verb.request, values), meter)
    finally:
        if not isinstance(meter, SilentMeter):
            meter.close()
    if (lost := end_together(None)) is not None:
        raise lost
    if "transformers" in sys.modules and isinstance(warnings := result.get("warnings"), list):
        result = {**result, "warnings": [*warnings, *untested_transformers()]}
    failure = verb.failed(result)
    _SINK.result(result, table=verb.table)
    if failure is None:
        return 0
    if _SINK.mode != "json":
        _SINK.error(failure)
    return failure.exit_code


def _join_processes(verb: Verb, world: World) -> None:
    """Under a launcher such as torchrun: join the other processes; only the first one prints. Raises UsageError for a
    command that runs in one process."""
    _SINK.silent = not world.leads
    if world.size == 1:
        return
    if not verb.distributed:
        able = ", ".join(v.name for v in VERBS if v.distributed)
        raise UsageError(
            f"{verb.name} runs in one process, and the launcher started {world.size}",
            hint=f"Run it without torchrun. These commands can share their work: {able}.",
        )
    join()


def _read_stdin(verb: Verb, values: dict[str, object]) -> None:
    """Replace `-` by the model that standard input names; `--data -` is read later."""
    dashes = [p.name for p in verb.positionals if p.model and values[p.name] == "-"]
    data = values.get("data", ())
    dashes += ["data"] * (data.count("-") if isinstance(data, tuple) else 0)
    if len(dashes) > 1:
        raise UsageError("standard input can be read only once, so only one argument may be -", hint="Give a path.")
    if dashes and dashes[0] != "data":
        values[dashes[0]] = first(lambda: model_from_stdin(sys.stdin.buffer.read()))


def _guard(verb: Verb, values: Mapping[str, object]) -> None:
    """Refuse an output that is, contains or is inside anything that the command reads. Raises OutputError."""
    from moeconv.checkpoint.guard import guard  # here, because --version and --help do not need it

    given = [(p, str(values[p.name])) for p in verb.positionals if values[p.name]]
    reads = [(p.name.upper(), path) for p, path in given if p.reads] + reads_of(values, *verb.groups)
    for path in (path for p, path in given if p.writes):
        guard(path, reads)


_HELP = frozenset({"--help", "-h", "help"})


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """The typer app with every command. The registries, which have the choices of options and other words of help
    texts, are loaded only if `arguments` ask for the help of a command."""
    asks = not _HELP.isdisjoint(arguments)
    app = typer.Typer(
        name="moeconv", add_completion=True, pretty_exceptions_enable=False, epilog=f"Manual: {PAGES}index.md",
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Convert dense checkpoints to Mixture-of-Experts, tune, prune and quantize them.",
    )  # fmt: skip

    @app.callback(invoke_without_command=True)
    def main(
        context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
    ) -> None:
        if version:
            print(f"moeconv {__version__}")
        elif context.invoked_subcommand is None:
            print(context.get_help())

    @app.command("help", help="The help of a command.")
    def show_help(
        context: typer.Context,
        command: Annotated[str | None, typer.Argument(metavar="COMMAND", help="Its name (default: all).")] = None,
    ) -> None:
        assert context.parent is not None
        words = ["--help"] if command is None else [command, "--help"]
        context.parent.command.main(args=words, prog_name="moeconv", standalone_mode=False)

    for verb in VERBS:
        made = function_of(verb, _call, whole=asks and verb.name in arguments)
        app.command(verb.name, help=verb.help, epilog=epilog(verb.name))(made)
    return app


def _on_signal(number: int, _frame: types.FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    raise Interrupted(f"stopped by {signal.Signals(number).name}", signal_number=number,
                      hint="Run the same command again to resume.")  # fmt: skip


def run(arguments: Sequence[str]) -> int:
    """Run the command line. Returns the exit code; prints errors, never a traceback unless MOECONV_DEBUG is set."""
    _SINK.mode, _SINK.stdout_failed = "json" if "--json" in arguments else "human", False
    _SINK.silent = not launched().leads
    open_streams()
    configure_collector()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread, where the caller handles signals
            signal.signal(number, _on_signal)
    try:
        code = 0
        with contextlib.suppress(
            BrokenPipeError, SystemExit
        ):  # rich raises them while it prints help; the sink handles its own
            code = typer.main.get_command(build_app(arguments)).main(
                args=list(arguments), prog_name="moeconv", standalone_mode=False
            )
        with _SINK.printing():  # flush what help left in the buffer
            pass
        return int(code or 0)
    except (Exception, Interrupted) as error:
        return _failed(error)


def _failed(error: Exception | Interrupted) -> int:
    known = end_together(_as_moeconv_error(error))
    assert known is not None  # the first error of any process
    if debug() and not isinstance(known, UsageError):
        traceback.print_exception(error)
    _SINK.error(known)
    return known.exit_code


def _as_moeconv_error(error: Exception | Interrupted) -> MoeconvError | Interrupted:
    if isinstance(error, MoeconvError | Interrupted):
        return error
    # typer contains a copy of click, so its usage errors are recognised by their methods and not by their class
    if hasattr(error, "format_message") and getattr(error, "exit_code", None) is not None:
        context = getattr(error, "ctx", None)
        hint = f"See `{context.command_path} --help`." if context is not None else "See `moeconv --help`."
        return UsageError(escape(error.format_message()), hint=hint)
    if isinstance(error, RuntimeError) and current().size > 1 and any(word in str(error) for word in _LOST_PEER):
        return MoeconvError("another process of this command has died", hint="See its messages, and the system's log.")
    if isinstance(error, MemoryError):
        return MoeconvError("out of memory", hint="Lower --jobs or --batch-size.")
    where: dict[str, object] = {}
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        where = {"file": os.path.basename(frames[-1].filename), "line": frames[-1].lineno}
    return MoeconvError(
        f"a bug of moeconv: {type(error).__name__}: {escape(error)} {where or ''}".strip(),
        hint="Please report it, with the traceback that MOECONV_DEBUG=1 prints.",
    )
