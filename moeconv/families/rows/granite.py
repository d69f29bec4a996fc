"""IBM: Granite in all its forms, and Bamba."""

from __future__ import annotations

from moeconv.families import folds, sliding
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
from moeconv.families.expert_blocks import (
    EVERY_ENGINE,
    GATE_UP_PACKED,
    ROUTER_LOSS,
    ZERO_SHARED_128,
    moe_row,
    served_below,
)
from moeconv.families.placement import Get
from moeconv.families.records import LIST, WORD, Attention, ConfigKeys, Elsewhere, Experts, Layers, Routing, Tensors
from moeconv.families.rows.minicpm import MINICPM_MULTIPLIERS
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor
from moeconv.types import JsonObject

GRANITE = dense_row(
    "granite",
    "GraniteForCausalLM",
    config=ConfigKeys({"attention_bias": False, "mlp_bias": False, **MULTIPLIERS}, neutral=NO_BIAS),
    tensors=Tensors(BLOCK | ATTENTION_BIAS | DENSE_FFN | FFN_BIAS),
)
GRANITE_SWA = dense_row(
    "granite_swa",
    "GraniteSWAForCausalLM",
    config=ConfigKeys(
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
        neutral=NO_BIAS,
    ),
    tensors=Tensors(BLOCK | SINKS | ATTENTION_BIAS | DENSE_FFN | FFN_BIAS),
    attention=Attention(sliding=sliding.ALL_BUT_EVERY_FOURTH, rope="per_layer"),
)
MAMBA_CONFIG: JsonObject = {
    "layer_types": None, "position_embedding_type": None, "mamba_n_heads": 128, "mamba_n_groups": 1,
    "mamba_d_state": 256, "mamba_d_head": 64, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256,
    "mamba_conv_bias": True, "mamba_proj_bias": False, "time_step_limit": None,
}  # fmt: skip


def hybrid_kinds(get: Get, layers: int) -> list[str]:
    """The kind of each layer's token mixer: linear attention (Mamba) unless layer_types names another one."""
    return get("layer_types") or ["linear_attention"] * layers


