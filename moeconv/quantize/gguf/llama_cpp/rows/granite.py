"""IBM: Granite in all its forms, and Bamba."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families.model import Model
from moeconv.families.placement import Get
from moeconv.quantize.gguf.llama_cpp.changes import LLAMA_ROTARY, halves, partly_interleaved
from moeconv.quantize.gguf.llama_cpp.mamba import MAMBA2, MAMBA2_CHANGES, MAMBA_NUMBERS, heads_of_attention
from moeconv.quantize.gguf.llama_cpp.names import O_BIAS, QKV_BIAS, layer
from moeconv.quantize.gguf.llama_cpp.numbers import always, window, window_pattern
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp, Number
from moeconv.quantize.gguf.llama_cpp.rope import rope_of
from moeconv.quantize.gguf.llama_cpp.rows.llama import ROTARY, frequencies

_MULTIPLIERS: dict[str, Number] = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_GATE_UP = halves("blk.{L}.ffn_gate_shexp.weight", "blk.{L}.ffn_up_shexp.weight")
_SHARED_WIDTH: dict[str, Number] = {
    "expert_shared_feed_forward_length": lambda model: model.value("shared_intermediate_size") or None
}
GRANITE = LlamaCpp(
    "granite",
    names=QKV_BIAS | O_BIAS,
    changes=LLAMA_ROTARY,
    constants=frequencies,
    needs={"mlp_bias": (False,)},
    numbers=_MULTIPLIERS,
    rope=ROTARY,
)


def _rotates_everywhere(model: Model) -> str | None:
    """llama.cpp's converter has no key for layers with a rotary base of their own."""
    bases = model.value("layer_rope_theta")
    same = bases is None or all(base == rope_of(model)["rope_theta"] for base in bases)
    return None if same else "layers with a rotary base of their own (layer_rope_theta)"


def _share(get: Get) -> float:
    """The share of a head that rotates."""
    found = (get("rope_parameters") or {}).get("partial_rotary_factor")
    return float(found or get("partial_rotary_factor") or 0.5)


def _rotation(model: Model) -> bool:
    return bool(model.value("position_embedding_type") == "rope")


SWA = replace(
    GRANITE,
    arch="granite_swa",
    names=layer(
        {
            "attention.sinks": "attn_sinks.weight",
            "expert.gate_up": "ffn_gate_up_exps.weight",
            "shared.gate_up": "ffn_up_shexp.weight",
        }
    ),
    needs={"mlp_bias": (False,), "attention_bias": (False,)},
    checks=(_rotates_everywhere,),
    numbers=_MULTIPLIERS | {"attention.sliding_window": window, "attention.sliding_window_pattern": window_pattern},
    rope=frozenset({"default", "linear"}),
    sliding=frozenset({"mixed", "all"}),
)
HYBRID = LlamaCpp(
    "granitehybrid",
    names=MAMBA2,
    changes=MAMBA2_CHANGES,
    needs={"attention_bias": (False,), "mamba_proj_bias": (False,), "mlp_bias": (False,)},
    numbers=MAMBA_NUMBERS | {"attention.head_count_kv": heads_of_attention},
    rope=frozenset({"default", "linear"}),
)

ROWS = {
    "granite": GRANITE,
    "granite_swa": SWA,
    "granitemoe": replace(GRANITE, arch="granitemoe", names={}, needs={"attention_bias": (False,)}),
    "granitemoeshared": replace(
        GRANITE,
        arch="granitemoe",
        names={},
        changes=LLAMA_ROTARY | {"shared.gate_up": _GATE_UP},
        needs={"attention_bias": (False,)},
        numbers=_MULTIPLIERS | _SHARED_WIDTH,
    ),
    "granitemoe_swa": replace(SWA, numbers={**SWA.numbers, **_SHARED_WIDTH}),
    "granitemoehybrid": replace(
        HYBRID,
        changes=MAMBA2_CHANGES
        | LLAMA_ROTARY
        | {"shared.gate_up": _GATE_UP, "ffn.gate_up": halves("blk.{L}.ffn_gate.weight", "blk.{L}.ffn_up.weight")},
        numbers={
            **HYBRID.numbers,
            **_MULTIPLIERS,
            **_SHARED_WIDTH,
            "rope.scaling.finetuned": _rotation,
            "context_length": lambda model: model.value("max_position_embeddings") if _rotation(model) else 1 << 20,
            "feed_forward_length": lambda model: (
                model.value("intermediate_size") if model.num_experts else model.value("shared_intermediate_size")
            ),
        },
    ),
    "bamba": replace(
        HYBRID,
        changes=MAMBA2_CHANGES | {f"attention.{key}": partly_interleaved(_share) for key in "qk"},
        numbers={**HYBRID.numbers, "rope.scaling.finetuned": always(True)},
    ),
}
