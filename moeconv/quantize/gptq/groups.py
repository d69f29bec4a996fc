"""Groups of experts whose weights are coded in one call: they have equal shapes and one grid, and fit in a memory
limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from moeconv.families import packed
from moeconv.families.model import Model
from moeconv.families.spec import Role
from moeconv.plan.kernels.chain import last_stage
from moeconv.plan.kernels.pack.levels import Grid
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.grids import grid_of
from moeconv.quantize.gptq.need import codes_bytes, experts_per_call, hidden_bytes
from moeconv.world import current

_Kind = tuple[tuple[object, ...], int, int]  # the grid's key, the weights per scale, the input width


@dataclass(frozen=True, eq=False)
class Group:
    """Experts whose weights are coded together. `items[i]` are the packings of `experts[i]`: they have the same shapes
    for every expert, and lie on the same `grid` with `size` weights per scale."""

    experts: tuple[int, ...]
    items: tuple[tuple[Item, ...], ...]
    grid: Grid
    size: int


def weight_name(item: Item) -> str:
    """The weight that an item packs, by its name in the view."""
    return packed.weight_of(item.outputs[0].name)


def role_of(view: Model, item: Item) -> Role:
    """The role of the weight that an item packs."""
    return view.roles[weight_name(item)]


def grouped(
    view: Model,
    items: Sequence[Item],
    *,
    down: bool,
    limit: int,
    on_cpu: bool,
    tokens: Mapping[int, int] = MappingProxyType({}),
) -> list[Group]:
    """The down projections of a layer's `items`, or all others, in groups of at most `limit` bytes of work memory, and
    of at least one expert. The weights of an expert that lie on one grid are in one group.

    `tokens` is the number of tokens per expert whose hidden activations are held while the expert is coded. On the CPU,
    where a longer call gains nothing, a group has at most `need.ROWS_PER_CALL` output rows. Elsewhere, each of several
    processes gets a group.
    """
    kinds: dict[_Kind, dict[int, list[Item]]] = {}
    grids: dict[tuple[object, ...], Grid] = {}
    for item in items:
        role = role_of(view, item)
        if (role.key.partition(".")[2] == "down") == down:
            grid, size = grid_of(item)
            grids.setdefault(grid.key, grid)
            kind = (grid.key, size, last_stage(item).inputs[0].shape[1])
            kinds.setdefault(kind, {}).setdefault(int(role.expert or 0), []).append(item)
    groups = []
    for (key, size, width), of_experts in kinds.items():
        for rows, alike in _by_rows(of_experts).items():
            most = experts_per_call(rows) if on_cpu else -(-len(alike) // current().size)
            need = {e: codes_bytes(rows, width) + hidden_bytes(width, tokens.get(e, 0)) for e in alike}
            for experts in _parts(need, limit=limit, most=most):
                groups.append(Group(tuple(experts), tuple(tuple(alike[e]) for e in experts), grids[key], size))
    return groups


def by_matrix(group: Group, values: Tensor) -> dict[str, Tensor]:
    """`values` [E, out, ...] of a group, split into its matrices, by their names in the view."""
    rows = [last_stage(item).inputs[0].shape[0] for item in group.items[0]]
    parts = [part.unbind(0) for part in values.split(rows, dim=1)]
    found: dict[str, Tensor] = {}
    for items, of_expert in zip(group.items, zip(*parts, strict=True), strict=True):
        found |= zip(map(weight_name, items), of_expert, strict=True)
    return found


def _by_rows(of_experts: Mapping[int, list[Item]]) -> dict[int, dict[int, list[Item]]]:
    """The experts' items by the number of output rows that an expert's weights have together."""
    found: dict[int, dict[int, list[Item]]] = {}
    for e, items in sorted(of_experts.items()):
        found.setdefault(sum(last_stage(i).inputs[0].shape[0] for i in items), {})[e] = items
    return found


def _parts(need: Mapping[int, int], *, limit: int, most: int) -> Iterator[list[int]]:
    """Experts in order, in parts of at most `limit` bytes and `most` experts; a part has at least one expert."""
    part: list[int] = []
    for e, nbytes in need.items():
        if part and (len(part) == most or sum(need[i] for i in part) + nbytes > limit):
            yield part
            part = []
        part.append(e)
    if part:
        yield part
