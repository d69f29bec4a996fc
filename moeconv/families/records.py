"""The parts of a family's row, each about one thing: tensors, config keys, attention, layers, experts, what is beside.

A tensor's key is "group.part" (`attention.q`, `expert.down`). Two families that share a key mean the same matrix by it,
in the same layout, so a conversion is a lookup of the source's key in the target's table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeconv.families.placement import EVERY, Get, Placement
from moeconv.families.shapes import Size
from moeconv.families.sliding import NEVER, Sliding
from moeconv.types import Config, JsonObject

# kinds of values in config.json, as an error names them
WHOLE, NUMBER, SWITCH, WORD, LIST, OBJECT = (
    "a whole number", "a number", "true or false", "a word", "a list", "an object",
)  # fmt: skip
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Packed:
    """How one tensor holds the matrices of all experts of a layer, [E, ...] unless it is flat."""

    # the matrices of an expert in the tensor, one after the other
    parts: tuple[str, ...]
    # whether the parts alternate row by row, instead of one after the other
    interleaved: bool = False
    # whether each expert's matrix is stored as [in, out]
    transposed: bool = False
    # whether the first two axes are one, [E * rows, ...]
    flat: bool = False


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """One way to keep a family's experts on disk."""

    # key -> name on disk
    tensors: Mapping[str, str]
    # key of a tensor that holds all experts of a layer -> how
    packed: Mapping[str, Packed] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a family: their names on disk, and how matrices are stored in them."""

    # key -> name on disk, with {L} for the layer and {E} for the expert
    names: Mapping[str, str]
    # keys that a valid checkpoint may lack
    optional: frozenset[str] = frozenset()
    # names that old exports carry and no loader reads
    dropped: tuple[str, ...] = ()
    # key of a tensor that holds the rows of several matrices -> their keys
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # key of a tensor that holds all experts of a layer -> how
    packed: Mapping[str, Packed] = field(default_factory=dict)
    # all layouts of the experts that loaders take, where there is more than one
    layouts: tuple[ExpertLayout, ...] = ()
    # what the names of the language model's own tensors begin with
    prefix: str = "model."
    # the base model's prefix, which from_pretrained adds or removes; "" where it does neither
    base_prefix: str = "model."
    # part of a module's name on disk -> what transformers calls it in memory
    in_memory: Mapping[str, str] = field(default_factory=dict)
    # keys that are kept in float32 whatever the model's dtype
    float32: frozenset[str] = frozenset()
    # config key that adds tensors where it is true -> their keys
    switched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # key -> the value at which that tensor does nothing, for a source that lacks it
    inert: Mapping[str, float] = field(default_factory=dict)
    # what the class adds to a norm's weight
    norm_offset: float = 0.0
    # key -> shape, where it is another than the table of shapes.py says
    shapes: Mapping[str, str] = field(default_factory=dict)
    # name of a size in those expressions -> its number, where it is another than shapes.py says
    sizes: Mapping[str, Size] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """The keys of config.json that shape the computation. Where a family has other words for some of them, these tables
    keep the usual word, and `words` has the path in config.json."""

    # key -> what transformers assumes when config.json leaves it out; "=key" takes another key's value, None means that
    # the class derives it or that a checkpoint must state it
    defaults: Config
    # key -> values at which it changes nothing, so that a target without that key may drop it
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # key whose default is None -> the kind of its values (WHOLE, ...), where the table of kinds.py does not have it; a
    # key with another default takes values of that default's kind
    kinds: Mapping[str, str] = field(default_factory=dict)
    # key -> the value that the class computes with where config.json has null or lacks the key
    derived: Mapping[str, Callable[[Get], Any]] = field(default_factory=dict)
    # key -> its path in config.json, with dots between the names, where the family has another word for it
    words: Mapping[str, str] = field(default_factory=dict)
    # key -> (the values at which every step takes the family, what another value would mean)
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)

    def read(self, config: Config) -> Config:
        """The keys of a config.json in the words of these tables."""
        if not self.words:
            return config
        nested = {path.partition(".")[0] for path in self.words.values()}
        found = {key: value for key, value in config.items() if key not in nested}
        for key, path in self.words.items():
            value: object = config
            for name in path.split("."):
                value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
            if value is not _ABSENT:
                found[key] = value
        return found

    def write(self, config: Config, values: Config) -> JsonObject:
        """A config.json with `values`, which are in the words of these tables, in their places; a number that stood
        there as a list with an entry for each layer is written as a list again."""
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

    def value(self, key: str, config: Config) -> Any:
        """The value of a key: what config.json says, else what transformers assumes or derives. `config` is in the
        words of these tables."""
        if key in self.derived and config.get(key) is None:
            return self.derived[key](lambda other: self.value(other, config))
        if key in config:
            return config[key]
        value = self.defaults.get(key)
        return self.value(value[1:], config) if isinstance(value, str) and value.startswith("=") else value


@dataclass(frozen=True, slots=True)
class Attention:
    """How queries and keys turn with the position, and which layers attend through a window."""

    # which layers slide, as config.json says it
    sliding: Sliding = NEVER
    # the order of a head's rows: "half" (pairs half a head apart) or "interleaved" (pairs side by side)
    rotary: str = "half"
    # how config.json words the rotary parameters, a style of rope.py
    rope: str = "plain"
    # the share of a head that turns when config.json does not say it; None: the family turns the whole head
    partial: float | None = None


@dataclass(frozen=True, slots=True)
class Layers:
    """How many layers there are, of which kinds, and how wide their dense FFNs are."""

    # the number of layers
    count: Callable[[Get], Any] = lambda get: get("num_hidden_layers")
    # the kind of each layer, in a family that mixes kinds (attention, convolution, ...)
    kinds: Callable[[Get, int], list[str]] | None = None
    # group of keys -> the kinds of layers that have it; a group that is not named is in every layer
    where: Mapping[str, frozenset[str]] = field(default_factory=dict)
    # neurons of a dense FFN
    ffn_width: Callable[[Get], Any] = lambda get: get("intermediate_size")


@dataclass(frozen=True, slots=True)
class Routing:
    """The rule that turns router logits into expert weights."""

    # softmax or sigmoid over all experts, softmax_topk over the logits of the chosen ones, or sparsemixer
    score: str = "softmax"
    # whether the weights of the chosen experts are divided by their sum: "always", "never", or the deciding config key
    renormalise: str = "always"
    # what the weights of identical experts sum to when they are renormalised and the router is small
    total: float = 1.0
    # the only number of experts per token that the rule allows
    top_k: int | None = None
    # config key that multiplies the weighted sum
    scaling: str | None = None
    # config keys (groups, groups chosen) of a rule that first picks groups of neighbouring experts
    groups: tuple[str, str] | None = None
    # whether logits are float32 whatever the model's dtype, so that rounding makes no ties
    float32: bool = False
    # whether experts with equal logits get equal weights
    equal: bool = True
    # config key, and its value, without which `groups` are ignored
    grouped_by: tuple[str, str] | None = None
    # a group's score is the sum of that many of its best experts' scores
    best_of_group: int = 2
    # whether a weight multiplies what goes into an expert, not what comes out
    on_input: bool = False
    # whether every expert's weight has a factor of its own, after they are renormalised
    scaled: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """The Mixture-of-Experts of a family: config keys of its sizes, where it is, and how it routes. A dense row has
    this record with no keys."""

    # config keys of the number of experts; all of them are written
    count: tuple[str, ...] = ()
    # config keys of the number of experts per token; all of them are written
    top_k: tuple[str, ...] = ()
    # config key of the neurons of a routed expert
    width: str = "intermediate_size"
    # config key of the neurons of a dense layer's FFN beside layers with experts; "" where there is none
    dense_width: str = "intermediate_size"
    # config keys whose product is the neurons of the shared expert; () where there is none
    shared_width: tuple[str, ...] = ()
    # factor of the shared expert's output where the weights of its gate (if it has one) are zero
    shared_weight: float = 1.0
    # config key, and its value, at which routed and shared outputs are averaged instead of added
    averaged: tuple[str, str] | None = None
    # which layers have experts, as config.json says it
    placement: Placement = EVERY
    # how logits become weights; None in a dense row
    routing: Routing | None = None
    # config key whose value picks another rule than `routing`, and those rules
    rules: tuple[str, Mapping[str, Routing]] | None = None
    # key of the norm after the routed sum alone, in a family that normalises shared and routed outputs apart before it
    # adds them: parts of an FFN in both do not add up there, and with a norm of 0 the experts add nothing
    routed_norm: str = ""
    # transformers' implementation of experts by default, a key of widths.STRIDES; "eager": loops of its own
    implementation: str = "grouped_mm"
    # modules above the one with the experts' weights, up to the one that takes tokens to experts
    modules_above: int = 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """Multi-token-prediction layers after the model's own, which no class of transformers runs."""

    # key -> name on disk of what such a layer has beside what a layer of the model has; {} where there are none
    names: Mapping[str, str] = field(default_factory=dict)
    # what their names begin with in place of the model's prefix; "" where they are numbered on from the model's layers
    prefix: str = ""
    # what takes the place of "layers." after that prefix
    layers: str = "layers."
    # whether they have the sizes of layers that attend through a window
    slides: bool = False


