"""The rotary parameters in the metadata for llama.cpp."""

from __future__ import annotations

from typing import Any

from moeconv.families.model import Model
from moeconv.families.rope import read_rope


def rope_of(model: Model) -> dict[str, Any]:
    """The rotary parameters of full attention."""
    family = model.family
    config = {**family.config.defaults, **model.config}
    return read_rope(config, theta=10000.0, partial=family.attention.partial)
