"""`-` as MODEL: standard input holds a path, or the JSON of the previous step, whose `output` is the path."""

from __future__ import annotations

import json
import os

from moeconv.errors import InputError, escape


def model_from_stdin(data: bytes) -> str:
    """The model's path from standard input. Raises InputError when it is empty or the previous step failed."""
    text = os.fsdecode(data).strip()  # a path may contain bytes that are not UTF-8
    if not text:
        raise InputError("standard input is empty: the previous step printed no result", hint="See its messages above.")
    if not text.startswith("{"):
        return text.splitlines()[-1].strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(
            "standard input is neither a path nor JSON", hint="Pass --json to the previous step."
        ) from None
    if "error" in value:
        message = value["error"].get("message", "") if isinstance(value["error"], dict) else ""
        raise InputError(f"the previous step failed: {escape(message)}", hint="Correct that step first.")
    if value.get("ok") is False or value.get("passed") is False:
        raise InputError("the check before this step did not pass", hint="See its messages above.")
    output = value.get("output") or value.get("path")  # what a step wrote, or the model that it looked at
    if not isinstance(output, str) or not output:
        raise InputError(
            "the JSON on standard input has neither `output` nor `path`", hint="Pipe in a step that names a checkpoint."
        )
    if value.get("dry_run"):
        raise InputError("the previous step was a dry run, which wrote no checkpoint", hint="Run it without --dry-run.")
    return output
