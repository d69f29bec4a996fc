"""The options of `moeconv calibrate`."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option
from moeconv.options.defaults import LEAST_SAMPLE, NEURON_TOKENS, SAMPLE_TOKENS


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of `moeconv calibrate` only."""

    sample_tokens: int | None = option(
        None, f"Tokens per layer on which all experts are compared (default: {SAMPLE_TOKENS}, with many experts fewer, "
        f"at least {LEAST_SAMPLE}), or whose FFN inputs are kept (dense, default: {NEURON_TOKENS})."
    )  # fmt: skip


@dataclass(frozen=True)
class MergeOptions:
    """Options of `moeconv calibrate` for merging statistics files instead of running data."""

    merge: tuple[str, ...] = option(
        (), "Instead of running data: add these statistics files; repeatable.", reads="file"
    )


@dataclass(frozen=True)
class ImatrixOptions:
    """Options of `moeconv calibrate` for an importance matrix in place of statistics."""

    imatrix: str | None = option(
        None, "Write llama.cpp's importance matrix to this file (.gguf), in place of STATS.", metavar="FILE",
        panel="Output",
    )  # fmt: skip
