"""Overlays in a plan: planned items whose tensors something measured has already made take its bytes instead."""

from __future__ import annotations

import hashlib

from moeconv.checkpoint.overlay import Overlay
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.errors import InputError, escape
from moeconv.plan.plan import Input, Item

ORIGIN = "overlay"  # what a plan's inputs call the overlay: execute(..., origins={ORIGIN: overlay})
_SAMPLES = 16
_SAMPLE_BYTES = 4096


def fingerprint(overlay: Overlay | SafetensorsFile) -> str:
    """hex sha256 of the headers of an overlay's files and of fixed samples of their bytes, so that a plan's id follows
    its content."""
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
    """The item itself, or copies of the overlay's tensors where that holds the item's outputs.

    Raises InputError when it holds some of them, or in another dtype or shape.
    """
    if not any(spec.name in overlay.tensors for spec in item.outputs):
        return [item]
    copies = []
    for spec in item.outputs:
        info = overlay.tensors.get(spec.name)
        if info is None or (info.dtype, info.shape) != (spec.dtype, spec.shape):
            raise InputError(
                f"{overlay.label}: {escape(spec.name)!r} is not {spec.dtype} {list(spec.shape)}",
                hint="It was made for other parameters; make it again.",
            )
        source = Input(info.name, info.dtype, info.shape, 0, info.nbytes, ORIGIN)
        copies.append(Item((spec,), "copy", (source,), {}, item.changed))
    return copies
