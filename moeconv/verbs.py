"""One function per command: it does all that the command does, and returns its JSON object.

The functions are made from the requests, so that their parameters are the options of the commands. Their types are in
verbs.pyi, which `python docs/stubs.py` makes from the same requests.
"""

from __future__ import annotations

import dataclasses
import inspect as inspection
import logging
import os
from collections.abc import Callable, Mapping
from typing import get_type_hints

from moeconv import requests as r
from moeconv.checkpoint.guard import guard
from moeconv.checkpoint.paths import follow_links
from moeconv.errors import UsageError
from moeconv.options import check_names, reads_of
from moeconv.plan.meter import CallbackMeter, Progress
from moeconv.result import VerbResult
from moeconv.steps import run_request

REQUESTS: Mapping[str, type] = {
    "inspect": r.InspectRequest,
    "upcycle": r.UpcycleRequest,
    "calibrate": r.CalibrateRequest,
    "tune": r.TuneRequest,
    "prune": r.PruneRequest,
    "quantize": r.QuantizeRequest,
    "import_gguf": r.ImportRequest,  # `import` is a keyword of Python
    "arrange": r.ArrangeRequest,
    "collapse": r.CollapseRequest,
    "evaluate": r.EvaluateRequest,
    "verify": r.VerifyRequest,
    "report": r.ReportRequest,
    "run": r.RunRequest,
}
WRITTEN = ("out", "stats")  # the positional parameters that a command writes
_LOG = logging.getLogger("moeconv")


def _path(value: object) -> str | None:
    """The path of a checkpoint or file; a `Model` stands for its directory."""
    if value is None or isinstance(value, str):
        return value
    if (checkpoint := getattr(value, "checkpoint", None)) is not None:
        return str(checkpoint.path)
    return os.fsdecode(value) if isinstance(value, os.PathLike) else str(value)


def _normalised(kind: type, values: Mapping[str, object]) -> dict[str, object]:
    """The values with paths as text and lists as tuples; one text stands for a list of one."""
    made = dict(values)
    for group in r.groups_of(kind):
        hints = get_type_hints(group)
        for field in (f for f in dataclasses.fields(group) if f.name in made):
            value = made[field.name]
            if hints[field.name] == tuple[str, ...]:
                listed = (value,) if isinstance(value, str | os.PathLike) else tuple(value)  # type: ignore[arg-type]
                made[field.name] = tuple(str(item) for item in listed)
            elif field.metadata["reads"] and value is not None:
                made[field.name] = _path(value)
    return made


def _call(
    command: str, paths: Mapping[str, object], progress: Callable[[Progress], None] | None, options: dict[str, object]
) -> VerbResult:
    kind = REQUESTS[command]
    groups = r.groups_of(kind)
    check_names(options, *groups)
    given = {name: _path(value) for name, value in paths.items()}
    values = _normalised(kind, options) | given
    reads = [(name, path) for name, path in given.items() if path and name not in WRITTEN] + reads_of(values, *groups)
    for name in WRITTEN:
        if name in given and (out := given[name]):
            guard(out, reads)
    with follow_links(bool(values.get("follow_links"))):
        found = run_request(r.request(kind, values), CallbackMeter(progress))
    warnings = found.get("warnings")
    for text in warnings if isinstance(warnings, list) else ():
        _LOG.warning("%s", text)
    return VerbResult(command, found)


def _made(command: str) -> Callable[..., VerbResult]:
    """The function of a command, with the signature that its request has."""
    kind = REQUESTS[command]
    names = r.paths_of(kind)
    hints = get_type_hints(kind)
    optional = {name for name in names if type(None) in getattr(hints[name], "__args__", ())}

    def verb(*given: object, progress: Callable[[Progress], None] | None = None, **options: object) -> VerbResult:
        bound = dict(zip(names, given)) | {name: options.pop(name) for name in names if name in options}
        missing = [name for name in names if name not in bound and name not in optional]
        if missing or len(given) > len(names):
            raise UsageError(f"{command} takes {', '.join(names)}", hint=f"See help(moeconv.{command}).")
        return _call(command, dict.fromkeys(names) | bound, progress, options)

    keyword, positional = inspection.Parameter.KEYWORD_ONLY, inspection.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspection.Parameter(n, positional, default=None if n in optional else inspection.Parameter.empty)
        for n in names
    ]
    fields = [field for group in r.groups_of(kind) for field in dataclasses.fields(group)]
    parameters += [inspection.Parameter(f.name, keyword, default=f.default) for f in fields]
    parameters.append(inspection.Parameter("progress", keyword, default=None))
    verb.__name__ = verb.__qualname__ = command
    verb.__signature__ = inspection.Signature(parameters)  # type: ignore[attr-defined]
    lines = [f"    {field.name}: {field.metadata['help']}" for field in fields]
    verb.__doc__ = "\n".join([
        f"All that `moeconv {command.removesuffix('_gguf')}` does. Returns its JSON object.", "",
        "`progress` is called with a `Progress` at every change; texts go to the logger `moeconv`. Raises the errors",
        "of `moeconv.errors`. A verdict or a gate that fails raises nothing: see `ok` and `passed` in the result.", "",
        *lines,
    ])  # fmt: skip
    return verb


inspect, upcycle, calibrate, tune, prune, quantize, import_gguf, arrange, collapse, evaluate, verify, report, run = map(
    _made, REQUESTS
)
