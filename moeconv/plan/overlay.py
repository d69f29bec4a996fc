"""Overlays in a plan: where an overlay has the tensors of a planned item, its bytes are copied instead."""

from __future__ import annotations

import hashlib

from moeconv.checkpoint.overlay import Overlay
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.errors import InputError, escape
from moeconv.plan.plan import Input, Item

ORIGIN = "overlay"  # the origin of the overlay's tensors in a plan: execute(..., origins={ORIGIN: overlay})
_SAMPLES = 16
_SAMPLE_BYTES = 4096


def fingerprint(overlay: Overlay | SafetensorsFile) -> str:
    """hex sha256 of the headers of an overlay's files and of fixed samples of their bytes, so that the id of a plan
    depends on the content."""
    digest = hashlib.sha256()
    for file in overlay.files if isinstance(overlay, Overlay) else (overlay,):
        digest.update(file.header_bytes)
        size = min(file.size, _SAMPLE_BYTES)
        view = memoryview(bytearray(size))
        for i in range(_SAMPLES):
            file.read_at((file.size - size) * i // (_SAMPLES - 1), view)
            digest.update(view)
    return digest.hexdigest()


def from_overlay(item: Item, overlay: Overlay) -> list[Item]:
    """Copies of the overlay's tensors where it has the outputs of the item, and otherwise the item itself.

    Raises InputError where it has only some of the outputs, or has them with another dtype or shape.
    """
    if not any(spec.name in overlay.tensors for spec in item.outputs):
        return [item]
    copies = []
    for spec in item.outputs:
        info = overlay.tensors.get(spec.name)
        if info is None or (info.dtype, info.shape) != (spec.dtype, spec.shape):
            raise InputError(
                f"{overlay.label}: {escape(spec.name)!r} is not {spec.dtype} {list(spec.shape)}",
                hint="The overlay was made for other parameters. Make it again.",
            )
        source = Input(info.name, info.dtype, info.shape, 0, info.nbytes, ORIGIN)
        copies.append(Item((spec,), "copy", (source,), {}, item.changed))
    return copies
