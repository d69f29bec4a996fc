"""The check of a written output against its plan, before it is committed: headers, sizes, and what has changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moeconv.checkpoint.gguf import written_tensors
from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import CheckError, InputError, LimitError, OutputError, escape
from moeconv.plan.plan import Plan, Shard
from moeconv.units import counted

_Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype and shape, as the header of the file has them


def check_written(plan: Plan, staged: Path) -> None:
    """Read the written headers again and compare them with the plan: every tensor's name, dtype and shape, the bytes of
    all shards, and the number of changed tensors per role.

    Raises CheckError for a difference, OutputError for an output that is whole but larger than moeconv can open.
    """
    found = _written(plan, staged)
    planned = {name: (dtype, shape) for shard in plan.shards for name, dtype, shape in _planned(shard)}
    if set(planned) != {name for name, _, _ in found}:
        raise CheckError(
            f"{counted(len(found), 'tensor was', 'tensors were')} written, and the plan has {len(planned)}"
        )
    for name, dtype, shape in found:
        if (dtype, shape) != planned[name]:
            wanted, size = planned[name]
            raise CheckError(
                f"tensor {name!r} was written as {dtype} {list(shape)}, and planned as {wanted} {list(size)}"
            )
    nbytes = sum((staged / shard.name).stat().st_size for shard in plan.shards)
    if nbytes != plan.nbytes:
        raise CheckError(f"{nbytes} bytes were written, and the plan has {plan.nbytes}")
    if plan.promise and plan.promise != plan.changed:
        raise CheckError(f"the plan should change {plan.promise} and changes {plan.changed}")


def _written(plan: Plan, staged: Path) -> list[_Tensor]:
    """The tensors of the output, from the headers on disk."""
    try:
        if plan.gguf:
            return [entry for shard in plan.shards for entry in written_tensors(staged / shard.name)]
        return [(name, ref.dtype, ref.shape) for name, ref in Checkpoint(staged).tensors.items()]
    except LimitError as error:  # the output is good, so it is kept
        raise OutputError(
            f"the output is whole, but it is more than moeconv can open: {error.message}",
            hint=f"It stays in {escape(staged)}. A smaller --shard-size divides it into more files.",
        ) from None
    except InputError as error:
        raise CheckError(f"the written checkpoint cannot be opened: {error.message}") from None


def _planned(shard: Shard) -> Iterator[_Tensor]:
    if shard.gguf is not None:
        yield from ((stack.name, stack.dtype, stack.shape) for stack in shard.gguf.stacks)
    else:
        yield from ((spec.name, spec.dtype, spec.shape) for spec in shard.layout())
