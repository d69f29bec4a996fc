"""More Mixture-of-Experts families, a row each: taken as a source of every step, made from no dense family."""

from __future__ import annotations

from typing import Any

from moeconv.families import placement, sliding
from moeconv.families.dense import (
    BLOCK,
    DENSE_FFN,
    FFN_BIAS,
    FULL_LAYERS,
    LINEAR_ATTENTION,
    MLA,
    MLA_CONFIG,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    QWEN3_5_CONFIG,
    QWEN3_5_WHERE,
    SINKS,
    WITHOUT_QKVO,
    qwen3_5_kinds,
)
from moeconv.families.moe import (
    CORRECTION,
    GROUPED,
    MLP_EXPERTS,
    MLP_ROUTER,
    MTP,
    QWEN_MTP,
    ROUTER_LOSS,
    SHARED_EXPERT,
    SHARED_EXPERTS,
    SHARED_GATE,
    SIGMOID,
    SPARSE_BLOCK,
    moe_row,
)
from moeconv.families.placement import Get
from moeconv.families.shapes import GATED_QUERY, LAGUNA_SIZES, LATENT, MAMBA_1, MIMO_SIZES, WHOLE_ROW_NORMS
from moeconv.families.spec import Family, Packed, Routing

_LAYER = "model.layers.{L}."
_FF = _LAYER + "feed_forward."
_PARTS = ("gate", "up", "down")
_FF_DENSE = {f"ffn.{p}": _FF + f"{p}_proj.weight" for p in _PARTS}
_MLA_OPTIONAL = frozenset({"attention.q_whole", "attention.q_a", "attention.q_a_norm", "attention.q_b"})
_LOSS_OFF: dict[str, Any] = {"output_router_logits": False}

