"""The options of `moeconv import`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moeconv.options.declare import Panel, option


@dataclass(frozen=True)
class ImportOptions:
    """Options that determine the content of an imported checkpoint."""

    PANEL: ClassVar[Panel] = "Output"

    dtype: str = option(
        "bfloat16", "Dtype of the weights that are written.", choices=("bfloat16", "float16", "float32")
    )
    shard_size: str = option("5GB", "Largest size of an output shard.", metavar="SIZE")
