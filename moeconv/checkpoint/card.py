"""Reads the fields of a source's model card that the card of an output repeats."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from moeconv.checkpoint.paths import hub_name
from moeconv.checkpoint.reader import Checkpoint
from moeconv.types import JsonObject

CARD_NAME = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # OWNER/NAME
_MOST = 1 << 16  # bytes of a source's card that are read
_CARRIED = ("license", "license_name", "license_link", "language", "base_model", "datasets", "tags")


def source_metadata(source: Checkpoint, keys: Sequence[str] = _CARRIED) -> JsonObject:
    """Fields of the source's card, as far as they can be read: licence, language, base model, datasets and tags, or
    `keys`."""
    import yaml

    text = ""
    if source.beside().get(CARD_NAME):
        with open(source.confined(CARD_NAME), encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST)
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    if not found:
        return {}
    try:
        value = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {key: words for key in keys if (words := _words(value.get(key))) is not None}


def _words(value: object) -> str | list[str] | None:
    """A short printable string, or a list of such strings; None for any other value."""
    if isinstance(value, list):
        words = [w for item in value[:50] if isinstance(w := _words(item), str)]
        return words or None
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 200 else None


def parent_names(source: Checkpoint) -> list[str]:
    """The names on the hub by which the card of an output calls this source: its own name, where its directory or its
    config states it, or the base models that its card names."""
    if own := hub_name(source.path):
        return [own]
    if source.manifest is None:
        name = source.config.get("_name_or_path")
        if isinstance(name, str) and _HUB_ID.fullmatch(name) and not os.path.exists(name):
            return [name]
    base = source_metadata(source).get("base_model")
    return [] if base is None else [base] if isinstance(base, str) else list(base)
