"""The processes that share one command: `torchrun -m moeconv calibrate|tune|prune|quantize ...` starts one per device.

Without a launcher there is one process, and the functions here do nothing. Importing this module does not load torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from moeconv.errors import InputError, Interrupted, MoeconvError, UsageError
from moeconv.types import JsonObject
from moeconv.units import counted

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

_PATIENCE = 20.0  # seconds that the first process waits until the others have read how the command ended
_STEP = 0.05
_ERROR, _ENDED, _LEFT = "moeconv/error", "moeconv/ended", "moeconv/left"


@dataclass(frozen=True)
class World:
    """The number of this process, and the number of all processes. The first process reads the data, writes and
    prints."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0


def launched() -> World:
    """The processes that the launcher started, according to the environment. They need not have joined yet."""
    words = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not (all(word.isdecimal() for word in words) and os.environ.get("MASTER_ADDR")):
        return World()
    rank, size = map(int, words)
    return World(rank, size) if rank < size else World()


def current() -> World:
    """The processes that have joined: those of torch's process group, if there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return World()
    return World(distributed.get_rank(), distributed.get_world_size())


_store: Any = None  # key-value store that the processes share, for errors and for the end


def join() -> None:
    """Join the other processes of the launcher. gloo exchanges tensors on the CPU, and NCCL those on CUDA, where each
    process uses the device of its local rank."""
    global _store
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    # a process may read data or write a model for hours; if one ends, the others notice it at once
    wait = timedelta(days=1)
    store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=10)))
    store.set_timeout(wait)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=wait
    )
    _store = store


def end_together(error: MoeconvError | Interrupted | None) -> MoeconvError | Interrupted | None:
    """The error with which the command ends in every process: the first one of any process, or None.

    An error is written to the shared store, and the connections are closed. A process that waits for this one in a
    collective operation then fails too, and reads the error from the store.
    """
    global _store
    store, _store = _store, None
    if store is None:
        return error
    world, found = current(), None
    # if the launcher has ended, so has the store, and this process returns its own error
    with contextlib.suppress(Exception):
        if error is not None:
            fields = {"code": error.exit_code, "message": error.message, "hint": error.hint}
            store.compare_set(_ERROR, "", json.dumps(fields))
            _close_connections()
        store.add(_ENDED, 1)
        while not store.check([_ERROR]) and store.add(_ENDED, 0) < world.size:
            time.sleep(_STEP)
        found = json.loads(store.get(_ERROR)) if store.check([_ERROR]) else None
        if found is None:
            _close_connections(all_ended=True)
        left = store.add(_LEFT, 1)
        until = time.monotonic() + _PATIENCE
        while world.leads and left < world.size and time.monotonic() < until:  # the store may be part of this process
            time.sleep(_STEP)
            left = store.add(_LEFT, 0)
    return error if found is None else _error_from(found, error)


def _close_connections(*, all_ended: bool = False) -> None:
    from torch import distributed

    if all_ended or "nccl" not in distributed.get_backend_config():
        distributed.destroy_process_group()  # with NCCL this would wait for the others; the launcher ends them


def _error_from(fields: JsonObject, mine: MoeconvError | Interrupted | None) -> MoeconvError | Interrupted:
    """The error that a process wrote to the store; `mine` if this process wrote it."""
    if mine is not None and mine.message == fields["message"]:
        return mine
    error = MoeconvError(fields["message"], hint=fields["hint"])
    error.exit_code = fields["code"]
    return error


def summed(tensor: T) -> T:
    """Replace a torch tensor by its sum over the processes, in place, and return it."""
    if current().size > 1:
        from torch import distributed

        distributed.all_reduce(tensor)
    return tensor


def first(make: Callable[[], T]) -> T:
    """The result of `make` in the first process, in all processes. `make` is called only there."""
    world = current()
    if world.size == 1:
        return make()
    import torch
    from torch import distributed

    box = [make() if world.leads else None]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def all_agree(flag: bool) -> bool:
    """Whether a flag is set in every process."""
    if current().size == 1:
        return flag
    import torch

    return int(summed(torch.tensor(int(flag)))) == current().size


# -- work that is shared --------------------------------------------------------------------------------------------


def check_alone(what: str, *, hint: str) -> None:
    """Raises UsageError if the launcher started several processes for `what`, which one process does."""
    if current().size > 1:
        raise UsageError(f"{what} runs in one process, and the launcher started {current().size}", hint=hint)


def announce(job: str | None, *arguments: object) -> None:
    """Called by the first process: all processes now do `job`, or with None what the first process shares is done."""
    first(lambda: (job, arguments))


def follow(jobs: Mapping[str, Callable[..., object]]) -> None:
    """Called by all other processes: do what the first one announces, until it announces None."""
    while True:
        job, arguments = first(lambda: (None, ()))
        if job is None:
            return
        jobs[job](*arguments)


def deal(count: int, *, batch_size: int, world: World) -> tuple[np.ndarray, int]:
    """(the windows of this process int64 [n], the batch size). The processes take whole batches in turn, so that a
    batch has the same windows whichever process runs it. Raises InputError if there are fewer windows than
    processes."""
    import numpy as np

    if count < world.size:
        raise InputError(
            f"the data fills {counted(count, 'sequence')}, fewer than the {world.size} processes",
            hint="Give more text, a smaller --seq-len, or start fewer processes.",
        )
    size = max(1, min(batch_size, count // world.size))
    return np.flatnonzero(np.arange(count) // size % world.size == world.rank), size
