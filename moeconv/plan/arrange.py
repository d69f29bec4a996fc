"""How tensors are grouped into shards: in order up to a size, one shard per layer, or one per expert (--shard-by).

The files keep the names that every loader knows, and the index has the file of each tensor, so that loaders need no
change.
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
    """Put items into shards by --shard-size and --shard-by. `family` is the family whose tensor names the outputs have.

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
            hint="Use --shard-by layer.",
        )
    # first the tensors of no layer or expert, then those of each in the order of their numbers
    ordered = sorted(items, key=lambda item: -1 if (n := groups[id(item)]) is None else n)
    return pack_shards(ordered, shard_size=size, group_of=lambda item: groups[id(item)])


def _places(family: Family) -> Callable[[str], Place]:
    """The function from the name of a tensor to its layer and expert, each None where it has none. It also knows the
    parts of a packed weight, whose names begin with that of the weight."""
    patterns = []
    for template in sorted(family.tensors.names.values(), key=len, reverse=True):
        pattern = re.escape(template).replace(re.escape("{L}"), r"(\d+)").replace(re.escape("{E}"), r"(\d+)")
        # {L} and {E} may come in either order: which of the two each number is
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
