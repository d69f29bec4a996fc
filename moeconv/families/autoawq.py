"""The layout of AWQ checkpoints (AutoAWQ, version gemm): what quantization_config says about a module's weight."""

from __future__ import annotations

import re
from collections.abc import Callable

from moeconv.errors import escape
from moeconv.families.encodings import Encoding
from moeconv.families.foreign import unread
from moeconv.families.module_groups import listed_names
from moeconv.types import Config

_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def awq_encodings(quantization: Config) -> tuple[Encoding, ...]:
    """The only form of packed weights that the settings allow."""
    version = quantization.get("version") or quantization.get("format") or "gemm"
    bits = quantization.get("bits", quantization.get("w_bit", 4))
    size = quantization.get("group_size", quantization.get("q_group_size", 128))
    if not isinstance(version, str) or version.lower() != "gemm" or quantization.get("backend") == "llm-awq":
        raise unread(f"AWQ in the layout {escape(version)} (version)")
    if quantization.get("zero_point", True) is not True:
        raise unread("AWQ without zero points (zero_point)")
    if bits != 4 or type(bits) is not int or type(size) is not int or not (size == -1 or size > 0):
        raise unread(f"AWQ with {escape(bits)} bits in groups of {escape(size)}")
    return (Encoding("awq", 4, (1, None if size == -1 else size), zero_points=True, scale="scales"),)


def awq_form(quantization: Config) -> Callable[[str, str], Encoding | None]:
    """A function from a module's names (as stored, as in memory) to the form of its weight; None for a module that
    `modules_to_not_convert` leaves unquantized by the rule of transformers (should_convert_module)."""
    (usual,) = awq_encodings(quantization)
    key = "modules_to_not_convert"
    words = listed_names(quantization.get(key), key)
    try:
        expressions = [re.compile(f"(?:{word}){_BOUNDARY}") for word in words]
    except re.error as error:
        raise unread(f"AWQ with an expression in {key} that cannot be read") from error
    ends = tuple(words)

    def form(stored: str, in_memory: str) -> Encoding | None:
        names = (stored, in_memory)
        plain = any(name.endswith(ends) or any(one.match(name) for one in expressions) for name in names)
        return None if plain else usual

    return form
