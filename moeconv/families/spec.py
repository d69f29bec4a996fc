"""The row of data that describes a model family, and the row that describes a conversion between two families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from moeconv.families.placement import Get
from moeconv.families.records import (
    Attention,
    ConfigKeys,
    Elsewhere,
    ExpertLayout,
    Experts,
    Layers,
    Multimodal,
    Prediction,
    Remote,
    Tensors,
)
from moeconv.types import Config

if TYPE_CHECKING:
    from moeconv.families.folds import Fold

FFN_PARTS = ("gate", "up", "down")
BESIDE = frozenset({"vision", "audio"})  # groups of tensors outside the language model, which text does not use
# groups of tensors that every command copies unchanged, whatever their number and dtype: those, and lookup tables that
# are split into as many tensors as config.json states
UNCHANGED = BESIDE | {"lookup"}


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor of a checkpoint is: which matrix, of which layer and which expert."""

    # "group.part", a key of the family's tensors
    key: str
    # number of the layer; None for a tensor outside the layers
    layer: int | None = None
    # number of the expert; None for a tensor that is not of one expert
    expert: int | None = None
    # which part of a packed weight it is (codes, scales, ...); "" for a plain tensor
    part: str = ""

    @property
    def group(self) -> str:
        return self.key.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Family:
    """One model family of transformers, as data. The records in records.py document their fields."""

    # model_type of config.json
    model_type: str
    # the class of transformers, as `architectures` of config.json names it
    architecture: str
    # whether the FFNs are dense or Mixtures-of-Experts
    kind: Literal["dense", "moe"]
    # names on disk, and how the tensors store the matrices
    tensors: Tensors
    # keys of config.json that affect the computation, with transformers' defaults
    config: ConfigKeys
    # rotary embeddings and sliding windows
    attention: Attention = field(default_factory=Attention)
    # number and kinds of layers
    layers: Layers = field(default_factory=Layers)
    # sizes, layers and routing of experts
    experts: Experts = field(default_factory=Experts)
    # multi-token-prediction layers
    prediction: Prediction = field(default_factory=Prediction)
    # where the language model is inside a multimodal one
    multimodal: Multimodal = field(default_factory=Multimodal)
    # what readers other than transformers 5 need, and which engines run it
    elsewhere: Elsewhere = field(default_factory=Elsewhere)
    # for a family whose class is code in its checkpoints: the exact pair of the dense family of transformers that
    # computes the same, and runs in its place
    runs_as: Pair | None = None
    # for a model_type with a dense row and a row with experts: whether a config belongs to the dense row
    is_dense: Callable[[Get], bool] | None = None
    # for a family whose class is code in its checkpoints
    remote: Remote | None = None

    def name(self, key: str, *, layer: int | None = None, expert: int | None = None) -> str:
        """The tensor's name on disk. Raises KeyError for a key that the family does not have."""
        return self.tensors.names[key].replace("{L}", str(layer)).replace("{E}", str(expert))

    def has(self, key: str) -> bool:
        return key in self.tensors.names

    def holds(self, key: str) -> str | None:
        """The key of the tensor on disk that holds the matrix `key`: itself, or the tensor that it is fused into.

        None if the family has neither.
        """
        if key in self.tensors.names:
            return key
        return next((whole for whole, parts in self.tensors.fused.items() if key in parts), None)

    def forms(self) -> tuple[Family, ...]:
        """The row once for every layout of its experts on disk; only the row itself if it has one layout."""
        return tuple(map(self.with_experts, self.tensors.layouts)) or (self.own_form,)

    @property
    def own_form(self) -> Family:
        """The row with the first layout of its experts that a class of transformers reads; itself if it has that."""
        return self if self.tensors.own is None else self.with_experts(self.tensors.own)

    @property
    def served_form(self) -> Family | None:
        """The row with the layout of separate experts that serving engines read and transformers does not, if there is
        one."""
        return None if self.tensors.served is None else self.with_experts(self.tensors.served)

    @property
    def only_served(self) -> bool:
        """Whether no class of transformers reads the layout of the experts."""
        return bool(self.tensors.readers)

    def with_experts(self, way: ExpertLayout) -> Family:
        """The row with another layout of the experts."""
        old = self.tensors
        mine = {key: name for key, name in old.names.items() if key.startswith("expert.")}
        names = {key: name for key, name in old.names.items() if key not in mine} | dict(way.tensors)
        own = (old.own or ExpertLayout(mine, old.packed)) if way.readers else None
        tensors = replace(old, names=names, packed=way.packed, readers=way.readers, own=own)
        return replace(self, tensors=tensors)

    @staticmethod
    def expert_axis(role: Role) -> int | None:
        """The axis of a tensor that has one entry per expert of a layer; None for a tensor without such an axis."""
        if role.group == "expert" and role.expert is None:
            return 0
        return (1 if role.key.endswith("_row") else 0) if role.group == "router" else None

    def places(self, *, layers: int, experts: int) -> Iterator[tuple[str, int | None, Sequence[int | None]]]:
        """Every (key, layer, its experts) of a checkpoint of this size; None for a tensor outside layers or experts."""
        numbers = range(experts)
        for key, template in self.tensors.names.items():
            for layer in range(layers) if "{L}" in template else (None,):
                yield key, layer, numbers if "{E}" in template else (None,)

    def expand(self, *, layers: int, experts: int) -> Iterator[tuple[str, Role]]:
        """Every name that a checkpoint of this size may hold, with its role."""
        for key, layer, numbers in self.places(layers=layers, experts=experts):
            at_layer = self.tensors.names[key].replace("{L}", str(layer))
            for expert in numbers:
                yield at_layer.replace("{E}", str(expert)), Role(key, layer, expert)

    def expand_mtp(self, *, first: int, count: int, experts: int) -> Iterator[tuple[str, Role]]:
        """Every name that `count` multi-token-prediction layers may hold; `first` is the number of the first one."""
        prefix, own = self.prediction.prefix, self.prediction.names
        for key, template in {**self.tensors.names, **own}.items():
            if "{L}" not in template and key not in own:
                continue
            for i in range(count):
                name = template.replace("{L}", str(i if prefix else first + i))
                name = self._mtp_name(name) if prefix else name
                for expert in range(experts) if "{E}" in template else (None,):
                    yield name.replace("{E}", str(expert)), Role(key, first + i, expert)

    def _mtp_name(self, name: str) -> str:
        """The name in a multi-token-prediction layer of the tensor that has the name `name` in a layer of the model."""
        layers = f"{self.tensors.prefix}layers."
        if name.startswith(layers):
            return self.prediction.prefix + self.prediction.layers + name.removeprefix(layers)
        return self.prediction.prefix + name.removeprefix(self.tensors.prefix)

    def predicts(self, name: str, *, layers: int) -> bool:
        """Whether the tensor `name` belongs to the multi-token-prediction layers after the model's `layers` layers."""
        if not self.prediction.names:
            return False
        if self.prediction.prefix:
            return name.startswith(self.prediction.prefix)
        if name in self.prediction.names.values():
            return True
        numbered = next(template for template in self.prediction.names.values() if "{L}" in template)
        before = numbered.partition("{L}")[0]
        number = name.removeprefix(before).partition(".")[0] if name.startswith(before) else ""
        return number.isdecimal() and int(number) >= layers


