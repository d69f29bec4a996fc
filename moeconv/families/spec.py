"""What a row of the family tables says: tensor names by role, config keys with defaults, routing.

A tensor's key is "group.part" (`attention.q`, `expert.down`). Two families that share a key mean the same matrix
by it, in the same layout, so a conversion is a lookup of the source's key in the target's table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moeconv.families.placement import EVERY, Get, Placement
from moeconv.families.shapes import Size
from moeconv.families.sliding import NEVER, Sliding

FFN_PARTS = ("gate", "up", "down")
BESIDE = frozenset({"vision", "audio"})  # groups of what lies beside a language model and no text runs through
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor is: its key, its layer and expert where it has them; `part` names a piece of a packed weight."""

    key: str
    layer: int | None = None
    expert: int | None = None
    part: str = ""

    @property
    def group(self) -> str:
        return self.key.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Routing:
    """The rule that turns router logits into expert weights.

    `score` is softmax or sigmoid over all experts, softmax_topk over the logits of the chosen ones, or sparsemixer;
    `renormalise` is "always", "never" or the config key that decides. `total` is what the weights of identical
    experts sum to when they are renormalised and the router is small; `top_k` the only number that the rule allows.
    `scaling` is the config key that multiplies the weighted sum. `groups` are the config keys (groups, groups chosen)
    of a rule that first picks groups of neighbouring experts by the sum of the best `best_of_group` scores in each;
    `grouped_by` is the config key, and its value, without which the groups are not looked at. `float32` says
    that logits are float32 whatever the model's dtype, so that rounding makes no ties; `equal` that experts with equal
    logits get equal weights; `on_input` that a weight multiplies what goes into an expert, not what comes out; `scaled`
    that every expert's weight has a factor of its own, after they are renormalised.
    """

    score: str = "softmax"
    renormalise: str = "always"
    total: float = 1.0
    top_k: int | None = None
    scaling: str | None = None
    groups: tuple[str, str] | None = None
    float32: bool = False
    equal: bool = True
    grouped_by: tuple[str, str] | None = None
    best_of_group: int = 2
    on_input: bool = False
    scaled: bool = False


