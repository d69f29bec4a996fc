"""The items of an upcycled checkpoint: every target tensor of every layer, in the order of the source's tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from moeconv.checkpoint.header import FLOAT_DTYPES, tensor_nbytes
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, escape
from moeconv.families.folds import Draft
from moeconv.families.model import Model
from moeconv.families.node import Node, concat, fill, from_origin, interleave, measured, scale, transpose
from moeconv.families.records import Packed
from moeconv.families.shapes import fused_rows, shape_of, shared_width
from moeconv.families.spec import Family
from moeconv.options import UpcycleOptions
from moeconv.plan.build import rows, whole
from moeconv.plan.overlay import ORIGIN as OVERLAY
from moeconv.plan.plan import Input, Item, TensorSpec
from moeconv.upcycle.cut import Cut
from moeconv.upcycle.expression import item_of
from moeconv.upcycle.methods import METHODS, Matrix

_MADE = ("ffn", "expert", "router", "shared")  # groups that depend on whether a layer is a Mixture-of-Experts
CORRECTIONS = ("correction", "correction_row")  # parts of a router that count in the choice and not in the weights
_F16_LOWEST = -6e4
_TARGETS = "See `moeconv families` for other targets (--to)."

Made = tuple[str, int | None, Node, str]  # key, layer, expression, name of the role under which a change counts


@dataclass(frozen=True)
class Assembly:
    """A draft, spelled out: layers, experts, names, shapes and dtypes. `chosen` layers become Mixtures-of-Experts."""

    model: Model
    draft: Draft
    options: UpcycleOptions
    cut: Cut
    chosen: frozenset[int]
    dtype: str | None
    seed: int
    siblings: tuple[Model, ...] = ()
    dropped: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)  # keys whose folds do not fit the output's dtype exactly

    @property
    def target(self) -> Family:
        return self.draft.target

    @cached_property
    def _refs(self) -> dict[tuple[str, int | None], TensorRef]:
        return _refs_of(self.model)

    @cached_property
    def _sibling_refs(self) -> dict[str, dict[tuple[str, int | None], TensorRef]]:
        return {sibling_origin(i): _refs_of(sibling) for i, sibling in enumerate(self.siblings)}

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.model.checkpoint.tensors)}

    def items(self) -> list[Item]:
        """Every tensor's item. Raises InputError for a tensor that the target has no place for, or lacks."""
        made: list[tuple[int, Item]] = []
        for key, node in self.draft.tensors.items():
            if not key.startswith("ffn."):
                made += self._plain(key, node)
        for layer in range(self.model.num_layers):
            made += self._ffn(layer)
        for key in self.target.tensors.names:
            made += self._missing(key)
        made.sort(key=lambda pair: pair[0])
        self._note_dropped([item for _, item in made])
        return [item for _, item in made]

    def _note_dropped(self, items: list[Item]) -> None:
        """Name the source tensors that nothing reads, such as the stored copy of a tied head."""
        read = {ref.tensor for item in items for ref in item.inputs if ref.origin == "source"}
        if self.siblings:  # SOURCE lends everything but the experts
            read |= {name for name, role in self.model.roles.items() if role.group == "ffn"}
        self.dropped.extend(name for name in self.model.roles if name not in read)

    def promise(self) -> dict[str, int]:
        """How many tensors change, counted from the geometry and not from the items."""
        layers, target = len(self.chosen), self.target
        count = {
            "router": layers * sum(key.startswith("router.") for key in target.tensors.names),
            "expert": layers * sum(
                self.cut.experts if "{E}" in name else 1
                for key, name in target.tensors.names.items() if key.startswith("expert.")
            ),
        }  # fmt: skip
        if self._shared_width():
            count["shared"] = layers * sum(key.startswith("shared.") for key in target.tensors.names)
        for key, node in self.draft.tensors.items():
            group = key.partition(".")[0]
            if node.op == "source" and not self._is_fused(node):
                continue
            if group == "ffn":
                dense = [i for i in range(self.model.num_layers) if i not in self.chosen]
                found = sum(all(self._has(leaf, i) for leaf in node.leaves()) for i in dense)
            else:
                found = len(list(self._where(key, node)))
            if found:
                count[group] = count.get(group, 0) + found
        for key in target.tensors.names:
            if missing := list(self._missing(key)):
                group = key.partition(".")[0]
                count[group] = count.get(group, 0) + len(missing)
        return count

    # -- tensors outside the FFN ---------------------------------------------------------------------------------------

    def _plain(self, key: str, node: Node) -> Iterator[tuple[int, Item]]:
        if not self.target.has(key):
            name = next((self._ref(leaf, layer).name for layer in (None, *range(self.model.num_layers))
                         for leaf in node.leaves() if self._has(leaf, layer)), key)  # fmt: skip
            raise InputError(
                f"{self.target.model_type} has no place for tensor {escape(name)!r} ({key}) of "
                f"{self.model.family.model_type}",
                hint=_TARGETS,
            )
        changes = node.op != "source" or self._is_fused(node)
        for layer in self._where(key, node):
            yield self._item(key, layer, node, changed=key.partition(".")[0] if changes else "")

    def _where(self, key: str, node: Node) -> Iterator[int | None]:
        """The layers that get this tensor: those whose source tensors exist, and all for one that is made of none."""
        for layer in range(self.model.num_layers) if "{L}" in self.target.tensors.names[key] else (None,):
            if all(self._has(leaf, layer) for leaf in node.leaves()):
                yield layer

    def _missing(self, key: str) -> Iterator[tuple[int, Item]]:
        """A tensor that the target must have and the source lacks: at the value at which it does nothing."""
        target, config = self.target, self.draft.config
        group = key.partition(".")[0]
        switched = any(config.get(switch) and key in keys for switch, keys in target.tensors.switched.items())
        if group in _MADE or key in self.draft.tensors or (key in target.tensors.optional and not switched):
            return
        kinds = target.layers.kinds(config.get, self.model.num_layers) if target.layers.kinds else None
        for layer in range(self.model.num_layers) if "{L}" in target.tensors.names[key] else (None,):
            if (
                kinds is not None
                and layer is not None
                and kinds[layer] not in target.layers.where.get(group, {kinds[layer]})
            ):
                continue
            if key not in target.tensors.inert:
                raise InputError(
                    f"{target.model_type} needs a tensor that {self.model.family.model_type} does not have ({key})",
                    hint=_TARGETS,
                )
            yield self._item(key, layer, fill(target.tensors.inert[key]), changed=group)

    # -- FFN, experts, routers -----------------------------------------------------------------------------------------

    def _ffn(self, layer: int) -> Iterator[tuple[int, Item]]:
        parts = {
            key.partition(".")[2]: node for key, node in self.draft.tensors.items()
            if key.startswith("ffn.") and all(self._has(leaf, layer) for leaf in node.leaves())
        }  # fmt: skip
        if layer not in self.chosen:
            for part, node in parts.items():
                yield from self._dense(f"ffn.{part}", layer, node)
            return
        for part, node in parts.items():
            self._check_weights(node, layer)
            if not any(part == p or part in layout.parts for p, layout in self._expert_layouts()):
                name = next(self._ref(leaf, layer).name for leaf in node.leaves() if leaf.op == "source")
                raise InputError(
                    f"{self.target.model_type} has no place for tensor {escape(name)!r} (ffn.{part}) of "
                    f"{self.model.family.model_type}",
                    hint=_TARGETS,
                )
        yield from self._routing(layer, parts)
        for key in self.target.tensors.names:
            if key.startswith("expert."):
                yield from self._experts(key, layer, parts)

    def _expert_layouts(self) -> Iterator[tuple[str, Packed]]:
        """Each expert tensor's part of the key, and the FFN parts that it holds."""
        for key in self.target.tensors.names:
            if key.startswith("expert."):
                part = key.partition(".")[2]
                yield part, self.target.tensors.packed.get(key, Packed((part,)))

    def _check_weights(self, node: Node, layer: int) -> None:
        for leaf in node.leaves():
            if leaf.op == "source" and (ref := self._ref(leaf, layer)).dtype not in FLOAT_DTYPES:
                raise InputError(
                    f"tensor {escape(ref.name)!r} is {ref.dtype}: experts are made of {', '.join(FLOAT_DTYPES)} "
                    "weights",
                    hint="Upcycle the unquantized checkpoint, then `moeconv quantize`.",
                )

    def _dense(self, key: str, layer: int, node: Node) -> Iterator[tuple[int, Item]]:
        if not self.target.has(key):
            raise InputError(
                f"{self.target.model_type} has no place for {key} of a dense layer ({layer})", hint=_TARGETS
            )
        yield self._item(key, layer, node, changed="ffn" if node.op != "source" or self._is_fused(node) else "")

    def _experts(self, key: str, layer: int, parts: dict[str, Node]) -> Iterator[tuple[int, Item]]:
        experts = range(self.cut.experts)

        def matrix(part: str, expert: int) -> Node:
            return self._matrix(part, parts[part], layer, expert)

        layout = self.target.tensors.packed.get(key)
        if layout is None:
            for expert in experts:
                node = matrix(key.partition(".")[2], expert)
                yield self._item(key, layer, node, expert=expert, changed="expert")
            return
        made = []
        for expert in experts:
            each = [matrix(part, expert) for part in layout.parts]
            one = interleave(*each) if layout.interleaved else concat(*each)
            made.append(transpose(one) if layout.transposed else one)
        one_shape = self._shape(made[0], layer)
        shape = (len(made) * one_shape[0], *one_shape[1:]) if layout.flat else (len(made), *one_shape)
        yield self._item(key, layer, concat(*made), shape=shape, changed="expert")

    def _matrix(self, part: str, node: Node, layer: int, expert: int | None) -> Node:
        """One matrix of an expert, or of the shared one (None), at the scale at which both together are the FFN."""
        method, rule = METHODS[self.options.method], self.target.experts.routing
        if self.siblings and expert is not None:
            node = from_origin(node, sibling_origin(expert // self.cut.pieces % len(self.siblings)))
        matrix = Matrix(self._shaped(f"ffn.{part}", node), part, layer, expert, self.seed, self.cut)
        chosen = method.select(matrix, self.options)
        if expert is None:
            return scale(chosen, 1 / self.target.experts.shared_weight) if part == "down" else chosen
        if self.cut.idle and part.startswith("down") and not self.target.experts.routed_norm:
            return Node("fill", (), {"value": 0.0, "shape": list(self._shape(chosen, layer))})
        total = rule.total if rule else 1.0
        if part == "down":
            folded = 1.0 if rule and rule.scaling else method.scale(self.cut, self.options)
            chosen = scale(chosen, folded / total)
        elif part == "down_bias":  # every piece carries it, and the pieces' weights sum to the copy's
            chosen = scale(chosen, 1 / total)
        return method.edit(replace(matrix, node=chosen), self.options)

    def _router(self, layer: int) -> Node:
        method = METHODS[self.options.method]
        if method.router is not None:
            return method.router(layer, self.options, self.model.hidden_size)
        repeat = self.cut.pieces if method.grouped else 1
        if self.options.router != "random":
            name = self.target.name("router.weight", layer=layer)
            shape = (self.cut.experts // repeat, self._made_shape("router.weight")[1])
            if repeat == 1:
                return measured(name, dtype="F32", shape=shape, origin=OVERLAY)
            each = [
                measured(name, dtype="F32", shape=(1, shape[1]), first=row * shape[1], origin=OVERLAY)
                for row in range(shape[0])
            ]
            return concat(*(row for row in each for _ in range(repeat)))
        params = {"key": [self.seed, "router", layer], "std": self.options.router_std}
        return Node("draw", (), params if repeat == 1 else {**params, "repeat": repeat})

    def _routing(self, layer: int, parts: dict[str, Node]) -> Iterator[tuple[int, Item]]:
        """A layer's new tensors: the router, random in its weight, and the shared expert where there is one (of zero
        where it holds nothing)."""
        gate = parts["gate"] if "gate" in parts else parts["up"]
        anchor = self._anchor(gate, layer)
        for key in self.target.tensors.names:
            group, _, part = key.partition(".")
            if group == "router":
                node = self._router(layer) if part == "weight" else fill(self.target.tensors.inert.get(key, 0.0))
                if part in CORRECTIONS and (correction := METHODS[self.options.method].correction):
                    node = correction(layer, self.options)
                yield anchor, self._item(key, layer, node, changed="router", like=gate)[1]
            elif group == "shared" and self.cut.shared and part != "router":
                held = [name.partition(".")[2] for name in self.target.tensors.fused.get(key, (key,))]
                node = concat(*(self._matrix(name, parts[name], layer, None) for name in held))
                yield anchor, self._item(key, layer, node, changed="shared")[1]
            elif group == "shared" and self._shared_width():
                shape = self._made_shape(key)
                yield anchor, self._item(key, layer, fill(0.0), shape=shape, changed="shared", like=gate)[1]

    def _shared_width(self) -> int:
        return shared_width(self.target.experts.shared_width, self.draft.config.get)

    def _made_shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor that is made from nothing."""
        counts = {
            "experts": lambda: self.cut.experts, "width": lambda: self.model.ffn_width, "shared": self._shared_width,
        }  # fmt: skip
        tensors, get = self.target.tensors, self.draft.config.get
        parts = [
            shape_of(part, get, counts=counts, shapes=tensors.shapes, sizes=tensors.sizes)
            for part in tensors.fused.get(key, (key,))
        ]
        return (sum(shape[0] for shape in parts), *parts[0][1:])

    # -- one item ------------------------------------------------------------------------------------------------------

    def _item(
        self, key: str, layer: int | None, node: Node, *, expert: int | None = None,
        shape: tuple[int, ...] | None = None, changed: str = "", like: Node | None = None,
    ) -> tuple[int, Item]:  # fmt: skip
        """(position in the source's order, item) of one target tensor. `like` lends a made tensor its dtype."""
        node = node if shape is not None and node.op == "fill" else self._shaped(key, node)
        out = shape or (self._made_shape(key) if node.op == "draw" or key.startswith("router.") else
                        self._shape(node, layer))  # fmt: skip
        dtype = self._dtype(key, like or node, layer)
        if node.op == "fill" and dtype == "F16":
            node = fill(max(node.params["value"], _F16_LOWEST))
        if dtype in ("BF16", "F16") and _rounds(node):
            self.rounded.append(key)
        spec = TensorSpec(self.target.name(key, layer=layer, expert=expert), dtype, out, key, math.prod(out))
        item = item_of(node, spec, resolve=lambda leaf: self._input(leaf, layer), changed=changed)
        return self._anchor(node, layer), item

    def _shaped(self, key: str, node: Node) -> Node:
        """Constants within an expression, with their shape."""
        if node.op == "fill" and "shape" not in node.params:
            return Node("fill", (), {"value": node.params["value"], "shape": list(self._made_shape(key))})
        return node

    def _dtype(self, key: str, node: Node, layer: int | None) -> str:
        keys = (leaf.params["key"] for leaf in node.leaves() if leaf.op == "source")
        # a sibling's tensor too is written in the dtype of SOURCE's
        own = next((self._refs[self.model.family.holds(k) or k, layer].dtype for k in keys), self.model.dtype)
        if own not in FLOAT_DTYPES:
            if node.op != "source":
                raise InputError(
                    f"tensor behind {key} is {own}: it takes {', '.join(FLOAT_DTYPES)} to compute with",
                    hint="Upcycle the unquantized checkpoint, then `moeconv quantize`.",
                )
            return own
        return "F32" if key in self.target.tensors.float32 else self.dtype or own

    def _ref(self, leaf: Node, layer: int | None) -> TensorRef:
        key = leaf.params["key"]
        refs = self._sibling_refs[leaf.params["origin"]] if "origin" in leaf.params else self._refs
        return refs[self.model.family.holds(key) or key, layer]

    def _has(self, leaf: Node, layer: int | None) -> bool:
        if leaf.op != "source":
            return True
        key = leaf.params["key"]
        return (self.model.family.holds(key) or key, layer) in self._refs

    def _is_fused(self, leaf: Node) -> bool:
        return leaf.op == "source" and not self.model.family.has(leaf.params["key"])

    def _input(self, leaf: Node, layer: int | None) -> Input:
        if leaf.op == "read":
            return _measured(leaf)
        ref, key = self._ref(leaf, layer), leaf.params["key"]
        origin = leaf.params.get("origin", "source")
        holder = self.model.family.holds(key)
        if holder is None or holder == key:
            first, count = 0, ref.shape[0]
        else:
            first, count = fused_rows(key, self.model.family.tensors.fused[holder], ref.shape[0], self.model.value)
        if (chosen := leaf.params.get("rows")) is not None:
            first, count = first + chosen[0], chosen[1] - chosen[0]
        return whole(ref, origin=origin) if count == ref.shape[0] else rows(ref, first, count, origin=origin)

    def _anchor(self, node: Node, layer: int | None) -> int:
        """Where in the source's order the first tensor behind an expression stands."""
        keys = [leaf.params["key"] for leaf in node.leaves() if leaf.op == "source"]
        found = [self._position[self._refs[self.model.family.holds(key) or key, layer].name] for key in keys]
        return min(found, default=0)

    def _shape(self, node: Node, layer: int | None) -> tuple[int, ...]:
        if node.op in ("source", "read"):
            return self._input(node, layer).shape
        if node.op == "fill":
            return tuple(node.params["shape"])
        if node.op in ("cut", "deal", "take"):
            inside = list(self._shape(node.of[0], layer))
            count = node.params.get("count")
            inside[node.params["axis"]] = node.params["stop"] - node.params["start"] if count is None else count
            return tuple(inside)
        shapes = [self._shape(child, layer) for child in node.of]
        if node.op in ("concat", "interleave"):
            return (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return shapes[0][::-1] if node.op == "transpose" else shapes[0]


def sibling_origin(index: int) -> str:
    """What the plan's inputs call the sibling at a place of --experts-from."""
    return f"source:{index + 1}"


def _refs_of(model: Model) -> dict[tuple[str, int | None], TensorRef]:
    tensors = model.checkpoint.tensors
    return {(role.key, role.layer): tensors[name] for name, role in model.roles.items()}


def _measured(leaf: Node) -> Input:
    """The bytes of a file that measuring wrote, at sizes that the plan knows by itself."""
    said, shape = leaf.params, tuple(leaf.params["shape"])
    item = tensor_nbytes(said["dtype"], (1,))
    return Input(said["tensor"], said["dtype"], shape, said["first"] * item, math.prod(shape) * item, said["origin"])


def _rounds(node: Node) -> bool:
    """Whether an expression's values may need more bits than its source's: all but powers of two and movements do."""
    if node.op in ("add", "centre"):
        return True
    if node.op in ("scale", "scale_rows") and math.frexp(node.params["by"])[0] not in (0.5, -0.5):
        return True
    return any(_rounds(child) for child in node.of)
