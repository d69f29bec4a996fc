"""Can the output of a plan be opened again? Every header and the index are compared with the limits of the readers."""

from __future__ import annotations

from moeconv.checkpoint.header import header_limits, json_length
from moeconv.checkpoint.strictjson import Limits, index_limits
from moeconv.errors import OutputError
from moeconv.plan.plan import Plan

_LINE = 18  # bytes of an index entry besides the characters of its two names, or a few more


def check_limits(plan: Plan) -> None:
    """Raises OutputError, before any work, for a file that the reader of moeconv or of safetensors would refuse."""
    if plan.gguf:
        return
    for shard in plan.shards:
        length, values, size = shard.cost
        _check(shard.name, length, values, header_limits(size))
    if len(plan.shards) > 1:
        _check("the index", *index_cost(plan), index_limits(plan.nbytes))


def index_cost(plan: Plan) -> tuple[int, int]:
    """(bytes, values) of the index of a plan, or a little more."""
    length = values = 0
    for shard in plan.shards:
        names = [spec.name for item in shard.items for spec in item.outputs if not spec.at]
        length += json_length("".join(names)) + len(names) * (len(shard.name) + _LINE)
        values += len(names)
    return length, values


def _check(what: str, length: int, values: int, limits: Limits) -> None:
    if length > limits.bytes or values > limits.values:
        raise OutputError(
            f"{what} would have {length} bytes of JSON with about {values} values, more than can be opened again "
            f"({limits.bytes} and {limits.values})",
            hint="Pass a smaller --shard-size, so that the tensors are divided into more files.",
        )
