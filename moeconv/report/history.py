"""The steps in a checkpoint's manifest, each as the command that performs it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from moeconv import options as o
from moeconv.errors import escape
from moeconv.types import Config, JsonObject

_OPTIONS: dict[str, type] = {
    "upcycle": o.UpcycleOptions, "prune": o.PruneOptions, "quantize": o.QuantizeOptions, "tune": o.TuneOptions,
    "arrange": o.ArrangeOptions, "collapse": o.CollapseOptions,
}  # fmt: skip
# parameters that are always shown
_ALWAYS = {"upcycle": ("method", "experts", "top_k"), "tune": ("objective", "train", "steps"),
           "prune": ("criterion",), "quantize": ("format", "scheme", "method"), "arrange": ("devices",),
           "collapse": ("width", "neurons")}  # fmt: skip
_FINGERPRINT = re.compile("[0-9a-f]{64}")


def steps_of(manifest: Config | None) -> list[JsonObject]:
    """The manifest's steps, oldest first. Entries that are not objects are left out: anybody may edit the file."""
    steps = (manifest or {}).get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def command_line(step: Config) -> str:
    """The step as a command line, with its most important flags and those that differ from the default."""
    command = str(step.get("command", "?"))
    words = ["moeconv", escape(command)]
    for name, value in flags(step).items():
        if isinstance(value, bool):
            words.append(o.flag_of(name if value else f"no_{name}"))
        else:
            words += [o.flag_of(name), escape(value)]
    return " ".join(words)


def flags(step: Config) -> dict[str, str | bool]:
    """{parameter: value in words} of a step: the most important ones, then those that differ from the default. Paths
    are shortened to file names."""
    command = str(step.get("command", ""))
    given = step.get("parameters")
    values = dict(given) if isinstance(given, Mapping) else {}
    if isinstance(made_with := values.get("made_with"), Mapping):
        values |= made_with
    group = _OPTIONS.get(command)
    if group is None:
        return {}
    fields = {f.name: f for f in dataclasses.fields(group)}
    chosen = [n for n in _ALWAYS[command] if values.get(n) is not None]
    chosen += [
        n for n, f in fields.items() if n not in chosen and n in values and values[n] not in (None, f.default, (), [])
    ]
    return {name: _word(name, values[name]) for name in chosen if not isinstance(values[name], Mapping)}


def _word(name: str, value: object) -> str | bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and name in ("stats", "teacher", "reference") and not value.startswith("hf://"):
        # the manifest names a model by its fingerprint
        return value[:12] if _FINGERPRINT.fullmatch(value) else os.path.basename(value.rstrip("/"))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(str(v) for v in value)
    return str(value)
