"""The items of an upcycled checkpoint: every target tensor of every layer, in the order of the source's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from moeconv.errors import InputError, escape
from moeconv.families.folds import Draft
from moeconv.families.model import Model
from moeconv.families.node import Node, fill
from moeconv.families.spec import BESIDE, Family
from moeconv.options import UpcycleOptions
from moeconv.plan.build import carry
from moeconv.plan.plan import Item
from moeconv.upcycle.cut import Cut
from moeconv.upcycle.ffn_items import OTHER_TARGETS, FfnItems
from moeconv.upcycle.siblings import Sibling
from moeconv.upcycle.sources import Sources
from moeconv.upcycle.target_tensors import Placed, TargetTensors

_BY_LAYER = ("ffn", "expert", "router", "shared")  # groups that depend on whether a layer is a Mixture-of-Experts


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
        made: list[Placed] = []
        for key, node in self.draft.tensors.items():
            if not key.startswith("ffn."):
                made += self._outside_ffn(key, node)
        ffn = FfnItems(self._tensors, self.options, self.seed)
        for layer in range(self.model.num_layers):
            made += ffn.mixture(layer) if layer in self.chosen else ffn.dense(layer)
        for key in self._target.tensors.names:
            made += self._missing(key)
        made += self._beside()
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
        for key, node in self.draft.tensors.items():
            if self._sources.changes(node):
                self._add(count, key, self._count(key, node))
        for key in names:
            self._add(count, key, len(list(self._missing(key))))
        return count

    def _count(self, key: str, node: Node) -> int:
        """How many tensors an expression makes outside the Mixtures-of-Experts."""
        if not key.startswith("ffn."):
            return len(list(self._where(key, node)))
        dense = [i for i in range(self.model.num_layers) if i not in self.chosen]
        return sum(self._sources.has(node, i) for i in dense)

    @staticmethod
    def _add(count: dict[str, int], key: str, found: int) -> None:
        if found:
            group = key.partition(".")[0]
            count[group] = count.get(group, 0) + found

    def _beside(self) -> Iterator[Placed]:
        """The tensors outside the language model, as they are, where the target has them too. Raises InputError for one
        that the target has no place for."""
        starts = tuple(self._target.multimodal.beside)
        for name, role in self.model.roles.items():
            if role.group not in BESIDE or not starts:
                continue
            if not name.startswith(starts):
                raise InputError(
                    f"{self._target.model_type} has no place for tensor {escape(name)!r}",
                    hint="--text-only writes the language model alone.",
                )
            ref = self.model.checkpoint.tensors[name]
            yield self._sources.position_of(name), carry(ref, role=role.key)

    # -- tensors outside the FFN ---------------------------------------------------------------------------------------

    def _outside_ffn(self, key: str, node: Node) -> Iterator[Placed]:
        if not self._target.has(key):
            name = escape(self._name_behind(key, node))
            raise InputError(
                f"{self._target.model_type} has no place for tensor {name!r} ({key}) of {self.model.family.model_type}",
                hint=OTHER_TARGETS,
            )
        changes = self._sources.changes(node)
        for layer in self._where(key, node):
            yield self._tensors.item(key, layer, node, changed=key.partition(".")[0] if changes else "")

    def _name_behind(self, key: str, node: Node) -> str:
        """The name of a source tensor behind an expression; the key where there is none."""
        for layer in (None, *range(self.model.num_layers)):
            for leaf in node.leaves():
                if leaf.op == "source" and self._sources.has(leaf, layer):
                    return self._sources.ref(leaf, layer).name
        return key

    def _layers_of(self, key: str) -> Iterator[int | None]:
        """Every layer for a tensor that layers have, None for one of the whole model."""
        yield from range(self.model.num_layers) if "{L}" in self._target.tensors.names[key] else (None,)

    def _where(self, key: str, node: Node) -> Iterator[int | None]:
        """The layers that get this tensor: those that have its source tensors, and all for one that reads none."""
        return (layer for layer in self._layers_of(key) if self._sources.has(node, layer))

    def _missing(self, key: str) -> Iterator[Placed]:
        """A tensor that the target must have and the source lacks, with the value at which it changes nothing."""
        target, config = self._target, self.draft.config
        group = key.partition(".")[0]
        switched = any(config.get(switch) and key in keys for switch, keys in target.tensors.switched.items())
        if group in _BY_LAYER or key in self.draft.tensors or (key in target.tensors.optional and not switched):
            return
        kinds = target.layers.kinds(config.get, self.model.num_layers) if target.layers.kinds else None
        for layer in self._layers_of(key):
            # hybrid families have some tensors in layers of one kind only
            if kinds and layer is not None and kinds[layer] not in target.layers.where.get(group, {kinds[layer]}):
                continue
            if key not in target.tensors.inert:
                raise InputError(
                    f"{target.model_type} needs a tensor that {self.model.family.model_type} does not have ({key})",
                    hint=OTHER_TARGETS,
                )
            yield self._tensors.item(key, layer, fill(target.tensors.inert[key]), changed=group)
