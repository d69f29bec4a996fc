"""A model with another expert width: what config.json then states, and where the neurons are in each tensor.

Which tensors have another size follows from the shapes that the two configs require, so that a family needs no list
of them: experts, the shared expert or dense FFNs that share the experts' config key, and biases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from moeconv.families.check import Shapes
from moeconv.families.model import Model
from moeconv.families.shapes import shared_width
from moeconv.families.spec import Role
from moeconv.families.written import written_config
from moeconv.types import JsonObject


@dataclass(frozen=True, slots=True)
class NeuronCut:
    """Where the neurons are in the tensor of one expert or FFN. `dims` is a shape for its bytes in which axis `axis`
    runs over the neurons; `part` is the axis over the matrices that the tensor holds, if there are several. `new` is
    the number of neurons in the narrower model, `shape` the shape that the tensor then has on disk."""

    dims: tuple[int, ...]
    axis: int
    part: int | None
    new: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of neurons."""
        return self.dims[self.axis]

    @property
    def before(self) -> int:
        return math.prod(self.dims[: self.axis])

    @property
    def after(self) -> int:
        return math.prod(self.dims[self.axis + 1 :])


@dataclass(frozen=True)
class Narrow:
    """The view of a `model` whose routed experts, or whose FFNs if it is dense, have `width` neurons. `shared` is the
    number of neurons of the shared expert; None: as many as now, or as the routed experts where it has their width."""

    model: Model
    width: int
    shared: int | None = None

    @cached_property
    def changes(self) -> dict[str, object]:
        """The config keys that change, with their values.

        Where the width of the shared expert is a number of shared experts times the changed width, that number grows,
        so that the shared expert keeps its neurons. Keys that default to the changed width get an explicit value.
        """
        family, get = self.model.family, self.model.value
        made: dict[str, object] = {}
        if self.width != self.model.cut_width:
            made[family.experts.width] = self.width
        if family.kind != "moe":
            stated = family.layers.ffn_width_as_stated
            made = {**stated, **{key: self.width for key in family.layers.ffn_width_keys if get(key) is not None}}
        before_it, view = self._with({}), self._with(made)  # both with the config keys of the output
        for key in {*family.config.defaults, *family.config.derived} - set(made):
            if view.value(key) != before_it.value(key):
                made[key] = get(key)
        shared = family.experts.shared_width
        before, (free, of_one) = shared_width(shared, get), self.shared_key
        if free and before and (self.shared is not None or family.experts.width in {*shared} & {*made}):
            made[free] = -(-(self.shared or before) // of_one)
        return made

    @property
    def shared_key(self) -> tuple[str, int]:
        """(the config key that states the width of the shared expert, the number by which its value is multiplied); ""
        if it is that of the routed experts, or there is no shared expert."""
        experts = self.model.family.experts
        free = next((key for key in experts.shared_width if key != experts.width), "")
        others = [key for key in experts.shared_width if key != free]
        return free, math.prod(self.width if key == experts.width else self.model.value(key) or 0 for key in others)

    def shared_down(self, layer: int) -> tuple[str, NeuronCut] | None:
        """(the name of the down projection of the shared expert of a layer, how it is cut); None if it loses no
        neurons."""
        family = self.model.family
        if self.model.num_experts and family.has("shared.down"):
            name = family.name("shared.down", layer=layer)
            cut = self.cut(self.model.roles[name]) if name in self.model.roles else None
            if cut is not None and cut.new < cut.size:
                return name, cut
        return None

    @cached_property
    def narrowed(self) -> Model:
        """The model as it would be with the changed config. Only its config and its shapes are those of the result."""
        return self._with(self.changes)

    def _with(self, changes: dict[str, object]) -> Model:
        config: JsonObject = written_config(self.model.checkpoint.config, self.model.family, changes=changes)
        return replace(self.model, checkpoint=self.model.checkpoint.reworded(config, ""))

    @cached_property
    def ambiguous(self) -> str | None:
        """The key of a tensor that would have the same shape in two layouts that loaders distinguish by the shape; None
        if there is none."""
        forms = self.model.family.forms()
        layer = next(iter(self.model.moe_layers), None)
        for key in {key for form in forms for key in form.tensors.packed}:
            shapes = [
                (form.tensors.packed[key].transposed, Shapes(replace(self.narrowed, family=form))(Role(key, layer)))
                for form in forms
                if key in form.tensors.packed
            ]
            if len({shape for _, shape in shapes}) < len(set(shapes)):
                return key
        return None

    @cached_property
    def _shapes(self) -> tuple[Shapes, Shapes]:
        return Shapes(self.model), Shapes(self.narrowed)

    def cut(self, role: Role) -> NeuronCut | None:
        """How the tensor of this role is cut; None for a tensor that keeps its size."""
        if role.group not in ("expert", "shared", "ffn"):
            return None
        old, new = self._shapes
        tensors = self.model.family.tensors
        layout = tensors.packed.get(role.key) if role.expert is None else None
        keys = [f"expert.{part}" for part in layout.parts] if layout else tensors.fused.get(role.key, (role.key,))
        try:
            (was, now), *_ = [(old.matrix(key, role.layer), new.matrix(key, role.layer)) for key in keys]
        except KeyError:
            return None
        axis = next((i for i, sizes in enumerate(zip(was, now)) if sizes[0] != sizes[1]), None)
        if axis is None:
            return None
        shape = new(role)
        assert shape is not None
        several, size = len(keys) > 1, was[axis]
        turned = layout is not None and layout.transposed and len(was) == 2
        interleaved = layout is not None and layout.interleaved
        # every dimension with what it runs over: the neurons, the matrices (parts), or the rest
        dims = [("rest", n) for n in was]
        dims[axis] = ("neurons", size)
        if several:
            dims.insert(axis + 1 if interleaved else axis, ("parts", len(keys)))
        if turned and axis == 0:
            dims = [*dims[-1:], *dims[:-1]]
        elif turned:
            dims = dims[::-1]
        words = [word for word, _ in dims]
        return NeuronCut(
            tuple(n for _, n in dims), words.index("neurons"), words.index("parts") if several else None, now[axis],
            shape,
        )  # fmt: skip
