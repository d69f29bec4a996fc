"""The partition file: which neurons of every FFN go where, and the fitted routers. calibrate writes, upcycle reads.

layer.L.shared   [S * w] I32  neurons of the shared expert, where there is one
layer.L.experts  [E, w]  I32  neurons of every routed expert; those that are always on come first
layer.L.router   [E, H]  F32  router rows at a standard deviation of 1 of the logits; zero for experts always on
layer.L.always   [E]     F32  1 for an expert that every token gets, for routers with a correction bias
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moeconv.checkpoint.artifact import read_metadata_json
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.errors import InputError

KIND = "partition"
VERSION = 1
ORIGIN = "partition"  # what a plan's inputs call the file: execute(..., origins={ORIGIN: partition.file})
# Router rows are written times this. Softmax or sigmoid of such logits are equal to about 2^-16, so that all chosen
# experts weigh the same, and float32 still tells logits apart that differ by a hundredth of their standard deviation.
ROUTER_SCALE = 2.0**-16


@dataclass(frozen=True, eq=False)
class Partition:
    """A partition file; `metadata` is its provenance: identity, experts, shared, top_k, layers [{layer, error, ..}]."""

    metadata: Mapping[str, Any]
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
        """Raises InputError unless it was made for this model and these numbers."""
        made, wanted = self.metadata, {"identity": identity, "experts": experts, "top_k": top_k, "width": width,
                                       "shared": shared}  # fmt: skip
        for key, value in wanted.items():
            if made.get(key) != value:
                raise InputError(
                    f"{self.file.label} was made for another {'model' if key == 'identity' else key.replace('_', '-')}",
                    hint="Measure again with these options.",
                )


def load_partition(path: str | os.PathLike[str]) -> Partition:
    """Open a partition file. Raises InputError when it is missing, damaged or something else."""
    file = SafetensorsFile(Path(path))
    metadata = read_metadata_json(file, kind=KIND)
    if metadata.get("version") != VERSION or not isinstance(metadata.get("layers"), list):
        raise InputError(f"{file.label} is of another version", hint="Measure again with this version.")
    return Partition(metadata, file)
