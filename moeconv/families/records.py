"""The records that make up the row of a family: tensors, config keys, attention, layers, experts, and so on.

A tensor's key is "group.part" (`attention.q`, `expert.down`). A key that two families share means the same matrix in
the same layout, so a conversion looks up the source's key in the target's table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeconv.families.placement import EVERY, Get, Placement
from moeconv.families.shapes import Size
from moeconv.families.sliding import NEVER, Sliding
from moeconv.types import Config, JsonObject

# kinds of values in config.json, worded for error messages
WHOLE, NUMBER, SWITCH, WORD, LIST, OBJECT = (
    "a whole number", "a number", "true or false", "a word", "a list", "an object",
)  # fmt: skip
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Packed:
    """How one tensor holds the matrices of all experts of a layer: [E, ...], unless it is flat."""

    # the matrices of an expert that the tensor holds, in order
    parts: tuple[str, ...]
    # whether the parts alternate row by row, instead of one after the other
    interleaved: bool = False
    # whether each expert's matrix is stored as [in, out]
    transposed: bool = False
    # whether the first two axes are merged: [E * rows, ...]
    flat: bool = False


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """One way to store a family's experts on disk."""

    # key -> name on disk
    tensors: Mapping[str, str]
    # key of a tensor that holds all experts of a layer -> how it holds them
    packed: Mapping[str, Packed] = field(default_factory=dict)
    # what reads the layout, for messages, if no class of transformers does
    readers: str = ""


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a family: their names on disk, and how they store the matrices."""

    # key -> name on disk, with {L} for the layer and {E} for the expert
    names: Mapping[str, str]
    # keys that a valid checkpoint may lack
    optional: frozenset[str] = frozenset()
    # names of tensors that old exports contain and no loader reads
    dropped: tuple[str, ...] = ()
    # beginning of the names of tensors in a layer that every command copies unchanged -> their group, one of UNCHANGED
    unchanged: Mapping[str, str] = field(default_factory=dict)
    # key of a tensor that holds the rows of several matrices -> their keys
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # keys of fused tensors that hold queries, keys and values head by head, each head of keys and values after the
    # queries that attend to it, instead of one matrix after the other
    grouped: frozenset[str] = frozenset()
    # key of a tensor that holds all experts of a layer -> how it holds them
    packed: Mapping[str, Packed] = field(default_factory=dict)
    # all layouts of the experts that loaders accept, if there is more than one
    layouts: tuple[ExpertLayout, ...] = ()
    # the layout with separate experts that serving engines read and no class of transformers reads
    served: ExpertLayout | None = None
    # why there is none, where an engine that runs the family reads codes in another way
    unserved: str = ""
    # what reads the layout of the experts, for messages, if no class of transformers does; and the row's own layout
    # then
    readers: str = ""
    own: ExpertLayout | None = None
    # prefix of the names of the language model's tensors
    prefix: str = "model."
    # the base model's prefix, which from_pretrained adds or removes as needed; "" if it does neither
    base_prefix: str = "model."
    # beginning of names that only some exports have, and that transformers loads -> the usual beginning
    variants: Mapping[str, str] = field(default_factory=dict)
    # part of a module's name on disk (after "^": its beginning) -> its name in transformers' modules in memory, or the
    # names of the modules that it is split into or that it may be; the rules apply in order
    in_memory: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    # keys that stay in float32 whatever the model's dtype
    float32: frozenset[str] = frozenset()
    # config key that adds tensors if it is true -> their keys
    switched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # key -> the value at which that tensor has no effect, for a source that lacks it
    inert: Mapping[str, float] = field(default_factory=dict)
    # what the class adds to a norm's weight
    norm_offset: float = 0.0
    # key -> shape, if it differs from the table in shapes.py
    shapes: Mapping[str, str] = field(default_factory=dict)
    # name of a size in those expressions -> its value, if it differs from shapes.py
    sizes: Mapping[str, Size] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """The keys of config.json that affect the computation.

    If a family names some of them differently, these tables have the usual name, and `words` has the path in
    config.json.
    """

    # key -> what transformers assumes if config.json leaves it out; "=key" is the value of another key, None means that
    # the class derives the value or that a checkpoint must state it
    defaults: Config
    # key -> values at which it has no effect, so that a target without the key can leave it out
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # key whose default is None -> the kind of its values (WHOLE, ...), if the table in kinds.py lacks the key; a key
    # with another default takes values of that default's kind
    kinds: Mapping[str, str] = field(default_factory=dict)
    # key -> the value that the class computes with if config.json lacks the key or has null
    derived: Mapping[str, Callable[[Get], Any]] = field(default_factory=dict)
    # key -> its path in config.json, with dots between the names, if the family names it differently
    words: Mapping[str, str] = field(default_factory=dict)
    # key -> (the values with which every command accepts the family, what another value would mean)
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)

    def read(self, config: Config) -> Config:
        """The values of a config.json under the key names of these tables."""
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
        """A copy of a config.json with `values`, whose keys are those of these tables, at their paths.

        A number that the config has as a list with one entry per layer is written as such a list again.
        """
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
        """The value of a key: the one in config.json, else the one that transformers assumes or derives.

        `config` has the key names of these tables, as `read` returns it.
        """
        if key in self.derived and config.get(key) is None:
            return self.derived[key](lambda other: self.value(other, config))
        if key in config:
            return config[key]
        value = self.defaults.get(key)
        return self.value(value[1:], config) if isinstance(value, str) and value.startswith("=") else value


@dataclass(frozen=True, slots=True)
class Attention:
    """How queries and keys rotate with the position, and which layers attend through a window."""

    # how config.json states which layers have a sliding window
    sliding: Sliding = NEVER
    # the order of a head's rows: "half" (the rows of a pair are half a head apart) or "interleaved" (side by side)
    rotary: str = "half"
    # how config.json states the rotary parameters: a style of rope.py
    rope: str = "plain"
    # the share of a head that rotates if config.json does not state it; None: the family rotates the whole head
    partial: float | None = None
    # whether config.json may divide the pairs of a head between the positions in time, height and width
    # (mrope_section), which are equal in text
    sections: bool = False


@dataclass(frozen=True, slots=True)
class Layers:
    """The number of layers, their kinds, and the width of their dense FFNs."""

    # the number of layers
    count: Callable[[Get], Any] = lambda get: get("num_hidden_layers")
    # the kind of each layer, in a family that mixes kinds (attention, convolution, ...)
    kinds: Callable[[Get, int], list[str]] | None = None
    # group of keys, or key -> the kinds of layers that have it; what is not listed is in every layer
    where: Mapping[str, frozenset[str]] = field(default_factory=dict)
    # (what a layer of the class returns beside the hidden states, the kinds of layers that read it from the layer
    # before them): a model with such layers cannot be run layer by layer
    passed_on: tuple[str, frozenset[str]] | None = None
    # config key of the number of residual streams of the width hidden_size; "" if the family has one
    streams: str = ""
    # whether the class gives its layers the streams in a dimension of their own, [B, S, streams, H], instead of one
    # after the other, [B, S, streams * H]
    streams_apart: bool = False
    # key of a tensor of the module that reads the residual streams before the FFN; "" if the norm there reads them
    mixer: str = ""
    # group of keys -> the numbers of the layers that have it, where config.json lists them
    listed: Mapping[str, Callable[[Get], Collection[int]]] = field(default_factory=dict)
    # neurons of a dense FFN
    ffn_width: Callable[[Get], Any] = lambda get: get("intermediate_size")
    # the config keys of that number, and values of others with which it is the number itself
    ffn_width_keys: tuple[str, ...] = ("intermediate_size",)
    ffn_width_as_stated: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Routing:
    """The rule that turns router logits into expert weights."""

    # "softmax" or "sigmoid" over all experts, "softmax_topk" over the logits of the chosen ones, or "sparsemixer"
    score: str = "softmax"
    # whether the weights of the chosen experts are normalised: "always", "never", or the config key that decides
    renormalise: str = "always"
    # the sum of the weights of identical experts if they are renormalised and the router's weights are small
    total: float = 1.0
    # the only number of experts per token that the rule allows
    top_k: int | None = None
    # config key that multiplies the weighted sum
    scaling: str | None = None
    # config keys (number of groups, groups chosen) of a rule that first chooses groups of consecutive experts
    groups: tuple[str, str] | None = None
    # whether logits are float32 whatever the model's dtype, so that rounding causes no ties
    float32: bool = False
    # whether experts with equal logits get equal weights
    equal: bool = True
    # (config key, value): `groups` are ignored unless the key has this value
    grouped_by: tuple[str, str] | None = None
    # a group's score is the sum of the scores of this many of its best experts
    best_of_group: int = 2
    # whether a weight multiplies an expert's input instead of its output
    on_input: bool = False
    # whether each expert's weight is multiplied by a trained factor after the weights are renormalised
    scaled: bool = False

    @property
    def least(self) -> int:
        """The least number of experts in a group: stock code looks for the best ones also in a single group."""
        return self.best_of_group if self.groups is not None and self.grouped_by is None else 1


@dataclass(frozen=True, slots=True)
class Experts:
    """The Mixture-of-Experts of a family: the config keys of its sizes, the layers that have it, and its routing.

    In a dense row the record has no keys.
    """

    # config keys of the number of experts; all of them are written
    count: tuple[str, ...] = ()
    # config keys of the number of experts per token; all of them are written
    top_k: tuple[str, ...] = ()
    # config key of the width (number of neurons) of a routed expert
    width: str = "intermediate_size"
    # config key of the width of the FFNs of dense layers in a model with experts; "" if it has no such layers
    dense_width: str = "intermediate_size"
    # config keys whose product is the width of the shared expert; () if there is none
    shared_width: tuple[str, ...] = ()
    # factor of the shared expert's output if the weights of its gate (where it has one) are zero
    shared_weight: float = 1.0
    # (config key, value): at this value, routed and shared outputs are averaged instead of added
    averaged: tuple[str, str] | None = None
    # config key that multiplies the routed experts' sum; "" if there is none, or the weights have the factor
    factor: str = ""
    # key that, though it is in none of the groups expert, router, shared and ffn, only layers of one kind have ->
    # whether these are the layers with experts, or the dense ones
    only: Mapping[str, bool] = field(default_factory=dict)
    # how config.json states which layers have experts
    placement: Placement = EVERY
    # how logits become weights; None in a dense row
    routing: Routing | None = None
    # (config key, its value -> the rule that replaces `routing`)
    rules: tuple[str, Mapping[str, Routing]] | None = None
    # key of the norm of the routed sum alone, in a family that normalises shared and routed outputs separately before
    # it adds them: an FFN cannot be split between the two there, and with a norm of 0 the experts add nothing
    routed_norm: str = ""
    # whether the block that holds the experts normalises the sum of routed and shared outputs before it returns it
    normed: bool = False
    # transformers' default implementation of the experts, a key of widths.STRIDES; "eager" if it loops over them
    implementation: str = "grouped_mm"
    # number of modules from the one with the experts' weights up to the one that dispatches tokens to experts
    modules_above: int = 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """Multi-token-prediction layers after the model's own layers, which no class of transformers runs."""

    # key -> name on disk of the tensors that such a layer has in addition to those of a layer of the model; {} if the
    # family has no such layers
    names: Mapping[str, str] = field(default_factory=dict)
    # prefix of their names instead of the model's; "" if their numbers continue those of the model's layers
    prefix: str = ""
    # what replaces "layers." after that prefix
    layers: str = "layers."
    # whether they have the sizes of layers with a sliding window
    slides: bool = False
    # why no data runs through them, where a step is not one layer behind a projection of [embedding, hidden states]
    otherwise: str = ""


