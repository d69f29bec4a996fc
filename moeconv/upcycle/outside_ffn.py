"""The items of everything outside the FFNs of a converted model: copied, rewritten by folds, or made where the target
needs a tensor that the source lacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeconv.errors import InputError, escape
from moeconv.families.folds import Draft
from moeconv.families.model import Model
from moeconv.families.node import Node, fill
from moeconv.families.spec import BESIDE, Family
from moeconv.plan.build import carry
from moeconv.upcycle.sources import Sources
from moeconv.upcycle.target_tensors import Placed, TargetTensors

OTHER_TARGETS = "See `moeconv families` for other targets (--to)."
_BY_LAYER = ("ffn", "expert", "router", "shared")  # groups that depend on whether a layer is a Mixture-of-Experts


@dataclass(frozen=True)
class OutsideFfn:
    """The tensors of a draft outside the FFNs, tensor by tensor."""

    tensors: TargetTensors

    @property
    def model(self) -> Model:
        return self.tensors.sources.model

    @property
    def draft(self) -> Draft:
        return self.tensors.draft

    @property
    def _sources(self) -> Sources:
        return self.tensors.sources

    @property
    def _target(self) -> Family:
        return self.tensors.target

    def carried(self) -> Iterator[Placed]:
        """The items of the tensors that the source has, with their positions. Raises InputError for a tensor that the
        target has no place for."""
        for key, node in self.draft.tensors.items():
            if not key.startswith("ffn."):
                yield from self._outside_ffn(key, node)

    def added(self) -> Iterator[Placed]:
        """The items of the tensors that only the target has, and of those beside the language model. Raises InputError
        for a tensor that the target needs and the source lacks, and for one that the target has no place for."""
        for key in self._target.tensors.names:
            yield from self._missing(key)
        yield from self._beside()

    def promise(self, count: dict[str, int]) -> dict[str, int]:
        """`count` {role: tensors that change}, with those outside the FFNs added."""
        for key, node in self.draft.tensors.items():
            if not key.startswith("ffn.") and self._sources.changes(node):
                self._add(count, key, len(list(self._where(key, node))))
        for key in self._target.tensors.names:
            self._add(count, key, len(list(self._missing(key))))
        return count

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

    def _outside_ffn(self, key: str, node: Node) -> Iterator[Placed]:
        if not self._target.has(key):
            name = escape(self._name_behind(key, node))
            raise InputError(
                f"{self._target.model_type} has no place for tensor {name!r} ({key}) of {self.model.family.model_type}",
                hint=OTHER_TARGETS,
            )
        changes = self._sources.changes(node)
        for layer in self._where(key, node):
            yield self.tensors.item(key, layer, node, changed=key.partition(".")[0] if changes else "")

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
            yield self.tensors.item(key, layer, fill(target.tensors.inert[key]), changed=group)
