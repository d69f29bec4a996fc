"""IBM: Granite in all its forms, and Bamba."""

from __future__ import annotations

from typing import Any

from moeconv.families import sliding
from moeconv.families.blocks import (
    ATTENTION_BIAS,
    BLOCK,
    DENSE_FFN,
    FFN_BIAS,
    FUSED_FFN,
    HYBRID_WHERE,
    LAYER,
    MAMBA,
    MULTIPLIERS,
    NO_BIAS,
    O_BIAS,
    QKV_BIAS,
    SINKS,
    dense_row,
)
from moeconv.families.expert_blocks import GATE_UP_PACKED, ROUTER_LOSS, ZERO_SHARED_128, moe_row
from moeconv.families.placement import Get
from moeconv.families.spec import Pair, Routing
from moeconv.families.vendor import Vendor

GRANITE = dense_row(
    "granite",
    "GraniteForCausalLM",
    {"attention_bias": False, "mlp_bias": False, **MULTIPLIERS},
    tensors=BLOCK | ATTENTION_BIAS | DENSE_FFN | FFN_BIAS,
    neutral=NO_BIAS,
)
GRANITE_SWA = dense_row(
    "granite_swa",
    "GraniteSWAForCausalLM",
    {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": 128,
        "layer_types": None,
        "layer_rope_theta": None,
        **MULTIPLIERS,
    },
    tensors=BLOCK | SINKS | ATTENTION_BIAS | DENSE_FFN | FFN_BIAS,
    neutral=NO_BIAS,
    sliding=sliding.ALL_BUT_EVERY_FOURTH,
    rope="per_layer",
)
MAMBA_CONFIG: dict[str, Any] = {
    "layer_types": None, "position_embedding_type": None, "mamba_n_heads": 128, "mamba_n_groups": 1,
    "mamba_d_state": 256, "mamba_d_head": 64, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256,
    "mamba_conv_bias": True, "mamba_proj_bias": False, "time_step_limit": None,
}  # fmt: skip


def hybrid_kinds(get: Get, layers: int) -> list[str]:
    """What mixes the tokens in each layer: linear attention (Mamba) where layer_types does not say otherwise."""
    return get("layer_types") or ["linear_attention"] * layers


GRANITE_HYBRID = dense_row(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    {"attention_bias": False, "head_dim": None, **MULTIPLIERS, **MAMBA_CONFIG}
    | {"shared_intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2},
    tensors=BLOCK
    | ATTENTION_BIAS
    | MAMBA
    | {
        "ffn.gate_up": LAYER + "shared_mlp.input_linear.weight",
        "ffn.down": LAYER + "shared_mlp.output_linear.weight",
    },
    fused=FUSED_FFN,
    ffn_width=lambda get: get("shared_intermediate_size"),
    layer_kinds=hybrid_kinds,
    where=HYBRID_WHERE,
    no_experts=lambda get: get("num_local_experts") == 0,
)


def _bamba_kinds(get: Get, layers: int) -> list[str]:
    full = get("attn_layer_indices") or []
    return ["full_attention" if i in full else "linear_attention" for i in range(layers)]


BAMBA = dense_row(
    "bamba",
    "BambaForCausalLM",
    {key: value for key, value in MAMBA_CONFIG.items() if key not in ("layer_types", "position_embedding_type")}
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "attn_layer_indices": None,
        "num_logits_to_keep": 1,
        "z_loss_coefficient": 0.0,
    },
    tensors={k: v for k, v in BLOCK.items() if k not in ("norm.final", "norm.ffn")}
    | {"norm.final": "model.final_layernorm.weight", "norm.ffn": LAYER + "pre_ff_layernorm.weight"}
    | ATTENTION_BIAS
    | MAMBA
    | {k: v.replace(".mlp.", ".feed_forward.") for k, v in (DENSE_FFN | FFN_BIAS).items()},
    neutral=NO_BIAS,
    partial=0.5,
    layer_kinds=_bamba_kinds,
    where=HYBRID_WHERE,
)
_GRANITE_BLOCK = LAYER + "block_sparse_moe."
_GRANITE_EXPERTS = {
    "router.weight": _GRANITE_BLOCK + "router.layer.weight",
    "expert.gate_up": _GRANITE_BLOCK + "input_linear.weight",
    "expert.down": _GRANITE_BLOCK + "output_linear.weight",
}
_GRANITE_SHARED = {
    "shared.gate_up": LAYER + "shared_mlp.input_linear.weight",
    "shared.down": LAYER + "shared_mlp.output_linear.weight",
}
_FUSED_SHARED = {"shared.gate_up": ("shared.gate", "shared.up")}
_GRANITE_CONFIG = {"attention_bias": False, "head_dim": None} | MULTIPLIERS | ROUTER_LOSS
GRANITEMOE = moe_row(
    "granitemoe",
    "GraniteMoeForCausalLM",
    _GRANITE_CONFIG,
    BLOCK | QKV_BIAS | O_BIAS | _GRANITE_EXPERTS,
    num_experts=("num_local_experts",),
    packed=GATE_UP_PACKED,
    routing=Routing("softmax_topk", "always"),
)
GRANITEMOESHARED = moe_row(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    _GRANITE_CONFIG | {"shared_intermediate_size": 0},
    BLOCK | QKV_BIAS | O_BIAS | _GRANITE_EXPERTS | _GRANITE_SHARED,
    optional=frozenset(_GRANITE_SHARED),
    num_experts=("num_local_experts",),
    packed=GATE_UP_PACKED,
    fused=_FUSED_SHARED,
    shared_width=("shared_intermediate_size",),
    routing=Routing("softmax_topk", "always"),
)
GRANITEMOEHYBRID = moe_row(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    _GRANITE_CONFIG | MAMBA_CONFIG | {"shared_intermediate_size": 1024},
    BLOCK | QKV_BIAS | O_BIAS | MAMBA | _GRANITE_EXPERTS | _GRANITE_SHARED,
    num_experts=("num_local_experts",),
    packed=GATE_UP_PACKED,
    fused=_FUSED_SHARED,
    shared_width=("shared_intermediate_size",),
    routing=Routing("softmax_topk", "always"),
    layer_kinds=hybrid_kinds,
    where=HYBRID_WHERE,
)
GRANITEMOE_SWA = moe_row(
    "granitemoe_swa",
    "GraniteMoeSWAForCausalLM",
    _GRANITE_CONFIG
    | {"shared_intermediate_size": 0, "sliding_window": 128, "layer_types": None, "layer_rope_theta": None},
    BLOCK
    | SINKS
    | QKV_BIAS
    | O_BIAS
    | {
        "router.weight": _GRANITE_BLOCK + "router.weight",
        "expert.gate_up": _GRANITE_BLOCK + "experts.gate_up_proj",
        "expert.down": _GRANITE_BLOCK + "experts.down_proj",
    }
    | _GRANITE_SHARED,
    optional=frozenset(_GRANITE_SHARED),
    num_experts=("num_local_experts",),
    packed=GATE_UP_PACKED,
    fused=_FUSED_SHARED,
    shared_width=("shared_intermediate_size",),
    routing=Routing("softmax_topk", "always"),
    sliding=sliding.ALL_BUT_EVERY_FOURTH,
    rope="per_layer",
    inert={"attention.sinks": -1e30},
)

