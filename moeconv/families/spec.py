"""What a row of the family tables says: tensor names by role, config keys with defaults, routing.

A tensor's key is "group.part" (`attention.q`, `expert.down`). Two families that share a key mean the same matrix
by it, in the same layout, so a conversion is a lookup of the source's key in the target's table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeconv.families.sliding import NEVER, Sliding

FFN_PARTS = ("gate", "up", "down")


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

    `score` is softmax or sigmoid over all experts; `renormalise` is "always", "never" or the config key that decides.
    """

    score: str = "softmax"
    renormalise: str = "always"


@dataclass(frozen=True, slots=True)
class Family:
    """One model family of transformers, as data.

    `tensors` maps a key to the name on disk with {L} for the layer and {E} for the expert; `optional` are keys that a
    valid checkpoint may lack; `dropped` are names that old exports carry and no loader reads. `config` holds every
    key that shapes the computation, with the value that transformers assumes when config.json leaves it out; "=key"
    takes another key's value, None means that the class derives it. `neutral` are values at which a key changes
    nothing, so that a target without that key may drop it. `num_experts` and `top_k` are alias lists, all written.
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
    dense_layers: str | None = None  # config key that lists layers which stay dense
    sparse_step: str | None = None  # config key: layer i is MoE only when (i + 1) % step == 0
    routing: Routing | None = None

    def name(self, key: str, *, layer: int | None = None, expert: int | None = None) -> str:
        """The tensor's name on disk. Raises KeyError for a key that the family does not have."""
        return self.tensors[key].replace("{L}", str(layer)).replace("{E}", str(expert))

    def has(self, key: str) -> bool:
        return key in self.tensors

    def expand(self, *, layers: int, experts: int) -> Iterator[tuple[str, Role]]:
        """Every name that a checkpoint of this size may hold, with its role."""
        for key, template in self.tensors.items():
            for layer in range(layers) if "{L}" in template else (None,):
                at_layer = template.replace("{L}", str(layer))
                for expert in range(experts) if "{E}" in template else (None,):
                    yield at_layer.replace("{E}", str(expert)), Role(key, layer, expert)

    def default(self, key: str, config: Mapping[str, Any]) -> Any:
        """The value of a key: what config.json says, else what transformers assumes."""
        if key in config:
            return config[key]
        value = self.config.get(key)
        return self.default(value[1:], config) if isinstance(value, str) and value.startswith("=") else value


@dataclass(frozen=True, slots=True)
class Pair:
    """A dense family that becomes an MoE family. `config` are keys to set in the target beside what it shares.

    `inert_shared_expert` is the width of an all-zero shared expert for targets that cannot be without one.
    """

    source: str
    target: str
    default: bool = False
    exact: bool = True
    note: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    inert_shared_expert: int = 0
