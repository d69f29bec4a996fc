"""Meta: Llama; and the families with its block."""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.families.model import Model
from moeconv.quantize.llama_cpp.changes import LLAMA_ROTARY
from moeconv.quantize.llama_cpp.names import FFN_BIAS, O_BIAS, QKV_BIAS
from moeconv.quantize.llama_cpp.numbers import rotary_factors
from moeconv.quantize.llama_cpp.record import Constant, LlamaCpp
from moeconv.quantize.llama_cpp.rope import rope_of

ROTARY = frozenset({"default", "linear", "llama3", "yarn"})


def frequencies(model: Model) -> Iterator[Constant]:
    """The factors of llama3's scaling, which llama.cpp reads as a tensor."""
    if rope_of(model)["rope_type"] == "llama3":
        yield Constant("rope_freqs.weight", tuple(rotary_factors(model)))


LLAMA = LlamaCpp(
    "llama",
    names=QKV_BIAS | O_BIAS | FFN_BIAS,
    changes=LLAMA_ROTARY,
    constants=frequencies,
    rope=ROTARY,
)

ROWS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "iquestcoder": LLAMA,
}