DEEPSEEK_V2 = moe_row(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    MLA_CONFIG
    | {
        "moe_intermediate_size": 1407,
        "first_k_dense_replace": 0,
        "n_shared_experts": 2,
        "n_group": None,
        "topk_group": None,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "mlp_bias": False,
        **_LOSS_OFF,
    },
    WITHOUT_QKVO | MLA | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN | FFN_BIAS,
    optional=_MLA_OPTIONAL,
    num_experts=("n_routed_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_intermediate_size", "n_shared_experts"),
    placement=placement.FIRST_K,
    routing=Routing(
        "softmax", "never", scaling="routed_scaling_factor", groups=("n_group", "topk_group"), float32=True,
        grouped_by=("topk_method", "group_limited_greedy"), best_of_group=1,
    ),
    shapes=LATENT,
)  # fmt: skip
GLM4_MOE_LITE = moe_row(
    "glm4_moe_lite",
    "Glm4MoeLiteForCausalLM",
    MLA_CONFIG
    | {
        "num_key_value_heads": 20,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "moe_intermediate_size": 1536,
        "mlp_layer_types": None,
        "num_nextn_predict_layers": None,
        "rope_interleave": True,
    }
    | SIGMOID
    | {"routed_scaling_factor": 1.8},
    WITHOUT_QKVO | MLA | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
    optional=_MLA_OPTIONAL,
    num_experts=("n_routed_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_intermediate_size", "n_shared_experts"),
    placement=placement.WORDS_FIRST_DENSE,
    routing=GROUPED,
    mtp=MTP,
    float32=frozenset({"router.correction"}),
    shapes=LATENT,
)
EXAONE_MOE = moe_row(
    "exaone_moe",
    "ExaoneMoeForCausalLM",
    {
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "head_dim": None,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
        "moe_intermediate_size": 1024,
        "first_k_dense_replace": 1,
        "mlp_layer_types": None,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        **_LOSS_OFF,
    },
    BLOCK
    | QK_NORM
    | MLP_ROUTER
    | {"router.correction": _LAYER + "mlp.e_score_correction_bias"}
    | MLP_EXPERTS
    | SHARED_EXPERTS
    | DENSE_FFN,
    num_experts=("num_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_intermediate_size", "num_shared_experts"),
    placement=placement.WORDS_OR_FIRST_K,
    sliding=sliding.ALL_BUT_LAST_OF_FOUR,
    routing=GROUPED,
    mtp=QWEN_MTP,
    mtp_prefix="mtp.",
    float32=frozenset({"router.correction"}),
)
AFMOE = moe_row(
    "afmoe",
    "AfmoeForCausalLM",
    {
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "attention_bias": False,
        "sliding_window": 1024,
        "global_attn_every_n_layers": 4,
        "layer_types": None,
        "moe_intermediate_size": 1408,
        "num_dense_layers": 1,
        "num_shared_experts": 2,
        "route_scale": 1.0,
        "mup_enabled": False,
        **_LOSS_OFF,
    },
    BLOCK
    | QKV_BIAS
    | O_BIAS
    | QK_NORM
    | {
        "norm.post_attention": _LAYER + "post_attention_layernorm.weight",
        "norm.ffn": _LAYER + "pre_mlp_layernorm.weight",
        "norm.post_ffn": _LAYER + "post_mlp_layernorm.weight",
        "attention.gate": _LAYER + "self_attn.gate_proj.weight",
        "router.weight": _LAYER + "mlp.router.gate.weight",
        "router.correction": _LAYER + "mlp.expert_bias",
    }
    | MLP_EXPERTS
    | SHARED_EXPERTS
    | DENSE_FFN,
    optional=frozenset(SHARED_EXPERTS),
    num_experts=("num_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_intermediate_size", "num_shared_experts"),
    placement=placement.NUM_DENSE,
    sliding=sliding.ALL_BUT_GLOBAL,
    routing=Routing("sigmoid", "always", scaling="route_scale"),
    float32=frozenset({"router.correction"}),
)
QWEN3_NEXT = moe_row(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    QWEN3_5_CONFIG
    | {
        "num_key_value_heads": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 512,
        **ROUTER_LOSS,
    },
    BLOCK
    | QKV_BIAS
    | O_BIAS
    | QK_NORM
    | {k: v for k, v in LINEAR_ATTENTION.items() if k not in ("linear.a", "linear.b", "linear.qkv", "linear.z")}
    | {
        "linear.ba": _LAYER + "linear_attn.in_proj_ba.weight",
        "linear.qkvz": _LAYER + "linear_attn.in_proj_qkvz.weight",
    }
    | MLP_ROUTER
    | MLP_EXPERTS
    | SHARED_EXPERT
    | SHARED_GATE
    | DENSE_FFN,
    num_experts=("num_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("shared_expert_intermediate_size",),
    placement=placement.LIST,
    routing=Routing("softmax", "norm_topk_prob"),
    mtp=QWEN_MTP,
    mtp_prefix="mtp.",
    partial=0.25,
    layer_kinds=qwen3_5_kinds,
    where=QWEN3_5_WHERE,
    shapes=GATED_QUERY,
)


def _jamba_kinds(get: Get, layers: int) -> list[str]:
    period, offset = get("attn_layer_period") or 1, get("attn_layer_offset") or 0
    return ["attention" if i % period == offset else "mamba" for i in range(layers)]


JAMBA = moe_row(
    "jamba",
    "JambaForCausalLM",
    {
        "num_key_value_heads": 8,
        "max_position_embeddings": 262144,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        **ROUTER_LOSS,
    },
    {k: v for k, v in BLOCK.items() if k not in ("norm.final", "norm.ffn")}
    | {"norm.final": "model.final_layernorm.weight", "norm.ffn": _LAYER + "pre_ff_layernorm.weight"}
    | {
        f"mamba.{key}": _LAYER + f"mamba.{name}"
        for key, name in (
            ("A", "A_log"), ("D", "D"), ("b_norm", "b_layernorm.weight"), ("c_norm", "c_layernorm.weight"),
            ("dt_norm", "dt_layernorm.weight"), ("conv", "conv1d.weight"), ("conv_bias", "conv1d.bias"),
            ("dt", "dt_proj.weight"), ("dt_bias", "dt_proj.bias"), ("in", "in_proj.weight"),
            ("in_bias", "in_proj.bias"), ("out", "out_proj.weight"), ("out_bias", "out_proj.bias"),
            ("x", "x_proj.weight"),
        )
    }
    | {"router.weight": _FF + "router.weight"}
    | {f"expert.{p}": _FF + "experts.{E}." + f"{p}_proj.weight" for p in _PARTS}
    | _FF_DENSE,
    num_experts=("num_experts",),
    placement=placement.PERIOD,
    routing=Routing("softmax", "never"),
    rope="none",
    layer_kinds=_jamba_kinds,
    where={"attention": FULL_LAYERS, "mamba": frozenset({"mamba"})},
    shapes=MAMBA_1,
)  # fmt: skip
LLAMA4 = moe_row(
    "llama4_text",
    "Llama4ForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 1,
        "moe_layers": None,
        "layer_types": None,
        "no_rope_layers": None,
        "router_jitter_noise": 0.0,
        **ROUTER_LOSS,
    },
    BLOCK
    | QKV_BIAS
    | O_BIAS
    | {
        "router.weight": _FF + "router.weight",
        "expert.gate_up": _FF + "experts.gate_up_proj",
        "expert.down": _FF + "experts.down_proj",
    }
    | {f"shared.{p}": _FF + f"shared_expert.{p}_proj.weight" for p in _PARTS}
    | _FF_DENSE,
    experts_run="eager",
    num_experts=("num_local_experts",),
    packed={
        "expert.gate_up": Packed(("gate", "up"), transposed=True),
        "expert.down": Packed(("down",), transposed=True),
    },
    ffn_width=lambda get: get("intermediate_size_mlp"),
    shared_width=("intermediate_size",),
    placement=placement.MOE_LAYERS,
    base_prefix="",
    routing=Routing("sigmoid", "never", on_input=True),
)
MINIMAX_M2 = moe_row(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "rope_theta": 5e6,
        "router_jitter_noise": 0.0,
        **ROUTER_LOSS,
    },
    BLOCK | QK_NORM | SPARSE_BLOCK | {"router.correction": _LAYER + "block_sparse_moe.e_score_correction_bias"},
    num_experts=("num_local_experts",),
    routing=Routing("sigmoid", "always"),
    shapes=WHOLE_ROW_NORMS,
)
LAGUNA = moe_row(
    "laguna",
    "LagunaForCausalLM",
    {
        "rope_theta": 500000.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "attention_bias": False,
        "layer_types": None,
        "mlp_layer_types": None,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "moe_routed_scaling_factor": 1.0,
        **ROUTER_LOSS,
    },
    BLOCK
    | QK_NORM
    | {"attention.gate": _LAYER + "self_attn.g_proj.weight"}
    | MLP_ROUTER
    | {"router.correction": _LAYER + "mlp.experts.e_score_correction_bias"}
    | MLP_EXPERTS
    | SHARED_EXPERT
    | DENSE_FFN,
    num_experts=("num_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("shared_expert_intermediate_size",),
    placement=placement.WORDS_FIRST_DENSE,
    routing=Routing("sigmoid", "always", scaling="moe_routed_scaling_factor"),
    rope="per_type",
    partial=1.0,
    in_memory={"mlp.shared_expert.": "mlp.shared_experts."},
    shapes={"attention.gate": "gates, hidden"},
    sizes=LAGUNA_SIZES,
)
# dense layers with the attention of those with a window; "model." stands for the prefix "model.mtp."
_MIMO_MTP = {key: MTP[key] for key in ("mtp.norm_embedding", "mtp.norm_hidden", "mtp.project")} | {
    "mtp.norm_ffn": _LAYER + "pre_mlp_layernorm.weight",
    "mtp.norm": _LAYER + "final_layernorm.weight",
}
MIMO_V2_FLASH = moe_row(
    "mimo_v2_flash",
    "MiMoV2FlashForCausalLM",
    {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e6,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.334},
        },
        "head_dim": 192,
        "max_position_embeddings": 131072,
        "attention_bias": False,
        "sliding_window": 129,
        "layer_types": None,
        "mlp_layer_types": None,
        "moe_intermediate_size": 2048,
        **{k: v for k, v in SIGMOID.items() if k != "n_shared_experts"},
    },
    BLOCK
    | QKV_BIAS
    | {"attention.sinks": _LAYER + "self_attn.attention_sink_bias"}
    | MLP_ROUTER
    | CORRECTION
    | MLP_EXPERTS
    | DENSE_FFN,
    optional=frozenset(SINKS),
    num_experts=("n_routed_experts",),
    expert_width="moe_intermediate_size",
    placement=placement.WORDS_FIRST_DENSE,
    rope="per_type",
    partial=1.0,
    sliding=sliding.ALL_BUT_LAST_OF_SIX,
    routing=GROUPED,
    mtp=_MIMO_MTP,
    mtp_prefix="model.mtp.",
    mtp_slides=True,
    float32=frozenset({"router.correction"}),
    sizes=MIMO_SIZES,
)
MOE_SOURCES: dict[str, Family] = {
    f.model_type: f
    for f in (
        DEEPSEEK_V2, GLM4_MOE_LITE, EXAONE_MOE, AFMOE, QWEN3_NEXT, JAMBA, LLAMA4, MINIMAX_M2, LAGUNA, MIMO_V2_FLASH,
    )
}  # fmt: skip
