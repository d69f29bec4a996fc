"""The layout of GPTQ checkpoints (AutoGPTQ, GPTQModel): what quantization_config says about a module's weight."""

from __future__ import annotations

import re
from collections.abc import Callable

from moeconv.errors import InputError, escape
from moeconv.families.encodings import Encoding
from moeconv.families.foreign import unread
from moeconv.types import Config

_ROWS = {"gptq": "gptq", "gptq_v2": "gptq-v2"}  # checkpoint_format -> row of encodings.PARTS
_BITS = (2, 3, 4, 8)
_CORRECT = "Correct config.json, or download it again."


def gptq_encodings(quantization: Config) -> tuple[Encoding, ...]:
    """The forms of all modules: that of the settings, then those of `dynamic`, GPTQModel's settings per module."""
    others = (_encoding({**quantization, **changed}) for _, changed in _dynamic(quantization) if changed is not None)
    return tuple(dict.fromkeys((_encoding(quantization), *others)))


def gptq_form(quantization: Config) -> Callable[[str, str], Encoding | None]:
    """A function from a module's names (as stored, as in memory) to the form of its weight; None if it is unquantized.

    The first expression of `dynamic` that matches the beginning of the name counts, as in GPTQModel.
    """
    usual = _encoding(quantization)
    rules = [
        (expression, None if changed is None else _encoding({**quantization, **changed}))
        for expression, changed in _dynamic(quantization)
    ]

    def form(stored: str, _in_memory: str) -> Encoding | None:
        return next((own for expression, own in rules if expression.match(stored)), usual)

    return form


def _dynamic(quantization: Config) -> list[tuple[re.Pattern[str], Config | None]]:
    """The expressions of `dynamic` with the settings that they change; None where they exclude ("-:")."""
    stated = quantization.get("dynamic") or {}
    if not isinstance(stated, dict) or not all(isinstance(changed, dict) for changed in stated.values()):
        raise InputError("config.json: quantization_config.dynamic must be an object of objects", hint=_CORRECT)
    found: list[tuple[re.Pattern[str], Config | None]] = []
    for pattern, changed in stated.items():
        try:
            expression = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise unread(f"GPTQ with the expression {escape(pattern)[:80]} in dynamic") from error
        found.append((expression, None if pattern.startswith("-:") else changed))
    return found


def _encoding(settings: Config) -> Encoding:
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    bits, size = settings.get("bits"), settings.get("group_size", 128)
    row = _ROWS.get(layout.lower()) if isinstance(layout, str) else None
    if row is None or settings.get("is_marlin_format") or settings.get("pack_dtype", "int32") != "int32":
        raise unread(f"GPTQ in the layout {escape(layout)} (checkpoint_format)")
    if type(bits) is not int or bits not in _BITS or type(size) is not int or not (size == -1 or size > 0):
        raise unread(f"GPTQ with {escape(bits)} bits in groups of {escape(size)}")
    ordered = settings.get("desc_act") is True
    return Encoding(row, bits, (1, None if size == -1 else size), zero_points=True, scale="scales", ordered=ordered)