@dataclass(frozen=True, slots=True)
class Multimodal:
    """Where the language model is inside a multimodal model."""

    # key of config.json with the language model's config; "" when its keys are at the top
    root: str = ""
    # beginning of the names of tensors that every step passes as they are -> their group, one of BESIDE
    beside: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What readers of config.json other than transformers 5 need of it, and which serving engines run the family.

    Readers: transformers 4.57, vLLM 0.32, SGLang, mlx-lm, and the converter of llama.cpp (2026-10).
    """

    # key that some reader needs and transformers 5 does not -> its value: itself, the "=key" whose value it takes, or a
    # function of the config's values; None leaves the key out
    keys: Config = field(default_factory=dict)
    # key of a list -> words of transformers 5 in it -> words of transformers 4, which both versions read
    old_words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    # key of a nested config -> the keys in it that its class in transformers 4 accepts
    nested: Mapping[str, frozenset[str]] = field(default_factory=dict)
    # keys that hold one number, which some reader takes only as a list of one per layer; transformers reads both
    per_layer: frozenset[str] = frozenset()
    # keys left out where they say what the class assumes anyway, because some reader stumbles over them
    implied: frozenset[str] = frozenset()
    # key that transformers 5 alone reads -> the value with which every other reader computes
    fixed: Config = field(default_factory=dict)
    # whether every other reader slides in all layers or in none, whatever layer_types says
    one_window: bool = False
    # serving engines whose list of models (2026) has the family
    runs: frozenset[str] = frozenset()
    # serving engines that are known not to run it; one that is in neither set is unknown
    runs_not: frozenset[str] = frozenset()
