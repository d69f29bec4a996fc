"""Microsoft: Phi-3."""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.families.model import Model
from moeconv.families.rope import attention_factor
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.record import Constant, LlamaCpp
from moeconv.quantize.gguf.llama_cpp.rope import rope_of


def _factors(model: Model) -> Iterator[Constant]:
    rope = rope_of(model)
    if rope["rope_type"] == "longrope":
        for word in ("long", "short"):
            yield Constant(f"rope_factors_{word}.weight", tuple(float(x) for x in rope[f"{word}_factor"]))


def _attention_factor(model: Model) -> float | None:
    rope = rope_of(model)
    return attention_factor(rope, model.value("max_position_embeddings")) if rope["rope_type"] == "longrope" else None


def _original(model: Model) -> int:
    found: int = rope_of(model).get("original_max_position_embeddings") or model.value(
        "original_max_position_embeddings"
    )
    return found


ROWS = {
    "phi3": LlamaCpp(
        "phi3",
        names=layer({"ffn.gate_up": "ffn_up.weight"}),
        constants=_factors,
        numbers={
            "rope.scaling.original_context_length": _original,
            "rope.scaling.attn_factor": _attention_factor,
            "rope.scaling.type": lambda _model: None,
            "attention.sliding_window": lambda model: model.value("sliding_window") or 0,
        },
        rope=frozenset({"default", "longrope"}),
    ),
}
