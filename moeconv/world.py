"""The processes that share one command: `torchrun -m moeconv calibrate|tune ...` starts it once for each device.

Without a launcher there is one process, and everything here is the identity. Importing this loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from moeconv.errors import Interrupted, MoeconvError

T = TypeVar("T")

_PATIENCE = 20.0  # seconds that the first process waits for the others to hear how it ended
_STEP = 0.05
_ERROR, _ENDED, _LEFT = "moeconv/error", "moeconv/ended", "moeconv/left"


@dataclass(frozen=True)
class World:
    """This process's number and how many there are. The first one reads the data, writes and speaks."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0


def launched() -> World:
    """What the launcher says in the environment, before anybody has joined."""
    words = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not (all(word.isdecimal() for word in words) and os.environ.get("MASTER_ADDR")):
        return World()
    rank, size = map(int, words)
    return World(rank, size) if rank < size else World()


def current() -> World:
    """The processes that joined: torch's process group, where there is one."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return World()
    return World(distributed.get_rank(), distributed.get_world_size())


_store: Any = None  # where the processes of this command leave word


def join() -> None:
    """Meet the other processes: gloo for tensors on the CPU, NCCL on CUDA, where each takes the device of its local
    rank."""
    global _store
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    wait = timedelta(days=1)  # a process may read data or write a model for hours; one that dies is noticed at once
    store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=10)))
    store.set_timeout(wait)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=wait
    )
    _store = store


def settle(error: MoeconvError | Interrupted | None) -> MoeconvError | Interrupted | None:
    """What the command ends with in every process: the first error of any of them, None when all are done.

    An error is left in the store and the connections are closed, so that whoever waits for this process in a collective
    fails too and finds it there.
    """
    global _store
    store, _store = _store, None
    if store is None:
        return error
    world, heard = current(), None
    with contextlib.suppress(Exception):  # the store is gone with the launcher: then one's own error must do
        if error is not None:
            said = {"code": error.exit_code, "message": error.message, "hint": error.hint}
            store.compare_set(_ERROR, "", json.dumps(said))
            _hang_up()
        store.add(_ENDED, 1)
        while not store.check([_ERROR]) and store.add(_ENDED, 0) < world.size:
            time.sleep(_STEP)
        heard = json.loads(store.get(_ERROR)) if store.check([_ERROR]) else None
        if heard is None:
            _hang_up(whole=True)
        left = store.add(_LEFT, 1)
        until = time.monotonic() + _PATIENCE
        while world.leads and left < world.size and time.monotonic() < until:  # the store may live in this process
            time.sleep(_STEP)
            left = store.add(_LEFT, 0)
    return error if heard is None else _heard(heard, error)


def _hang_up(*, whole: bool = False) -> None:
    from torch import distributed

    if whole or "nccl" not in distributed.get_backend_config():
        distributed.destroy_process_group()  # NCCL's would wait for the others, which the launcher ends


def _heard(said: dict[str, Any], mine: MoeconvError | Interrupted | None) -> MoeconvError | Interrupted:
    if mine is not None and mine.message == said["message"]:
        return mine
    error = MoeconvError(said["message"], hint=said["hint"])
    error.exit_code = said["code"]
    return error


def summed(tensor: Any) -> Any:
    """Replace a tensor by its sum over the processes, and return it."""
    if current().size > 1:
        from torch import distributed

        distributed.all_reduce(tensor)
    return tensor


def first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them. `make` is called there alone."""
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
