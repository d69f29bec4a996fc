"""How tensors are grouped into shards: in order up to a size, one shard per layer, or one per expert (--shard-by).

Files keep the names that every loader knows; the index says where a tensor is, so loaders need no word of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from moeconv.errors import UsageError
from moeconv.families.spec import Family
from moeconv.options import PlanOptions, parse_size
from moeconv.plan.plan import Item, Shard, pack_shards

Place = tuple[int | None, int | None]


def arrange(items: Sequence[Item], common: PlanOptions, family: Family) -> tuple[Shard, ...]:
    """Items into shards as --shard-size and --shard-by say; `family` is the one whose names the items' outputs have.

    Raises UsageError for `expert` where the family keeps all experts of a layer in one tensor.
    """
    size = parse_size(common.shard_size, flag="--shard-size")
    if common.shard_by == "size":
        return pack_shards(items, shard_size=size)
    place = _places(family)
    by = 0 if common.shard_by == "layer" else 1
    groups = {id(item): place(item.outputs[0].name)[by] for item in items}
    numbers = {number for number in groups.values() if number is not None}
    if not numbers:
        raise UsageError(
            f"--shard-by {common.shard_by}: {family.model_type} keeps all experts of a layer in one tensor",
            hint="Give --shard-by layer.",
        )
    # what belongs to no layer (no expert) first, then in the order of the numbers
    ordered = sorted(items, key=lambda item: -1 if (n := groups[id(item)]) is None else n)
    return pack_shards(ordered, shard_size=size, group_of=lambda item: groups[id(item)])


def _places(family: Family) -> Callable[[str], Place]:
    """From a tensor's name to its layer and expert, None where it has none; also for the pieces of a packed weight,
    whose names begin with the weight's."""
    patterns = []
    for template in sorted(family.tensors.names.values(), key=len, reverse=True):
        pattern = re.escape(template).replace(re.escape("{L}"), r"(\d+)").replace(re.escape("{E}"), r"(\d+)")
        # with {L} and {E} in either order, which number is which
        order = sorted((template.index(mark), i) for i, mark in enumerate(("{L}", "{E}")) if mark in template)
        patterns.append((re.compile(pattern), [i for _, i in order]))

    def place(name: str) -> Place:
        for pattern, order in patterns:
            if match := pattern.match(name):
                found: list[int | None] = [None, None]
                for i, number in zip(order, match.groups(), strict=True):
                    found[i] = int(number)
                return found[0], found[1]
        return None, None

    return place
