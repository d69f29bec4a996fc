"""Can the output of a plan be opened again? Every header and the index are compared with the limits of the readers."""

from __future__ import annotations

from moeconv.checkpoint.header import header_limits, json_length
from moeconv.checkpoint.strictjson import Limits, index_limits
from moeconv.errors import OutputError
from moeconv.plan.plan import Plan

_LINE = 16  # bytes of an index entry besides its two names, or a few more


def check_limits(plan: Plan) -> None:
    """Raises OutputError, before any work, for a file that the reader of moeconv or of safetensors would refuse."""
    if plan.gguf:
        return
    for shard in plan.shards:
        length, values, size = shard.cost
        _check(shard.name, length, values, header_limits(size))
    if len(plan.shards) > 1:
        names = [(spec.name, shard.name) for shard in plan.shards for item in shard.items for spec in item.outputs]
        length = sum(json_length(name) + len(file) + _LINE for name, file in set(names))
        _check("the index", length, len(names), index_limits(plan.nbytes))


def _check(what: str, length: int, values: int, limits: Limits) -> None:
    if length > limits.bytes or values > limits.values:
        raise OutputError(
            f"{what} would have {length} bytes of JSON with about {values} values, more than can be opened again "
            f"({limits.bytes} and {limits.values})",
            hint="Pass a smaller --shard-size, so that the tensors are divided into more files.",
        )