_HYBRID_ELSEWHERE = Elsewhere(
    old_words={"layer_types": {"linear_attention": "mamba", "full_attention": "attention"}}, runs=EVERY_ENGINE
)
GRANITE_HYBRID = dense_row(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    config=ConfigKeys(
        {"attention_bias": False, "head_dim": None, **MULTIPLIERS, **MAMBA_CONFIG}
        | {"shared_intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2},
        kinds={"position_embedding_type": WORD},
    ),
    tensors=Tensors(
        BLOCK
        | ATTENTION_BIAS
        | MAMBA
        | {
            "ffn.gate_up": LAYER + "shared_mlp.input_linear.weight",
            "ffn.down": LAYER + "shared_mlp.output_linear.weight",
        },
        fused=FUSED_FFN,
    ),
    layers=Layers(
        ffn_width=lambda get: get("shared_intermediate_size"),
        ffn_width_keys=("shared_intermediate_size",),
        kinds=hybrid_kinds,
        where=HYBRID_WHERE,
    ),
    elsewhere=_HYBRID_ELSEWHERE,
    is_dense=lambda get: get("num_local_experts") == 0,
)


def _bamba_kinds(get: Get, layers: int) -> list[str]:
    full = get("attn_layer_indices") or []
    return ["full_attention" if i in full else "linear_attention" for i in range(layers)]


BAMBA = dense_row(
    "bamba",
    "BambaForCausalLM",
    config=ConfigKeys(
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
        kinds={"attn_layer_indices": LIST},
        neutral=NO_BIAS,
    ),
    tensors=Tensors(
        {k: v for k, v in BLOCK.items() if k not in ("norm.final", "norm.ffn")}
        | {"norm.final": "model.final_layernorm.weight", "norm.ffn": LAYER + "pre_ff_layernorm.weight"}
        | ATTENTION_BIAS
        | MAMBA
        | {k: v.replace(".mlp.", ".feed_forward.") for k, v in (DENSE_FFN | FFN_BIAS).items()}
    ),
    attention=Attention(partial=0.5),
    layers=Layers(kinds=_bamba_kinds, where=HYBRID_WHERE, passed_on=("attention weights", frozenset())),
)
_GRANITE_BLOCK = LAYER + "block_sparse_moe."
_GRANITE_EXPERTS = {
    "router.weight": _GRANITE_BLOCK + "router.layer.weight",
    "expert.gate_up": _GRANITE_BLOCK + "input_linear.weight",
    "expert.down": _GRANITE_BLOCK + "output_linear.weight",
}
_GRANITE_SERVED = served_below(_GRANITE_BLOCK)
_GRANITE_SHARED = {
    "shared.gate_up": LAYER + "shared_mlp.input_linear.weight",
    "shared.down": LAYER + "shared_mlp.output_linear.weight",
}
_FUSED_SHARED = {"shared.gate_up": ("shared.gate", "shared.up")}
_GRANITE_CONFIG = {"attention_bias": False, "head_dim": None} | MULTIPLIERS | ROUTER_LOSS
GRANITEMOE = moe_row(
    "granitemoe",
    "GraniteMoeForCausalLM",
    config=ConfigKeys(_GRANITE_CONFIG),
    tensors=Tensors(BLOCK | QKV_BIAS | O_BIAS | _GRANITE_EXPERTS, packed=GATE_UP_PACKED, served=_GRANITE_SERVED),
    experts=Experts(count=("num_local_experts",), routing=Routing("softmax_topk", "always")),
    elsewhere=Elsewhere(runs=EVERY_ENGINE),
)
GRANITEMOESHARED = moe_row(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    config=ConfigKeys(_GRANITE_CONFIG | {"shared_intermediate_size": 0}),
    tensors=Tensors(
        BLOCK | QKV_BIAS | O_BIAS | _GRANITE_EXPERTS | _GRANITE_SHARED,
        optional=frozenset(_GRANITE_SHARED),
        packed=GATE_UP_PACKED,
        served=_GRANITE_SERVED,
        fused=_FUSED_SHARED,
    ),
    experts=Experts(
        count=("num_local_experts",),
        shared_width=("shared_intermediate_size",),
        routing=Routing("softmax_topk", "always"),
    ),
    elsewhere=Elsewhere(runs=frozenset({"vllm", "llama.cpp"})),
)
GRANITEMOEHYBRID = moe_row(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    config=ConfigKeys(
        _GRANITE_CONFIG | MAMBA_CONFIG | {"shared_intermediate_size": 1024}, kinds={"position_embedding_type": WORD}
    ),
    tensors=Tensors(
        BLOCK | QKV_BIAS | O_BIAS | MAMBA | _GRANITE_EXPERTS | _GRANITE_SHARED,
        packed=GATE_UP_PACKED,
        served=_GRANITE_SERVED,
        fused=_FUSED_SHARED,
    ),
    layers=Layers(kinds=hybrid_kinds, where=HYBRID_WHERE),
    experts=Experts(
        count=("num_local_experts",),
        shared_width=("shared_intermediate_size",),
        routing=Routing("softmax_topk", "always"),
    ),
    elsewhere=_HYBRID_ELSEWHERE,
)
GRANITEMOE_SWA = moe_row(
    "granitemoe_swa",
    "GraniteMoeSWAForCausalLM",
    config=ConfigKeys(
        _GRANITE_CONFIG
        | {"shared_intermediate_size": 0, "sliding_window": 128, "layer_types": None, "layer_rope_theta": None}
    ),
    tensors=Tensors(
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
        packed=GATE_UP_PACKED,
        fused=_FUSED_SHARED,
        inert={"attention.sinks": -1e30},
    ),
    attention=Attention(sliding=sliding.ALL_BUT_EVERY_FOURTH, rope="per_layer"),
    experts=Experts(
        count=("num_local_experts",),
        shared_width=("shared_intermediate_size",),
        routing=Routing("softmax_topk", "always"),
    ),
    elsewhere=Elsewhere(runs=frozenset({"vllm", "llama.cpp"})),
)

_NO_SHARED: JsonObject = {"shared_intermediate_size": 0}
_HYBRID: JsonObject = {"shared_intermediate_size": 128, "position_embedding_type": "rope"}

VENDOR = Vendor(
    dense=(GRANITE, GRANITE_SWA, GRANITE_HYBRID, BAMBA),
    moe=(GRANITEMOE, GRANITEMOESHARED, GRANITEMOEHYBRID, GRANITEMOE_SWA),
    pairs=(
        Pair("granite", "granitemoe", default=True),
        Pair("granite", "granitemoeshared", config=_NO_SHARED),
        Pair("granite", "granitemoehybrid", note=ZERO_SHARED_128, config=_HYBRID, folds=(folds.attention_kinds,)),
        Pair(
            "granitemoehybrid",
            "granitemoehybrid",
            default=True,
            note=f"state-space layers included; {ZERO_SHARED_128}",
            config={"shared_intermediate_size": 128},
            rename=dict.fromkeys(("shared_intermediate_size", "num_local_experts", "num_experts_per_tok")),
            backwards={"num_local_experts": 0, "num_experts_per_tok": 0},
        ),
        Pair(
            "bamba",
            "granitemoehybrid",
            default=True,
            note=f"state-space layers included; partial rotary through longrope factors; {ZERO_SHARED_128}",
            config=_HYBRID,
            # settings that only generation and training read, and those that layer_types already states
            rename=dict.fromkeys(("attn_layer_indices", "num_logits_to_keep", "z_loss_coefficient")),
            folds=(folds.neutral_multipliers,),
        ),
        Pair(
            "minicpm",
            "granitemoe",
            default=True,
            rename=MINICPM_MULTIPLIERS,
            folds=(folds.minicpm_as_multipliers,),
        ),
        Pair("internlm2", "granitemoe", rename={"bias": "attention_bias"}, folds=(folds.neutral_multipliers,)),
        Pair("granite_swa", "granitemoe_swa", default=True, config=_NO_SHARED),
        Pair("hyperclovax", "granitemoe", default=True, note="without post norms", folds=(folds.logits_times,)),
        Pair("llama", "granitemoe", folds=(folds.neutral_multipliers,)),
        Pair("llama", "granitemoeshared", config=_NO_SHARED, folds=(folds.neutral_multipliers,)),
        Pair(
            "llama",
            "granitemoehybrid",
            note=ZERO_SHARED_128,
            config=_HYBRID,
            folds=(folds.neutral_multipliers, folds.attention_kinds),
        ),
        Pair(
            "ministral",
            "granitemoe_swa",
            note="attention sinks off",
            config=_NO_SHARED,
            folds=(folds.neutral_multipliers,),
        ),
        Pair(
            "smollm3",
            "granitemoe_swa",
            default=True,
            note="layers without rotary embeddings, attention sinks off",
            config=_NO_SHARED,
            folds=(folds.neutral_multipliers,),
        ),
    ),
)
