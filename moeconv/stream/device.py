"""The device on which a model runs, and how much of its memory may be used."""

from __future__ import annotations

from dataclasses import replace

import torch

from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.stream.need import Workload, device_need
from moeconv.units import human_bytes

_FLAG = "--max-device-memory"
_LIMITS: dict[int, int] = {}  # bytes by CUDA device; torch's allocator holds this process to them


def pick_device(word: str, max_memory: int | None = None) -> torch.device:
    """The device of `auto`, `cpu` or `cuda`, of whose memory this process may use `max_memory` bytes (None: all).
    Raises UsageError for `cuda` without such a device, and for a limit on the CPU."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if word == "auto" else word)
    if word == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device", hint="Pass --device cpu.")
    if device.type == "cpu":
        if max_memory is not None:
            raise UsageError(
                f"{_FLAG} limits the memory of a GPU, and the model runs on the CPU",
                hint="Leave it out. --max-memory limits the memory of the machine.",
            )
        return device
    index = torch.cuda.current_device()
    total = torch.cuda.mem_get_info(index)[1]
    limit = total if max_memory is None else min(total, max_memory)
    torch.cuda.set_per_process_memory_fraction(limit / total, index)
    _LIMITS[index] = limit
    return device


def room_on(device: torch.device) -> int:
    """The bytes that this process may still allocate on a CUDA device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    used = torch.cuda.memory_allocated(index)
    kept = torch.cuda.memory_reserved(index) - used  # torch allocates from this first
    return max(0, min(free + kept, _LIMITS.get(index, total) - used))


def batch_within(model: Model, run: Workload, room: int, *, what: str) -> int:
    """The largest batch size, at most that of `run`, with which it takes at most `room` bytes on the device. Training
    keeps the batch size, because it is a part of what is computed. Raises UsageError if there is none."""
    for size in range(run.batch_size, 0, -1):
        need = device_need(model, replace(run, batch_size=size))
        if need <= room:
            return size
        if run.trains:
            break
    raise UsageError(
        f"{what} takes at least {human_bytes(need)} of the device's memory, and {human_bytes(room)} may be used",
        hint=f"Raise {_FLAG}, or lower --batch-size or --seq-len.",
    )