@dataclass(frozen=True, slots=True)
class Multimodal:
    """Where the language model is inside a multimodal model."""

    # key of config.json with the language model's config; "" when its keys are at the top
    root: str = ""
    # prefix of the names of tensors that every command copies unchanged -> their group, one of BESIDE
    beside: Mapping[str, str] = field(default_factory=dict)
    # model_type of the language model alone
    text: str = ""
    # model_type of the multimodal model with experts that `upcycle` makes of a dense one; "" if there is none
    becomes: str = ""
    # key of config.json with the config of a part beside the language model -> its model_type in this family
    parts: Mapping[str, str] = field(default_factory=dict)
    # those of the prefixes in `beside` that only some models of the family have
    may_lack: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Remote:
    """The class of a family is code in its checkpoints. Outputs keep it, because no other class reads them."""

    # model_type of transformers whose class computes the same from the same tensors, and reads the same config keys
    # when those that config.json leaves out are stated with the row's defaults; "" if there is none
    like: str = ""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What readers of config.json other than transformers 5 need in it, and which serving engines run the family.

    Readers: transformers 4.57, vLLM 0.32, SGLang, mlx-lm 0.32, and the converter of llama.cpp (2026-10).
    """

    # key that some reader needs and transformers 5 does not -> its value: a constant, "=key" for the value of another
    # key, or a function of the config's values; None leaves the key out
    keys: Config = field(default_factory=dict)
    # keys without which some reader fails, and that are null in the published models
    nulls: frozenset[str] = frozenset()
    # key of a list -> transformers 5's name of an entry -> transformers 4's name, which both versions read
    old_words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    # key of a nested config -> the keys in it that its class in transformers 4 accepts
    nested: Mapping[str, frozenset[str]] = field(default_factory=dict)
    # keys with one number that some reader accepts only as a list with one entry per layer; transformers reads both
    per_layer: frozenset[str] = frozenset()
    # keys that are left out if they state what the class assumes anyway, because some reader fails on them
    implied: frozenset[str] = frozenset()
    # key that only transformers 5 reads -> the value with which every other reader computes
    fixed: Config = field(default_factory=dict)
    # key that some readers ignore -> (the value with which they compute, the readers in words)
    ignored: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    # whether every other reader uses the window in all layers or in none, whatever layer_types contains
    one_window: bool = False
    # formats of packed weights that transformers does not load for this family
    not_loaded: frozenset[str] = frozenset()
    # serving engines whose list of models (2026) has the family
    runs: frozenset[str] = frozenset()
    # serving engines that are known not to run the family; for an engine in neither set it is unknown
    runs_not: frozenset[str] = frozenset()
