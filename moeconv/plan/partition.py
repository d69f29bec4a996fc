"""The partition file: the neurons of every expert, and the fitted routers. `upcycle --method split` writes and reads
it.

layer.L.shared   [S * w] I32  neurons of the shared expert, where there is one
layer.L.experts  [E, w]  I32  neurons of every routed expert; the experts that are always on come first
layer.L.router   [E, H]  F32  router rows at a standard deviation of 1 of the logits; zero for experts always on
layer.L.always   [E]     F32  1 for an expert that every token gets, else 0; for routers with a correction bias
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moeconv.checkpoint.artifact import read_metadata_json
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.errors import InputError
from moeconv.types import JsonObject

KIND = "partition"
VERSION = 1
ORIGIN = "partition"  # what a plan's inputs call the file: execute(..., origins={ORIGIN: partition.file})
# The factor of router rows when they are written. The softmax or sigmoid scores of such logits are equal to about
# 2^-16,
# so that all chosen experts have the same weight. float32 still distinguishes logits that differ by a hundredth of
# their standard deviation.
ROUTER_SCALE = 2.0**-16


@dataclass(frozen=True, eq=False)
class Partition:
    """A partition file. `metadata` is its provenance: identity, experts, shared, top_k, layers [{layer, error, ..}]."""

    metadata: JsonObject
    file: SafetensorsFile

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(row["layer"] for row in self.metadata["layers"])

    @cached_property
    def fingerprint(self) -> str:
        """hex sha256 of the file."""
        digest = hashlib.sha256(self.file.header_bytes)
        for name in self.file.tensors:
            digest.update(self.file.read(name))
        return digest.hexdigest()

    def check(self, *, identity: str, experts: int, top_k: int, width: int, shared: int) -> None:
        """Raises InputError for a partition that was made for another model or for other numbers."""
        made, wanted = self.metadata, {"identity": identity, "experts": experts, "top_k": top_k, "width": width,
                                       "shared": shared}  # fmt: skip
        for key, value in wanted.items():
            if made.get(key) != value:
                raise InputError(
                    f"{self.file.label} was made for another {'model' if key == 'identity' else key.replace('_', '-')}",
                    hint="Measure the partition again with these options.",
                )


def load_partition(path: str | os.PathLike[str]) -> Partition:
    """Open a partition file. Raises InputError when it is missing, damaged, or another kind of file."""
    file = SafetensorsFile(Path(path))
    metadata = read_metadata_json(file, kind=KIND)
    if metadata.get("version") != VERSION or not isinstance(metadata.get("layers"), list):
        raise InputError(
            f"{file.label} was written by another version", hint="Measure the partition again with this version."
        )
    return Partition(metadata, file)