@dataclass(frozen=True, slots=True)
class Packed:
    """All experts of a layer in one tensor [E, ...]: each expert's `parts` one after the other, or row by row.

    `transposed`: each expert's matrix lies as [in, out]. `flat`: the first two axes are one, [E * rows, ...].
    """

    parts: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False
    flat: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to keep a family's experts on disk: names by key, and those that hold all experts of a layer."""

    tensors: Mapping[str, str]
    packed: Mapping[str, Packed] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Family:
    """One model family of transformers, as data.

    `tensors` maps a key to the name on disk with {L} for the layer and {E} for the expert; `optional` are keys that a
    valid checkpoint may lack; `dropped` are names that old exports carry and no loader reads. `config` holds every
    key that shapes the computation, with the value that transformers assumes when config.json leaves it out; "=key"
    takes another key's value, None means that the class derives it. `neutral` are values at which a key changes
    nothing, so that a target without that key may drop it. `num_experts` and `top_k` are alias lists, all written.

    Layout: `fused` tensors hold the rows of several keys, `packed` those of all experts; `rotary` is the order of a
    head's rows ("half": pairs half a head apart, "interleaved": side by side), `partial` the share of a head that
    turns when config.json does not say (None: the family turns all of it), `norm_offset` what the class adds to a
    norm's weight, `float32` the keys that are kept in float32.
    `words` are the paths in config.json (dots between the names) of keys that the family spells otherwise than the
    tables here; `experts_above` is how many modules above the one of the experts' weights takes tokens to experts.
    Of a multimodal model: `root` is the key of the language model's config, `prefix` what its own tensors' names begin
    with, `beside` the beginnings of the names that pass every step as they are, with a group of BESIDE each.
    Presence: `where` says for a group of keys in which kinds of layers it is; `switched` which keys a config switch
    adds; `inert` the value at which a tensor that the source lacks does nothing.
    `routed_norm` is the norm behind the routed sum alone, in a family that normalises shared and routed outputs apart
    before it adds them: parts of an FFN in each do not add up there, and at 0 the experts add nothing. `only` are
    config keys with the values that every step can take them at, and what another value would mean.
    `shapes` and `sizes` are what the row has otherwise than the tables of shapes.py.
    """

    model_type: str
    architecture: str
    kind: str  # "dense" or "moe"
    tensors: Mapping[str, str]
    config: Mapping[str, Any]
    optional: frozenset[str] = frozenset()
    dropped: tuple[str, ...] = ()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    root: str = ""  # key of the nested text config, "" when the keys are at the top
    sliding: Sliding = NEVER
    num_experts: tuple[str, ...] = ()
    top_k: tuple[str, ...] = ()
    expert_width: str = "intermediate_size"
    ffn_width: Callable[[Get], Any] = lambda get: get("intermediate_size")
    dense_width: str = "intermediate_size"  # config key of a dense layer's FFN in a family that may have one
    shared_width: tuple[str, ...] = ()  # config keys whose product is the shared expert's width
    shared_weight: float = 1.0  # of the shared expert's output, where its gate (if it has one) is zero
    averaged: tuple[str, str] | None = None  # config key, and its value at which routed and shared outputs are averaged
    placement: Placement = EVERY
    routing: Routing | None = None
    rules: tuple[str, Mapping[str, Routing]] | None = None  # config key whose value takes another rule than `routing`
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packed: Mapping[str, Packed] = field(default_factory=dict)
    layouts: tuple[Layout, ...] = ()  # all that loaders take for the experts, where that is more than one
    prefix: str = "model."
    base_prefix: str = "model."  # the base model's prefix, which a name may lack or have twice; "" where it may not
    beside: Mapping[str, str] = field(default_factory=dict)
    rotary: str = "half"
    rope: str = "plain"  # how config words rotary parameters, see rope.py
    partial: float | None = None
    norm_offset: float = 0.0
    float32: frozenset[str] = frozenset()
    layer_kinds: Callable[[Get, int], list[str]] | None = None
    where: Mapping[str, frozenset[str]] = field(default_factory=dict)
    switched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inert: Mapping[str, float] = field(default_factory=dict)
    mtp: Mapping[str, str] = field(default_factory=dict)  # what multi-token-prediction layers have beside a layer
    mtp_prefix: str = ""  # of their names in place of `prefix`; "" where they follow the model's own layers
    mtp_layers: str = "layers."  # what stands for "layers." behind that prefix
    mtp_slides: bool = False  # whether they have the sizes of layers that attend through a window
    in_memory: Mapping[str, str] = field(default_factory=dict)  # module on disk -> what transformers calls it
    words: Mapping[str, str] = field(default_factory=dict)
    experts_above: int = 0
    routed_norm: str = ""
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    layer_count: Callable[[Get], Any] = lambda get: get("num_hidden_layers")
    shapes: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, Size] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Get], Any]] = field(default_factory=dict)  # rules of the class for keys left out
    experts_run: str = "grouped_mm"  # transformers' default, a key of widths.STRIDES; "eager": loops of its own
    no_experts: Callable[[Get], bool] | None = None  # which configs this dense row of a family with an MoE row is for

    def name(self, key: str, *, layer: int | None = None, expert: int | None = None) -> str:
        """The tensor's name on disk. Raises KeyError for a key that the family does not have."""
        return self.tensors[key].replace("{L}", str(layer)).replace("{E}", str(expert))

    def has(self, key: str) -> bool:
        return key in self.tensors

    def holds(self, key: str) -> str | None:
        """The key of the tensor on disk that holds the matrix `key`: itself, or the one that it is fused into."""
        if key in self.tensors:
            return key
        return next((whole for whole, parts in self.fused.items() if key in parts), None)

    def forms(self) -> tuple[Family, ...]:
        """The row in every layout of its experts."""
        rest = {key: name for key, name in self.tensors.items() if not key.startswith("expert.")}
        return tuple(replace(self, tensors=rest | dict(way.tensors), packed=way.packed) for way in self.layouts) or (
            self,
        )

    @staticmethod
    def expert_axis(role: Role) -> int | None:
        """The axis that counts experts in a tensor that says something of every expert of a layer, else None."""
        if role.group == "expert" and role.expert is None:
            return 0
        return (1 if role.key.endswith("_row") else 0) if role.group == "router" else None

    def expand(self, *, layers: int, experts: int) -> Iterator[tuple[str, Role]]:
        """Every name that a checkpoint of this size may hold, with its role."""
        for key, template in self.tensors.items():
            for layer in range(layers) if "{L}" in template else (None,):
                at_layer = template.replace("{L}", str(layer))
                for expert in range(experts) if "{E}" in template else (None,):
                    yield at_layer.replace("{E}", str(expert)), Role(key, layer, expert)

    def expand_mtp(self, *, first: int, count: int, experts: int) -> Iterator[tuple[str, Role]]:
        """Every name that `count` multi-token-prediction layers may hold; their layer numbers go on from `first`."""
        for key, template in {**self.tensors, **self.mtp}.items():
            if "{L}" not in template and key not in self.mtp:
                continue
            for i in range(count):
                name = template.replace("{L}", str(i if self.mtp_prefix else first + i))
                name = self._mtp_name(name) if self.mtp_prefix else name
                for expert in range(experts) if "{E}" in template else (None,):
                    yield name.replace("{E}", str(expert)), Role(key, first + i, expert)

    def _mtp_name(self, name: str) -> str:
        """The name in a multi-token-prediction layer of what a layer of the model calls `name`."""
        layers = f"{self.prefix}layers."
        if name.startswith(layers):
            return self.mtp_prefix + self.mtp_layers + name.removeprefix(layers)
        return self.mtp_prefix + name.removeprefix(self.prefix)

    def predicts(self, name: str, *, layers: int) -> bool:
        """Whether a tensor belongs to the multi-token-prediction layers behind the `layers` of the model itself."""
        if not self.mtp:
            return False
        if self.mtp_prefix:
            return name.startswith(self.mtp_prefix)
        before = next(template for template in self.mtp.values() if "{L}" in template).partition("{L}")[0]
        number = name.removeprefix(before).partition(".")[0] if name.startswith(before) else ""
        return number.isdecimal() and int(number) >= layers

    def read(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keys of a config.json in the words of these tables."""
        if not self.words:
            return config
        nested = {path.partition(".")[0] for path in self.words.values()}
        found = {key: value for key, value in config.items() if key not in nested}
        for key, path in self.words.items():
            value: Any = config
            for name in path.split("."):
                value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
            if value is not _ABSENT:
                found[key] = value
        return found

    def write(self, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json with `values`, which are in the words of these tables, in their places; a number that stood
        there as a list with an entry for each layer is written so again."""
        result = dict(config)
        for key, value in values.items():
            *above, last = self.words.get(key, key).split(".")
            at = result
            for name in above:
                at[name] = dict(at[name]) if isinstance(at.get(name), Mapping) else {}
                at = at[name]
            repeats = type(value) is int and isinstance(at.get(last), list)
            at[last] = [value] * len(at[last]) if repeats else value
        return result

    def default(self, key: str, config: Mapping[str, Any]) -> Any:
        """The value of a key: what config.json says, else what transformers assumes or derives."""
        if key in self.derived and config.get(key) is None:
            return self.derived[key](lambda other: self.default(other, config))
        if key in config:
            return config[key]
        value = self.config.get(key)
        return self.default(value[1:], config) if isinstance(value, str) and value.startswith("=") else value


def with_expert(name: str, old: int, new: int) -> str:
    """The name of a tensor of expert `old`, or of a part of its packed weight, as that of expert `new`."""
    return name.replace(f"experts.{old}.", f"experts.{new}.", 1)


@dataclass(frozen=True, slots=True)
class Pair:
    """A dense family that becomes an MoE family. `config` are keys to set in the target beside what it shares.

    `rename` maps a source's config key to the target's word for it (None: a fold used it up); `folds` name rules of
    folds.py that rewrite tensors, in order. What both families' rows say by themselves (fused and packed tensors,
    rotary order, norm offset, rope, sliding windows) needs no mention here.
    """

    source: str
    target: str
    default: bool = False
    with_shared: bool = False  # the default where a shared expert is asked for
    exact: bool = True
    note: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    rename: Mapping[str, str | None] = field(default_factory=dict)
    folds: tuple[str, ...] = ()
    tolerance: float = 1e-5  # of the logits' spread in float32, what the source's own arithmetic allows
    unless: str = ""  # of which weights it is not exact, which no header shows
