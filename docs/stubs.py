"""Write moeconv/verbs.pyi, the types of the Python functions of the commands: python docs/stubs.py"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

from moeconv import requests as r
from moeconv.verbs import REQUESTS

STUB = Path(__file__).parent.parent / "moeconv" / "verbs.pyi"
# command -> what it returns, and what it returns where an option is set
RETURNS = {
    "inspect": ("Inspected", {}),
    "upcycle": ("Upcycled", {}),
    "calibrate": ("Calibrated", {"dry_run": "Foreseen"}),
    "tune": ("Tuned", {"dry_run": "TunePlanned"}),
    "prune": ("Pruned", {"curve": "Curve"}),
    "quantize": ("Quantized", {}),
    "import_gguf": ("ImportResult", {}),
    "arrange": ("Arranged", {}),
    "collapse": ("Collapsed", {}),
    "evaluate": ("Evaluated", {"dry_run": "Foreseen"}),
    "verify": ("Verified", {}),
    "report": ("Reported", {}),
    "run": ("Ran", {}),
}  # fmt: skip
_HEAD = '''"""Types of the functions in verbs.py. Made by docs/stubs.py; do not edit."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Literal, TypeAlias, overload

from moeconv.contract import (
{names}
)
from moeconv.families.model import Model
from moeconv.plan.meter import Progress

_Path: TypeAlias = str | PathLike[str]
_Paths: TypeAlias = str | PathLike[str] | Sequence[str | PathLike[str]]
_Model: TypeAlias = str | PathLike[str] | Model
_Progress: TypeAlias = Callable[[Progress], None]

REQUESTS: Mapping[str, type]
'''


def type_of(field: dataclasses.Field[object], hint: object) -> str:
    """The type of an option as a program may give it."""
    if hint == tuple[str, ...]:
        return "_Paths"
    text = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    if field.metadata["reads"]:
        return "_Model | None" if field.metadata["reads"] == "model" else "_Path | None"
    return text


def parameters(kind: type, fixed: str, *, on: bool) -> Iterator[str]:
    """The parameters of a function. The switch `fixed` must be given if `on`, and must not be set otherwise."""
    hints = get_type_hints(kind)
    for name in r.paths_of(kind):
        what = "_Model" if name in ("model", "source") else "_Path"
        yield f"{name}: {what} | None = ..." if "None" in str(hints[name]) else f"{name}: {what}"
    yield "*"
    for group in r.groups_of(kind):
        of_group = get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.name == fixed:
                yield f"{field.name}: Literal[True]" if on else f"{field.name}: Literal[False] = ..."
            else:
                yield f"{field.name}: {type_of(field, of_group[field.name])} = ..."
    yield "progress: _Progress | None = ..."


def function(command: str) -> Iterator[str]:
    """The lines of one function; one overload for each kind of result."""
    usual, others = RETURNS[command]
    for switch, returned in others.items():
        yield from ["@overload", f"def {command}("]
        yield from (f"    {p}," for p in parameters(REQUESTS[command], switch, on=True))
        yield f") -> {returned}: ..."
    switch = next(iter(others), "")
    yield from ["@overload"] * bool(others)
    yield f"def {command}("
    yield from (f"    {p}," for p in parameters(REQUESTS[command], switch, on=False))
    yield f") -> {usual}: ..."


def stub() -> str:
    """The text of the file."""
    names = sorted({name for usual, others in RETURNS.values() for name in (usual, *others.values())}, key=str.lower)
    head = _HEAD.replace("{names}", "\n".join(f"    {name}," for name in names))
    return "\n".join([head, *("\n".join(function(command)) for command in REQUESTS)]) + "\n"


if __name__ == "__main__":
    STUB.write_text(stub())
