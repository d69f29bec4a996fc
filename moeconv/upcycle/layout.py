"""The items of an upcycled checkpoint: every target tensor of every layer, in the order of the source's tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from moeconv.families.folds import Draft
from moeconv.families.model import Model
from moeconv.families.spec import Family
from moeconv.options import UpcycleOptions
from moeconv.plan.plan import Item
from moeconv.upcycle.cut import Cut
from moeconv.upcycle.ffn_items import FfnItems
from moeconv.upcycle.outside_ffn import OutsideFfn
from moeconv.upcycle.siblings import Sibling
from moeconv.upcycle.sources import Sources
from moeconv.upcycle.target_tensors import Placed, TargetTensors


@dataclass(frozen=True)
class Assembly:
    """A draft worked out tensor by tensor: layers, experts, names, shapes and dtypes. The layers in `chosen` become
    Mixtures-of-Experts."""

    model: Model
    draft: Draft
    options: UpcycleOptions
    cut: Cut
    chosen: frozenset[int]
    dtype: str | None
    seed: int
    siblings: tuple[Sibling, ...] = ()
    dropped: list[str] = field(default_factory=list)

    @cached_property
    def _sources(self) -> Sources:
        return Sources(self.model, self.siblings)

    @cached_property
    def _tensors(self) -> TargetTensors:
        return TargetTensors(self.draft, self._sources, self.cut, self.dtype)

    @cached_property
    def _outside(self) -> OutsideFfn:
        return OutsideFfn(self._tensors)

    @property
    def _target(self) -> Family:
        return self.draft.target

    @property
    def rounded(self) -> list[str]:
        """The keys whose folds do not fit the output's dtype exactly; known after `items`."""
        return self._tensors.rounded

    def items(self) -> list[Item]:
        """The item of every tensor. Raises InputError for a tensor that the target has no place for, and for one that
        it needs and the source lacks."""
        made: list[Placed] = list(self._outside.carried())
        ffn = FfnItems(self._tensors, self.options, self.seed)
        for layer in range(self.model.num_layers):
            made += ffn.mixture(layer) if layer in self.chosen else ffn.dense(layer)
        made += self._outside.added()
        made.sort(key=lambda pair: pair[0])
        self._note_dropped([item for _, item in made])
        return [item for _, item in made]

    def _note_dropped(self, items: list[Item]) -> None:
        """Name the source tensors that nothing reads, such as the stored copy of a tied head."""
        read = {ref.tensor for item in items for ref in item.inputs if ref.origin == "source"}
        if self.siblings:  # the experts come from the siblings, everything else from the source
            read |= {name for name, role in self.model.roles.items() if role.group == "ffn"}
        self.dropped.extend(name for name in self.model.roles if name not in read)

    def promise(self) -> dict[str, int]:
        """How many tensors of each role change, counted from the geometry and not from the items."""
        names = self._target.tensors.names
        experts = [name for key, name in names.items() if key.startswith("expert.")]
        count = {
            "router": len(self.chosen) * sum(key.startswith("router.") for key in names),
            "expert": len(self.chosen) * sum(self.cut.experts if "{E}" in name else 1 for name in experts),
        }
        if self._tensors.shared_width:
            count["shared"] = len(self.chosen) * sum(key.startswith("shared.") for key in names)
        dense = [i for i in range(self.model.num_layers) if i not in self.chosen]
        changed = [n for k, n in self.draft.tensors.items() if k.startswith("ffn.") and self._sources.changes(n)]
        if found := sum(self._sources.has(node, i) for node in changed for i in dense):
            count["ffn"] = found
        return self._outside.promise(count)
