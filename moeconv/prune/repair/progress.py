"""What is kept of a pass with a pruned variant, so that an interrupted one resumes at a layer boundary: beside the
activations of both models, the record of each layer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from moeconv.calibrate.state import EVERY, Fields, SavedProgress, run_key
from moeconv.data.windows import TokenData
from moeconv.plan.meter import Meter
from moeconv.prune.repair.heal import HealOutcome
from moeconv.prune.repair.narrow import NarrowOutcome
from moeconv.prune.repair.refit import RefitOutcome
from moeconv.prune.repair.variant import Variant
from moeconv.stream.layers import LayerStream

_RECORDS = {
    "fitted": RefitOutcome, "narrowed": NarrowOutcome, "healed": HealOutcome, "shared_fitted": RefitOutcome,
    "shared_narrowed": NarrowOutcome,
}  # fmt: skip
_NEURONS = ("neurons", "shared_neurons")


class ByLayer(Protocol):
    """The file that the pass writes, by layer."""

    def keep(self, keys: Collection[int]) -> None: ...

    def complete(self, key: int) -> bool: ...


class PassProgress:
    """Saves the state of a pass beside `target`, at most every `every` seconds (0: at every layer, None: never).
    `written` is the overlay that the pass writes, if there is one."""

    def __init__(
        self, target: Path, stream: LayerStream, read: TokenData, *, meter: Meter, every: float | None = EVERY,
        written: ByLayer | None = None,
    ) -> None:  # fmt: skip
        self._stream, self._written, self._fields = stream, written, Fields()
        whole = None if written is None else written.complete
        self._saved = SavedProgress(target, key=run_key(stream, read), every=every, meter=meter, whole=whole)

    def resume(self, variant: Variant) -> None:
        """Continue after the last layer that was saved: with the activations of both models, and with what was recorded
        of the layers before."""
        self._saved.beside = [variant.hidden]
        self._fields = self._saved.resume(self._stream)
        if self._written is not None:
            self._written.keep(self._fields.keys())
        for layer, fields in self._fields.items():
            _restore(variant, layer, fields)

    def save(self, variant: Variant, layer: int) -> None:
        """Record a layer, and save the state behind it if a save is due."""
        if layer in variant.keep:
            self._fields[layer] = _record(variant, layer)
        if layer + 1 < self._stream.model.num_layers:
            self._saved.save(self._stream, layer + 1, self._fields)

    def remove(self) -> None:
        """Delete the state when the work is done."""
        self._saved.remove()


def _record(variant: Variant, layer: int) -> dict[str, np.ndarray]:
    """What the pass found for a layer."""
    rows = {name: [asdict(r) for r in getattr(variant, name) if r.layer == layer] for name in _RECORDS}
    fields = {"keep": np.array(variant.keep[layer], np.int64), "rows": _text(rows)}
    for name in _NEURONS:
        if layer in (found := getattr(variant, name)):
            fields[name] = found[layer].cpu().numpy()
    return fields


def _restore(variant: Variant, layer: int, fields: Mapping[str, np.ndarray]) -> None:
    variant.keep[layer] = fields["keep"].tolist()
    for name in fields.keys() & {*_NEURONS}:
        getattr(variant, name)[layer] = torch.from_numpy(fields[name])
    rows: dict[str, list[dict[str, Any]]] = json.loads(fields["rows"].tobytes())
    for name, kind in _RECORDS.items():
        getattr(variant, name).extend(kind(**row) for row in rows[name])


def _text(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)
