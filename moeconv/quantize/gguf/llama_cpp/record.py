"""The row of data that states how llama.cpp stores a family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from moeconv.families.model import Model
from moeconv.families.placement import Get
from moeconv.quantize.gguf.llama_cpp.expression import Expression

Value = bool | int | float | str | list[bool] | list[int] | list[float]
# the value of a metadata key: that of a config key, or what a function of the model gives; None leaves the key out
Number = str | Callable[[Model], Value | None]
# how to make tensors of the file from one of the source: name (with {L}; "" for the usual one) -> part
Change = Callable[[Get, Expression], Mapping[str, Expression]]
SILU = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor of the file that config.json determines."""

    name: str
    values: tuple[float, ...]  # in float32


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """One family of llama.cpp, as it computes what a family of transformers computes."""

    arch: str
    # names of tensors that are missing or different in names.NAMES; "" leaves the tensor out
    names: Mapping[str, str] = field(default_factory=dict)
    # key of a tensor -> how it changes, where it is not stored as it is
    changes: Mapping[str, Change] = field(default_factory=dict)
    # tensors that the source does not have
    constants: Callable[[Model], Iterable[Constant]] = lambda _model: ()
    # config key -> the values with which llama.cpp computes the same
    needs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    # functions that name what llama.cpp cannot compute; None where it can
    checks: tuple[Callable[[Model], str | None], ...] = ()
    # metadata keys, without the architecture in front, beside numbers.usual; they take precedence
    numbers: Mapping[str, Number] = field(default_factory=dict)
    # values of hidden_act
    activations: tuple[str, ...] = SILU
    # types of rotary parameters
    rope: frozenset[str] = frozenset({"default", "linear"})
    # which sliding windows it computes: those of some layers, of all ("mixed", "all"), or none
    sliding: frozenset[str] = frozenset({"none"})
    # where layers without experts may be: "none", "first" (leading layers) or "any"
    dense_layers: str = "none"
    # whether keys and values may have fewer heads than queries
    grouped_query: bool = True
