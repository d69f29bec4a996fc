"""The JSON Schema of what each command prints."""

from __future__ import annotations

from typing import Any

from moeconv.contract.arranged import Arranged
from moeconv.contract.calibrated import Calibrated
from moeconv.contract.collapsed import Collapsed
from moeconv.contract.evaluated import Evaluated
from moeconv.contract.failed import Failed
from moeconv.contract.imported import ImportResult
from moeconv.contract.inspected import Inspected
from moeconv.contract.listed import Families, Formats, Schemas
from moeconv.contract.pruned import Curve, Pruned
from moeconv.contract.quantized import Quantized
from moeconv.contract.ran import CopiedRecipe, Located, Ran, Reported, ShippedRecipes
from moeconv.contract.shared import Foreseen
from moeconv.contract.tuned import Tuned, TunePlanned
from moeconv.contract.upcycled import Upcycled
from moeconv.contract.verified import Verified
from moeconv.errors import UsageError, did_you_mean, escape

# command -> what it prints with --json if it succeeds; if it fails, every command prints `Failed`
RESULTS: dict[str, tuple[type, ...]] = {
    "inspect": (Inspected,),
    "upcycle": (Upcycled,),
    "calibrate": (Calibrated, Foreseen),
    "tune": (Tuned, TunePlanned),
    "prune": (Pruned, Curve),
    "quantize": (Quantized,),
    "import": (ImportResult,),
    "arrange": (Arranged,),
    "collapse": (Collapsed,),
    "evaluate": (Evaluated, Foreseen),
    "verify": (Verified,),
    "report": (Reported,),
    "run": (Ran,),
    "recipes": (ShippedRecipes, CopiedRecipe),
    "demo": (Ran, Located),
    "families": (Families,),
    "formats": (Formats,),
    "schema": (Schemas,),
}


def json_schema(command: str) -> dict[str, object]:
    """The JSON Schema (draft 2020-12) of what a command prints with --json, errors included.

    Raises KeyError for an unknown command.
    """
    from pydantic import TypeAdapter

    kinds = [*RESULTS[command], Failed]
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    about: dict[str, object] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"moeconv {command} --json",
    }
    return about | TypeAdapter(union).json_schema()


def schemas(command: str | None = None) -> Schemas:
    """The JSON Schema of one command, or of all commands. Raises UsageError for an unknown command."""
    if command is not None and command not in RESULTS:
        raise UsageError(f"there is no command {escape(command)}", hint=did_you_mean(command, RESULTS))
    return {"schemas": {name: json_schema(name) for name in RESULTS if command in (None, name)}}
