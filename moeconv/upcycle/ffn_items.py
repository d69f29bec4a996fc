"""The items of a layer's FFN: the dense FFN as it is, or the router, the experts and the shared expert made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.errors import InputError, escape
from moeconv.families.node import Node, concat, fill, interleave, measured, scale, transpose
from moeconv.families.records import Packed
from moeconv.families.spec import Family
from moeconv.options import UpcycleOptions
from moeconv.plan.overlay import ORIGIN as OVERLAY
from moeconv.upcycle.cut import Cut
from moeconv.upcycle.methods import METHODS, Matrix
from moeconv.upcycle.outside_ffn import OTHER_TARGETS
from moeconv.upcycle.sources import UNPACKED, Sources
from moeconv.upcycle.target_tensors import Placed, TargetTensors

_CORRECTIONS = ("correction", "correction_row")  # parts of a router that count in the choice and not in the weights


@dataclass(frozen=True)
class FfnItems:
    """The FFNs of a conversion, layer by layer. `seed` is that of everything that is drawn."""

    tensors: TargetTensors
    options: UpcycleOptions
    seed: int

    @property
    def _sources(self) -> Sources:
        return self.tensors.sources

    @property
    def _target(self) -> Family:
        return self.tensors.target

    @property
    def _cut(self) -> Cut:
        return self.tensors.cut

    def _parts(self, layer: int) -> dict[str, Node]:
        """The expressions of a layer's FFN by part: gate, up, down, and their biases where the layer has them."""
        return {
            key.partition(".")[2]: node
            for key, node in self.tensors.draft.tensors.items()
            if key.startswith("ffn.") and self._sources.has(node, layer)
        }

    def _joined(self, parts: dict[str, Node]) -> dict[str, Node]:
        """The parts of a dense FFN, with those in one expression that the target stores in one tensor."""
        joined = dict(parts)
        for whole, keys in self._target.tensors.fused.items():
            words = [key.partition(".")[2] for key in keys]
            if whole.startswith("ffn.") and all(word in joined for word in words):
                joined[whole.partition(".")[2]] = concat(*(joined.pop(word) for word in words))
        return joined

    def dense(self, layer: int) -> Iterator[Placed]:
        """The items of a layer that stays dense."""
        for part, node in self._joined(self._parts(layer)).items():
            key = f"ffn.{part}"
            if not self._target.has(key):
                raise InputError(
                    f"{self._target.model_type} has no place for {key} of a dense layer ({layer})", hint=OTHER_TARGETS
                )
            yield self.tensors.item(key, layer, node, changed="ffn" if self._sources.changes(node) else "")

    def mixture(self, layer: int) -> Iterator[Placed]:
        """The items of a layer that becomes a Mixture-of-Experts."""
        parts = self._parts(layer)
        for part, node in parts.items():
            self._check(part, node, layer)
        yield from self._router_and_shared(layer, parts)
        for key in self._target.tensors.names:
            if key.startswith("expert."):
                yield from self._experts(key, layer, parts)

    def _check(self, part: str, node: Node, layer: int) -> None:
        """Raises InputError for a part that cannot become a part of experts."""
        for leaf in node.leaves():
            if leaf.op == "source" and (ref := self._sources.ref(leaf, layer)).dtype not in FLOAT_DTYPES:
                raise InputError(
                    f"tensor {escape(ref.name)!r} is {ref.dtype}: experts can only be made of "
                    f"{', '.join(FLOAT_DTYPES)} weights",
                    hint=UNPACKED,
                )
        if not any(part == own or part in layout.parts for own, layout in self._layouts()):
            name = next(self._sources.ref(leaf, layer).name for leaf in node.leaves() if leaf.op == "source")
            raise InputError(
                f"{self._target.model_type} has no place for tensor {escape(name)!r} (ffn.{part}) of "
                f"{self._sources.model.family.model_type}",
                hint=OTHER_TARGETS,
            )

    def _layouts(self) -> Iterator[tuple[str, Packed]]:
        """(part, layout) of each expert tensor of the target; the layout names the parts of the FFN that it holds."""
        for key in self._target.tensors.names:
            if key.startswith("expert."):
                part = key.partition(".")[2]
                yield part, self._target.tensors.packed.get(key, Packed((part,)))

    def _experts(self, key: str, layer: int, parts: Mapping[str, Node]) -> Iterator[Placed]:
        """The tensor `key` of every expert: one item per expert, or one that stacks them all."""

        def matrix(part: str, expert: int) -> Node:
            return self._matrix(part, parts[part], layer, expert)

        experts = range(self._cut.experts)
        layout = self._target.tensors.packed.get(key)
        if layout is None:
            for expert in experts:
                node = matrix(key.partition(".")[2], expert)
                yield self.tensors.item(key, layer, node, expert=expert, changed="expert")
            return
        made = []
        for expert in experts:
            each = [matrix(part, expert) for part in layout.parts]
            one = interleave(*each) if layout.interleaved else concat(*each)
            made.append(transpose(one) if layout.transposed else one)
        one_shape = self._sources.shape(made[0], layer)
        shape = (len(made) * one_shape[0], *one_shape[1:]) if layout.flat else (len(made), *one_shape)
        yield self.tensors.item(key, layer, concat(*made), shape=shape, changed="expert")

    def _matrix(self, part: str, node: Node, layer: int, expert: int | None) -> Node:
        """One matrix of an expert, or of the shared expert (None). Its scale is that at which the routed experts, with
        the target's weights, and the shared expert add up to the FFN."""
        cut, siblings = self._cut, self._sources.siblings
        method, rule = METHODS[self.options.method], self._target.experts.routing
        if siblings and expert is not None:
            node = self._sources.of_sibling(node, expert // cut.pieces % len(siblings), layer)
        matrix = Matrix(self.tensors.with_shape(f"ffn.{part}", node), part, layer, expert, self.seed, cut)
        chosen = method.select(matrix, self.options)
        if expert is None:
            return scale(chosen, 1 / self._target.experts.shared_weight) if part == "down" else chosen
        if cut.idle and part.startswith("down") and not self._target.experts.routed_norm:
            return Node("fill", (), {"value": 0.0, "shape": list(self._sources.shape(chosen, layer))})
        total = rule.total if rule else 1.0  # what the target's weights of one token sum to
        if part == "down":
            folded = 1.0 if rule and rule.scaling else method.scale(cut, self.options)
            chosen = scale(chosen, folded / total)
        elif part == "down_bias":  # every piece has all of it, and the weights of a copy's pieces sum to the copy's
            chosen = scale(chosen, 1 / total)
        return method.edit(replace(matrix, node=chosen), self.options)

    def _router_and_shared(self, layer: int, parts: Mapping[str, Node]) -> Iterator[Placed]:
        """The tensors that a dense layer does not have: those of the router and of the shared expert. A shared expert
        that holds no neurons of the FFN is zero."""
        like = parts["gate"] if "gate" in parts else parts["up"]
        position = self._sources.position(like, layer)
        for key in self._target.tensors.names:
            group, _, part = key.partition(".")
            if group == "router":
                node = self._router(layer) if part == "weight" else fill(self._target.tensors.inert.get(key, 0.0))
                if part in _CORRECTIONS and (correction := METHODS[self.options.method].correction):
                    node = correction(layer, self.options)
                yield position, self.tensors.item(key, layer, node, changed="router", like=like)[1]
            elif group == "shared" and self._cut.shared and part != "router":
                held = [name.partition(".")[2] for name in self._target.tensors.fused.get(key, (key,))]
                node = concat(*(self._matrix(name, parts[name], layer, None) for name in held))
                yield position, self.tensors.item(key, layer, node, changed="shared")[1]
            elif group == "shared" and self.tensors.shared_width:
                shape = self.tensors.shape_of(key)
                yield position, self.tensors.item(key, layer, fill(0.0), shape=shape, changed="shared", like=like)[1]

    def _router(self, layer: int) -> Node:
        """The router's rows [experts, H]: by the method, measured, or drawn. The pieces of one copy have equal rows, so
        that top-k chooses whole copies."""
        method = METHODS[self.options.method]
        if method.router is not None:
            return method.router(layer, self.options, self._sources.model.hidden_size)
        repeat = self._cut.pieces if method.grouped else 1
        if self.options.router == "random":
            params = {"key": [self.seed, "router", layer], "std": self.options.router_std}
            return Node("draw", (), params if repeat == 1 else {**params, "repeat": repeat})
        name = self._target.name("router.weight", layer=layer)
        rows, width = self._cut.experts // repeat, self.tensors.shape_of("router.weight")[1]
        if repeat == 1:
            return measured(name, dtype="F32", shape=(rows, width), origin=OVERLAY)
        each = [measured(name, dtype="F32", shape=(1, width), first=i * width, origin=OVERLAY) for i in range(rows)]
        return concat(*(row for row in each for _ in range(repeat)))
