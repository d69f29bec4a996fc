"""Holds what a command printed against the published JSON Schema, in which no other field may be."""

from __future__ import annotations

from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from moeconv.contract import RESULTS, json_schema


def check_json(command: str, value: object) -> None:
    """Raises AssertionError for a field that the schema lacks, or that is missing or of another kind."""
    if command in RESULTS:
        errors = sorted(_validator(command).iter_errors(value), key=lambda e: list(map(str, e.absolute_path)))
        assert not errors, "\n".join(f"{e.json_path}: {e.message[:300]}" for e in map(_deepest, errors[:5]))


@cache
def _validator(command: str) -> Draft202012Validator:
    schema = json_schema(command)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(_closed(schema))


def _closed(schema: Any) -> Any:
    """The schema with no field beside those that it names."""
    if isinstance(schema, dict):
        closed = {key: _closed(value) for key, value in schema.items()}
        if "properties" in schema:
            closed["additionalProperties"] = False
        return closed
    return [_closed(item) for item in schema] if isinstance(schema, list) else schema


def _deepest(error: Any) -> Any:
    """The error inside of the alternatives that says the most."""
    while error.context:
        error = max(error.context, key=lambda e: (len(e.absolute_path), -len(e.message)))
    return error