_NO_SHARED: dict[str, Any] = {"shared_intermediate_size": 0}
_HYBRID: dict[str, Any] = {"shared_intermediate_size": 128, "position_embedding_type": "rope"}
VENDOR = Vendor(
    dense=(GRANITE, GRANITE_SWA, GRANITE_HYBRID, BAMBA),
    moe=(GRANITEMOE, GRANITEMOESHARED, GRANITEMOEHYBRID, GRANITEMOE_SWA),
    pairs=(
        Pair("granite", "granitemoe", default=True),
        Pair("granite", "granitemoeshared", config=_NO_SHARED),
        Pair("granite", "granitemoehybrid", note=ZERO_SHARED_128, config=_HYBRID, folds=("attention_kinds",)),
        Pair(
            "granitemoehybrid",
            "granitemoehybrid",
            default=True,
            note=f"state-space layers included; {ZERO_SHARED_128}",
            config={"shared_intermediate_size": 128},
            rename=dict.fromkeys(("shared_intermediate_size", "num_local_experts", "num_experts_per_tok")),
        ),
        Pair(
            "bamba",
            "granitemoehybrid",
            default=True,
            note=f"state-space layers included; partial rotary through longrope factors; {ZERO_SHARED_128}",
            config=_HYBRID,
            # what only generation and training look at, and what layer_types says
            rename=dict.fromkeys(("attn_layer_indices", "num_logits_to_keep", "z_loss_coefficient")),
            folds=("neutral_multipliers",),
        ),
        Pair("granite_swa", "granitemoe_swa", default=True, config=_NO_SHARED),
        Pair("hyperclovax", "granitemoe", default=True, note="without post norms", folds=("logits_times",)),
        Pair("llama", "granitemoe", folds=("neutral_multipliers",)),
        Pair("llama", "granitemoeshared", config=_NO_SHARED, folds=("neutral_multipliers",)),
        Pair(
            "llama",
            "granitemoehybrid",
            note=ZERO_SHARED_128,
            config=_HYBRID,
            folds=("neutral_multipliers", "attention_kinds"),
        ),
        Pair(
            "ministral", "granitemoe_swa", note="attention sinks off", config=_NO_SHARED, folds=("neutral_multipliers",)
        ),
        Pair(
            "smollm3",
            "granitemoe_swa",
            default=True,
            note="layers without rotary embeddings, attention sinks off",
            config=_NO_SHARED,
            folds=("neutral_multipliers",),
        ),
    ),
)