def with_expert(name: str, old: int, new: int) -> str:
    """The name of a tensor of expert `old`, or of a part of its packed weight, with the number of expert `new`."""
    return name.replace(f"experts.{old}.", f"experts.{new}.", 1)


@dataclass(frozen=True, slots=True)
class Pair:
    """The exact conversion of a dense family to a Mixture-of-Experts family.

    It lists only what the rows of the two families do not already determine (fused and packed tensors, rotary order,
    norm offset, rotary parameters, sliding windows).
    """

    # model_type of the dense family
    source: str
    # model_type of the family that it becomes
    target: str
    # whether `upcycle` chooses this target if there is no --to
    default: bool = False
    # whether it does so if a shared expert is requested
    with_shared: bool = False
    # what `moeconv families` prints about the pair
    note: str = ""
    # config keys to set in the target, in addition to those that it shares with the source
    config: Config = field(default_factory=dict)
    # the source's config key -> the target's name of it; None: a fold has worked the value into the weights
    rename: Mapping[str, str | None] = field(default_factory=dict)
    # config keys to set in the source where the pair is read backwards, which the target does not determine
    backwards: Config = field(default_factory=dict)
    # rules of folds.py that rewrite tensors, in order
    folds: tuple[Fold, ...] = ()
    # largest difference of logits in float32 that counts as equal, in units of their standard deviation
    tolerance: float = 1e-5
    # a description of the weights for which the pair is not exact, which no header shows
    unless: str = ""
