"""Options that several commands take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moeconv.errors import UsageError
from moeconv.options.declare import Panel, option
from moeconv.options.defaults import EVALUATE_SEQ_LEN, SEQ_LEN, TOKENS
from moeconv.options.values import parse_size


@dataclass(frozen=True)
class ReadOptions:
    """How checkpoints are read."""

    PANEL: ClassVar[Panel] = "Running"

    follow_links: bool = option(
        False, "Let files of a checkpoint be links that leave its directory, as old downloads with --local-dir have."
    )


@dataclass(frozen=True)
class PlanOptions:
    """Options that determine the content of a written checkpoint, and so the id of its plan."""

    PANEL: ClassVar[Panel] = "Output"

    seed: int = option(0, "Seed of every random draw.", panel="Running")
    dtype: str | None = option(
        None,
        "Dtype of the weights that are written (default: the source's).",
        choices=("bfloat16", "float16", "float32"),
    )
    shard_size: str = option("5GB", "Largest size of an output shard.", metavar="SIZE")
    shard_by: str = option(
        "size",
        "How tensors are grouped into shards: in order up to the size, one shard per layer, or one per expert.",
        choices=("size", "layer", "expert"),
    )


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is written; these options do not change its content."""

    PANEL: ClassVar[Panel] = "Running"

    dry_run: bool = option(False, "Stop after the plan: print what would be written, and write nothing.")
    no_check: bool = option(False, "Skip the check of the written model against the source.")
    strict: bool = option(False, "Refuse what would otherwise be a warning (NaN in a source tensor).")
    jobs: int | None = option(None, "Workers (default: one per processor, as far as memory suffices).")
    part: str | None = option(
        None,
        "Write only share I of N of the shards, given as I/N with I from 0; the share that finishes last "
        "completes OUT.",
        metavar="I/N",
    )
    overwrite: bool = option(
        False, "Replace an existing OUT when the new directory is complete. OUT must be empty, an output of "
        "moeconv, or a single checkpoint with nothing else in it.", panel="Output",
    )  # fmt: skip


@dataclass(frozen=True)
class DryOptions:
    """Whether a command that only measures runs anything."""

    PANEL: ClassVar[Panel] = "Running"

    dry_run: bool = option(False, "Print how much memory the command will take, and stop: run nothing, write nothing.")


@dataclass(frozen=True)
class MeasureOptions:
    """How a model is run."""

    PANEL: ClassVar[Panel] = "Running"

    device: str = option("auto", "Device to compute on.", choices=("auto", "cpu", "cuda"))
    max_memory: str | None = option(None, "Most memory to use, such as 16GB (default: what is free).", metavar="SIZE")
    max_device_memory: str | None = option(
        None, "Most memory of the GPU to use, such as 20GB (default: what is free there).", metavar="SIZE"
    )
    batch_size: int = option(8, "Sequences per forward pass.")
    seq_len: int | None = option(
        None,
        f"Tokens per sequence (default: {SEQ_LEN}, evaluate: {EVALUATE_SEQ_LEN}; at most the model's).",
        panel="Data",
    )
    tokens: int | None = option(
        None, f"Tokens to use, sampled with the seed (default: {TOKENS}; evaluate: all; tune by distill or lm: as many "
        "as its steps take).", panel="Data",
    )  # fmt: skip
    text_field: str = option(
        "text",
        "Name of the record field that holds the text (default: text, otherwise messages or conversations).",
        metavar="NAME",
        panel="Data",
    )

    def __post_init__(self) -> None:
        """Raises UsageError for a value that is refused whether or not the command measures anything."""
        for name in ("batch_size", "seq_len", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        for name in ("max_memory", "max_device_memory"):
            if (size := getattr(self, name)) is not None:
                parse_size(size, flag=f"--{name.replace('_', '-')}")


@dataclass(frozen=True)
class DataOptions:
    """The text on which a model is run."""

    PANEL: ClassVar[Panel] = "Data"

    data: tuple[str, ...] = option(
        (), "A file of text, JSON, JSON lines, CSV or Parquet; a directory; - for standard input; or "
        "hf://datasets/OWNER/NAME[:CONFIG[:SPLIT]]. Repeatable; FILE=WEIGHT sets a weight.", reads="data"
    )  # fmt: skip


@dataclass(frozen=True)
class StatisticsOptions:
    """Which statistics --stats accepts."""

    PANEL: ClassVar[Panel] = "Data"

    stats_of_twin: bool = option(
        False,
        "Accept --stats of the same model in another dtype or quantization; statistics of another model are refused.",
    )


@dataclass(frozen=True)
class ArtifactOptions:
    """How a single output file is written."""

    PANEL: ClassVar[Panel] = "Output"

    overwrite: bool = option(False, "Replace the file, of the same kind, when the new one is complete.")


@dataclass(frozen=True)
class SeedOptions:
    """The seed of a command without PlanOptions."""

    PANEL: ClassVar[Panel] = "Running"

    seed: int = option(0, "Seed of every random draw.")
