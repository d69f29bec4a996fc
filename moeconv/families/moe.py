"""The Mixture-of-Experts families, a row each. Config defaults are those of transformers' classes (5.23)."""

from __future__ import annotations

from typing import Any

from moeconv.families import placement, sliding
from moeconv.families.dense import (
    BASE_CONFIG,
    BLOCK,
    DENSE_FFN,
    FFN_BIAS,
    FULL_LAYERS,
    FUSED_QKV,
    GEMMA4_BLOCK,
    GEMMA4_CONFIG,
    GEMMA4_ROW,
    HYBRID_WHERE,
    LFM2,
    LFM2_CONFIG,
    LFM2_OPTIONAL,
    LINEAR_ATTENTION,
    MAMBA,
    MAMBA_CONFIG,
    MLA,
    MLA_CONFIG,
    MULTIPLIERS,
    NEMOTRON_H_BLOCK,
    NEMOTRON_H_CONFIG,
    NEMOTRON_H_WHERE,
    NEMOTRON_H_WORDS,
    NORM_BIAS,
    O_BIAS,
    PARALLEL_BLOCK,
    POST_NORM,
    QK_LAYERNORM,
    QK_NORM,
    QKV_BIAS,
    QWEN3_5_CONFIG,
    QWEN3_5_WHERE,
    ROTARY_BUFFERS,
    SINKS,
    WITHOUT_QKVO,
    hybrid_kinds,
    nemotron_h_kinds,
    nemotron_h_layers,
    qwen3_5_kinds,
)
from moeconv.families.shapes import GATED_QUERY, LATENT, NEMOTRON_H_SIZES, WHOLE_ROW_NORMS
from moeconv.families.sliding import LAYER_TYPES_ALTERNATING, SWITCH, WINDOW_KEY
from moeconv.families.spec import Family, Layout, Packed, Routing

_LAYER = "model.layers.{L}."
_W_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}

MLP_EXPERTS = {f"expert.{p}": _LAYER + "mlp.experts.{E}." + f"{p}_proj.weight" for p in ("gate", "up", "down")}
_STACK = _LAYER + "mlp.experts."
STACKED_NAMES = {"expert.gate_up": _STACK + "gate_up_proj", "expert.down": _STACK + "down_proj"}
SEPARATE = Layout(MLP_EXPERTS)
STACKED = Layout(STACKED_NAMES, {"expert.gate_up": Packed(("gate", "up")), "expert.down": Packed(("down",))})
MLP_ROUTER = {"router.weight": _LAYER + "mlp.gate.weight"}
SPARSE_BLOCK = {"router.weight": _LAYER + "block_sparse_moe.gate.weight"} | {
    f"expert.{p}": _LAYER + "block_sparse_moe.experts.{E}." + f"{w}.weight" for p, w in _W_NAMES.items()
}
SHARED_EXPERT = {f"shared.{p}": _LAYER + f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")}
SHARED_GATE = {"shared.router": _LAYER + "mlp.shared_expert_gate.weight"}

ROUTER_LOSS: dict[str, Any] = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
_EXPERT_COUNT = ("num_local_experts", "num_experts")
_TOP_K = ("num_experts_per_tok",)
_QWEN_MOE: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False}

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    kind="moe",
    tensors=BLOCK | SPARSE_BLOCK,
    optional=frozenset({"embedding.lm_head"}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG
    | {
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }
    | ROUTER_LOSS,
    sliding=WINDOW_KEY,
    num_experts=_EXPERT_COUNT,
    top_k=_TOP_K,
    routing=Routing("softmax", "always"),
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    kind="moe",
    tensors=BLOCK | QKV_BIAS | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERT | SHARED_GATE | DENSE_FFN,
    optional=frozenset({"embedding.lm_head", *QKV_BIAS}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG
    | {
        "num_key_value_heads": 16,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    }
    | _QWEN_MOE
    | ROUTER_LOSS,
    sliding=LAYER_TYPES_ALTERNATING,
    num_experts=_EXPERT_COUNT,
    top_k=_TOP_K,
    expert_width="moe_intermediate_size",
    shared_width=("shared_expert_intermediate_size",),
    shared_weight=0.5,  # sigmoid(0) of its gate
    placement=placement.LIST,
    routing=Routing("softmax", "norm_topk_prob"),
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    kind="moe",
    tensors=BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS | DENSE_FFN,
    optional=frozenset({"embedding.lm_head", *QKV_BIAS, *O_BIAS}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG
    | {
        "num_key_value_heads": 4,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
    }
    | _QWEN_MOE
    | ROUTER_LOSS,
    sliding=SWITCH,
    num_experts=_EXPERT_COUNT,
    top_k=_TOP_K,
    expert_width="moe_intermediate_size",
    placement=placement.LIST,
    routing=Routing("softmax", "norm_topk_prob"),
)

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    kind="moe",
    tensors=BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS,
    optional=frozenset({"embedding.lm_head", *QKV_BIAS, *O_BIAS}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG
    | {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
    },
    num_experts=_EXPERT_COUNT,
    top_k=_TOP_K,
    routing=Routing("softmax", "norm_topk_prob"),
    shapes=WHOLE_ROW_NORMS,
)


# -- building blocks of the rows below -----------------------------------------------------------------------------

SHARED_EXPERTS = {f"shared.{p}": _LAYER + f"mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")}
_SHARED_MLP = {f"shared.{p}": _LAYER + f"mlp.shared_mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
CORRECTION = {"router.correction": _LAYER + "mlp.gate.e_score_correction_bias"}
_GRANITE_BLOCK = _LAYER + "block_sparse_moe."
_GRANITE_EXPERTS = {
    "router.weight": _GRANITE_BLOCK + "router.layer.weight",
    "expert.gate_up": _GRANITE_BLOCK + "input_linear.weight",
    "expert.down": _GRANITE_BLOCK + "output_linear.weight",
}
_GRANITE_SHARED = {
    "shared.gate_up": _LAYER + "shared_mlp.input_linear.weight",
    "shared.down": _LAYER + "shared_mlp.output_linear.weight",
}
_FUSED_SHARED = {"shared.gate_up": ("shared.gate", "shared.up")}
_PACKED = {"expert.gate_up": Packed(("gate", "up")), "expert.down": Packed(("down",))}
_QKVO = ("attention.q_bias", "attention.k_bias", "attention.v_bias", "attention.o_bias")
SIGMOID: dict[str, Any] = {
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_shared_experts": 1,
    "output_router_logits": False,
}  # fmt: skip
GROUPED = Routing(
    "sigmoid", "norm_topk_prob", scaling="routed_scaling_factor", groups=("n_group", "topk_group"), float32=True
)
_NO_INERT_BIAS = dict.fromkeys(_QKVO, 0.0)


# layers behind the last one, as DeepSeek-V3's and GLM-4.5's checkpoints carry them
MTP = {
    "mtp.embedding": _LAYER + "embed_tokens.weight",
    "mtp.norm_embedding": _LAYER + "enorm.weight",
    "mtp.norm_hidden": _LAYER + "hnorm.weight",
    "mtp.project": _LAYER + "eh_proj.weight",
    "mtp.norm": _LAYER + "shared_head.norm.weight",
    "mtp.head": _LAYER + "shared_head.head.weight",
}

# named beside the model: "model." stands for the prefix "mtp."
QWEN_MTP = {
    "mtp.norm_embedding": "model.pre_fc_norm_embedding.weight",
    "mtp.norm_hidden": "model.pre_fc_norm_hidden.weight",
    "mtp.project": "model.fc.weight",
    "mtp.norm": "model.norm.weight",
}


def moe_row(model_type: str, architecture: str, config: dict[str, Any], tensors: dict[str, str], **row: Any) -> Family:
    """A row whose biases, language-model head and correction are optional."""
    base = row.pop("base", BASE_CONFIG)
    optional = {"embedding.lm_head", *(k for k in tensors if k.endswith("_bias"))}
    return Family(
        model_type=model_type,
        architecture=architecture,
        kind="moe",
        tensors=tensors,
        optional=frozenset(row.pop("optional", frozenset()) | optional),
        dropped=ROTARY_BUFFERS,
        config=base | config,
        num_experts=row.pop("num_experts", _EXPERT_COUNT),
        top_k=row.pop("top_k", _TOP_K),
        **row,
    )


GLM4_MOE = moe_row(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "head_dim": None,
        "attention_bias": False,
        "use_qk_norm": False,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        **SIGMOID,
    },
    BLOCK | QKV_BIAS | QK_NORM | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
    optional=frozenset(QK_NORM),
    num_experts=("n_routed_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_intermediate_size", "n_shared_experts"),
    placement=placement.FIRST_K,
    routing=GROUPED,
    mtp=MTP,
    partial=0.5,
    float32=frozenset({"router.correction"}),
)
SOLAR_OPEN = moe_row(
    "solar_open",
    "SolarOpenForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "head_dim": 128,
        "attention_bias": False,
        "moe_intermediate_size": 1280,
        **SIGMOID,
    },
    BLOCK | QKV_BIAS | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS,
    num_experts=("n_routed_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_intermediate_size", "n_shared_experts"),
    routing=GROUPED,
    float32=frozenset({"router.correction"}),
)
DOTS1 = moe_row(
    "dots1",
    "Dots1ForCausalLM",
    {
        "num_key_value_heads": 32,
        "head_dim": None,
        "attention_bias": False,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "layer_types": None,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 0,
        **SIGMOID,
        "norm_topk_prob": False,
        "n_shared_experts": None,
    },
    BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
    num_experts=("n_routed_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_intermediate_size", "n_shared_experts"),
    placement=placement.FIRST_K,
    routing=GROUPED,
    sliding=sliding.FROM_MAX_WINDOW,
    float32=frozenset({"router.correction"}),
)
MELLUM = moe_row(
    "mellum",
    "MellumForCausalLM",
    {
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "attention_bias": False,
        "rope_theta": 500000.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "sliding_window": 1024,
        "layer_types": None,
        "mlp_layer_types": None,
        "moe_intermediate_size": 896,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": None,
        **ROUTER_LOSS,
    },
    BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS | DENSE_FFN,
    expert_width="moe_intermediate_size",
    placement=placement.WORDS,
    routing=Routing("softmax", "norm_topk_prob"),
    sliding=sliding.NO_LAYER,
    rope="per_type",
)
HY_V3 = moe_row(
    "hy_v3",
    "HYV3ForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 11158840.0,
        "initializer_range": 0.006,
        "attention_bias": False,
        "mlp_bias": False,
        "mlp_layer_types": None,
        "moe_intermediate_size": 1536,
        "num_shared_experts": 1,
        "router_scaling_factor": 2.826,
        "enable_moe_fp32_combine": True,
        "output_router_logits": False,
    },
    BLOCK
    | QK_NORM
    | QKV_BIAS
    | O_BIAS
    | {"router.weight": _LAYER + "mlp.router.gate.weight", "router.correction": _LAYER + "mlp.expert_bias"}
    | MLP_EXPERTS
    | _SHARED_MLP
    | DENSE_FFN
    | FFN_BIAS,
    num_experts=("num_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_intermediate_size", "num_shared_experts"),
    placement=placement.WORDS_FIRST_DENSE,
    routing=Routing("sigmoid", "always", scaling="router_scaling_factor", float32=True),
    float32=frozenset({"router.correction"}),
    in_memory={"mlp.shared_mlp.": "mlp.shared_experts."},
)
_GRANITE_CONFIG = {"attention_bias": False, "head_dim": None} | MULTIPLIERS | ROUTER_LOSS
GRANITEMOE = moe_row(
    "granitemoe",
    "GraniteMoeForCausalLM",
    _GRANITE_CONFIG,
    BLOCK | QKV_BIAS | O_BIAS | _GRANITE_EXPERTS,
    num_experts=("num_local_experts",),
    packed=_PACKED,
    routing=Routing("softmax_topk", "always"),
)
GRANITEMOESHARED = moe_row(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    _GRANITE_CONFIG | {"shared_intermediate_size": 0},
    BLOCK | QKV_BIAS | O_BIAS | _GRANITE_EXPERTS | _GRANITE_SHARED,
    optional=frozenset(_GRANITE_SHARED),
    num_experts=("num_local_experts",),
    packed=_PACKED,
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
    packed=_PACKED,
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
    packed=_PACKED,
    fused=_FUSED_SHARED,
    shared_width=("shared_intermediate_size",),
    routing=Routing("softmax_topk", "always"),
    sliding=sliding.ALL_BUT_EVERY_FOURTH,
    rope="per_layer",
    inert={"attention.sinks": -1e30},
)
ARIA_TEXT = moe_row(
    "aria_text",
    "AriaTextForCausalLM",
    {
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "moe_num_shared_experts": 2,
    },
    BLOCK
    | QKV_BIAS
    | O_BIAS
    | {
        "router.weight": _LAYER + "mlp.router.weight",
        "expert.gate_up": _LAYER + "mlp.experts.fc1.weight",
        "expert.down": _LAYER + "mlp.experts.fc2.weight",
    }
    | SHARED_EXPERTS,
    num_experts=("moe_num_experts",),
    top_k=("moe_topk",),
    packed={
        "expert.gate_up": Packed(("gate", "up"), transposed=True),
        "expert.down": Packed(("down",), transposed=True),
    },
    shared_width=("intermediate_size", "moe_num_shared_experts"),
    routing=Routing("softmax_topk", "always"),
)
GPT_OSS = moe_row(
    "gpt_oss",
    "GptOssForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        **ROUTER_LOSS,
    },
    BLOCK
    | SINKS
    | QKV_BIAS
    | O_BIAS
    | {
        "router.weight": _LAYER + "mlp.router.weight",
        "router.bias": _LAYER + "mlp.router.bias",
        "expert.gate_up": _LAYER + "mlp.experts.gate_up_proj",
        "expert.gate_up_bias": _LAYER + "mlp.experts.gate_up_proj_bias",
        "expert.down": _LAYER + "mlp.experts.down_proj",
        "expert.down_bias": _LAYER + "mlp.experts.down_proj_bias",
    },
    num_experts=("num_local_experts",),
    packed={
        "expert.gate_up": Packed(("gate", "up"), interleaved=True, transposed=True),
        "expert.gate_up_bias": Packed(("gate_bias", "up_bias"), interleaved=True),
        "expert.down": Packed(("down",), transposed=True),
        "expert.down_bias": Packed(("down_bias",)),
    },
    routing=Routing("softmax_topk", "always"),
    sliding=sliding.EVERY_SECOND,
    switched={"attention_bias": _QKVO},
    inert={"attention.sinks": -1e30, **_NO_INERT_BIAS},
)  # fmt: skip
COHERE2_MOE = moe_row(
    "cohere2_moe",
    "Cohere2MoeForCausalLM",
    {
        "layer_norm_eps": 1e-5,
        "rms_norm_eps": None,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "head_dim": 128,
        "attention_bias": False,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
        "mlp_layer_types": None,
        "num_shared_experts": 0,
        "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
        "prefix_dense_sliding_window_pattern": 1,
        "prefix_dense_intermediate_size": None,
        "output_router_logits": False,
    },
    PARALLEL_BLOCK | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
    optional=frozenset(SHARED_EXPERTS),
    num_experts=("num_experts",),
    ffn_width=lambda get: get("prefix_dense_intermediate_size") or get("intermediate_size"),
    dense_width="prefix_dense_intermediate_size",
    shared_width=("intermediate_size", "num_shared_experts"),
    averaged=("shared_expert_combination_strategy", "average"),
    placement=placement.WORDS,
    routing=Routing("softmax_topk", "always"),
    rules=("expert_selection_fn", {"sigmoid": Routing("sigmoid", "norm_topk_prob")}),
    sliding=sliding.ALL_BUT_LAST_OF_FOUR,
    rotary="interleaved",
)
HUNYUAN_MOE = moe_row(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "head_dim": None,
        "attention_bias": False,
        "eod_token_id": 3,
        "output_router_logits": False,
    },
    BLOCK
    | QKV_BIAS
    | O_BIAS
    | QK_LAYERNORM
    | {"router.weight": _LAYER + "mlp.gate.wg.weight"}
    | MLP_EXPERTS
    | _SHARED_MLP,
    num_experts=("num_experts",),
    top_k=("moe_topk",),
    shared_width=("intermediate_size",),
    routing=Routing("softmax", "always", float32=True),
    float32=frozenset({"router.weight"}),
)
_ERNIE_MTP = {
    "mtp.norm_embedding": "model.emb_norm.{L}.weight",
    "mtp.norm_hidden": "model.hidden_norm.{L}.weight",
    "mtp.project": "model.linear_proj.{L}.weight",
}
ERNIE4_5_MOE = moe_row(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "head_dim": None,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": None,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        **ROUTER_LOSS,
    },
    BLOCK
    | MLP_ROUTER
    | {"router.correction_row": _LAYER + "mlp.moe_statics.e_score_correction_bias"}
    | MLP_EXPERTS
    | SHARED_EXPERTS
    | DENSE_FFN,
    optional=frozenset(SHARED_EXPERTS),
    num_experts=("moe_num_experts",),
    top_k=("moe_k",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_intermediate_size", "moe_num_shared_experts"),
    placement=placement.RANGE,
    routing=Routing("softmax", "always", float32=True),
    mtp=_ERNIE_MTP,
    mtp_prefix="model.mtp_",
    mtp_layers="block.",
    rotary="interleaved",
    float32=frozenset({"router.weight", "router.correction_row"}),
)
FLEX_OLMO = moe_row(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    {
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "head_dim": None,
        "attention_bias": False,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
    },
    BLOCK | POST_NORM | QKV_BIAS | O_BIAS | QK_NORM | MLP_ROUTER | MLP_EXPERTS,
    num_experts=("num_experts",),
    routing=Routing("softmax", "norm_topk_prob"),
    shapes=WHOLE_ROW_NORMS,
)
LFM2_MOE = moe_row(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    {
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "output_router_logits": False,
    },
    LFM2
    | {"router.weight": _LAYER + "feed_forward.gate.weight", "router.correction": _LAYER + "feed_forward.expert_bias"}
    | {f"expert.{p}": _LAYER + "feed_forward.experts.{E}." + f"{w}.weight" for p, w in _W_NAMES.items()},
    base=LFM2_CONFIG,
    optional=LFM2_OPTIONAL | {"router.correction"},
    num_experts=("num_experts",),
    expert_width="moe_intermediate_size",
    placement=placement.NUM_DENSE,
    routing=Routing("sigmoid", "norm_topk_prob", scaling="routed_scaling_factor"),
    layer_kinds=lambda get, layers: get("layer_types") or ["full_attention"] * layers,
    where={"attention": FULL_LAYERS, "conv": frozenset({"conv"})},
    float32=frozenset({"router.correction"}),
)
DEEPSEEK_V3 = moe_row(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    MLA_CONFIG
    | {
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "rope_interleave": True,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        **SIGMOID,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
    },
    WITHOUT_QKVO | MLA | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
    optional=frozenset({"attention.q_whole", "attention.q_a", "attention.q_a_norm", "attention.q_b"}),
    num_experts=("n_routed_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_intermediate_size", "n_shared_experts"),
    placement=placement.FIRST_K,
    routing=GROUPED,
    mtp=MTP,
    float32=frozenset({"router.correction"}),
    shapes=LATENT,
)
PHIMOE = moe_row(
    "phimoe",
    "PhiMoEForCausalLM",  # as on the hub, and what serving engines know
    {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "head_dim": None,
        "sliding_window": None,
        "attention_bias": False,
        "lm_head_bias": False,
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.0,
        **ROUTER_LOSS,
    },
    BLOCK | NORM_BIAS | QKV_BIAS | O_BIAS | SPARSE_BLOCK | {"embedding.lm_head_bias": "lm_head.bias"},
    sliding=WINDOW_KEY,
    rope="mscale",
    # each of the two chosen experts is weighed by a softmax over those within the jitter of it: 1 without jitter
    routing=Routing("sparsemixer", "never", total=2.0, top_k=2, equal=False),
    in_memory={"block_sparse_moe.gate": "mlp.router"},
    switched={"attention_bias": _QKVO},
    inert=_NO_INERT_BIAS,
)
QWEN3_5_MOE = moe_row(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    QWEN3_5_CONFIG
    | {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        **ROUTER_LOSS,
    },
    BLOCK | QKV_BIAS | O_BIAS | QK_NORM | LINEAR_ATTENTION | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERT | SHARED_GATE,
    base={key: value for key, value in BASE_CONFIG.items() if key != "intermediate_size"},
    num_experts=("num_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("shared_expert_intermediate_size",),
    shared_weight=0.5,  # sigmoid(0) of its gate
    routing=Routing("softmax", "always"),
    # the hub's checkpoints stack the experts of the model, and of multi-token-prediction layers some do and some do not
    layouts=(SEPARATE, STACKED),
    mtp=QWEN_MTP,
    mtp_prefix="mtp.",
    partial=0.25,
    layer_kinds=qwen3_5_kinds,
    where=QWEN3_5_WHERE,
    shapes=GATED_QUERY,
)
_DBRX = "transformer.blocks.{L}."
DBRX = moe_row(
    "dbrx",
    "DbrxForCausalLM",
    {
        "clip_qkv": None,
        "num_key_value_heads": 1,
        "moe_normalize_expert_weights": 1.0,
        "moe_jitter_eps": None,
        "output_router_logits": False,
    },
    {
        "embedding.tokens": "transformer.wte.weight",
        "embedding.lm_head": "lm_head.weight",
        "norm.final": "transformer.norm_f.weight",
        "norm.attention": _DBRX + "norm_attn_norm.norm_1.weight",
        "norm.ffn": _DBRX + "norm_attn_norm.norm_2.weight",
        "attention.qkv": _DBRX + "norm_attn_norm.attn.Wqkv.weight",
        "attention.o": _DBRX + "norm_attn_norm.attn.out_proj.weight",
        "router.weight": _DBRX + "ffn.router.layer.weight",
        **{f"expert.{p}": _DBRX + f"ffn.experts.mlp.{w}" for p, w in (("gate", "w1"), ("up", "v1"), ("down", "w2"))},
    },
    base={key: value for key, value in BASE_CONFIG.items() if key != "rms_norm_eps"},
    experts_run="eager",
    num_experts=("moe_num_experts",),
    top_k=("moe_top_k",),
    fused=FUSED_QKV,
    packed={
        "expert.gate": Packed(("gate",), flat=True),
        "expert.up": Packed(("up",), flat=True),
        "expert.down": Packed(("down",), transposed=True, flat=True),
    },
    routing=Routing("softmax", "moe_normalize_expert_weights"),
    base_prefix="transformer.",
    words={
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
        "num_key_value_heads": "attn_config.kv_n_heads",
        "clip_qkv": "attn_config.clip_qkv",
        "attention_dropout": "attn_config.attn_pdrop",
        "rope_theta": "attn_config.rope_theta",
        "intermediate_size": "ffn_config.ffn_hidden_size",
        "hidden_act": "ffn_config.ffn_act_fn.name",
        "moe_num_experts": "ffn_config.moe_num_experts",
        "moe_top_k": "ffn_config.moe_top_k",
        "moe_normalize_expert_weights": "ffn_config.moe_normalize_expert_weights",
        "moe_jitter_eps": "ffn_config.moe_jitter_eps",
    },
    experts_above=1,
)
_MIXER = "backbone.layers.{L}.mixer."
NEMOTRON_H_MOE = moe_row(
    "nemotron_h",
    "NemotronHForCausalLM",
    NEMOTRON_H_CONFIG | {"hybrid_override_pattern": None},
    NEMOTRON_H_BLOCK
    | {"router.weight": _MIXER + "gate.weight", "router.correction": _MIXER + "gate.e_score_correction_bias"}
    | {f"expert.{p}": _MIXER + "experts.{E}." + f"{p}_proj.weight" for p in ("up", "down")}
    | {f"shared.{p}": _MIXER + f"shared_experts.{p}_proj.weight" for p in ("up", "down")},
    num_experts=("n_routed_experts",),
    expert_width="moe_intermediate_size",
    shared_width=("moe_shared_expert_intermediate_size",),
    placement=placement.of_kinds(nemotron_h_kinds),
    routing=GROUPED,
    rope="none",
    layer_kinds=nemotron_h_kinds,
    layer_count=nemotron_h_layers,
    where=NEMOTRON_H_WHERE,
    words=NEMOTRON_H_WORDS,
    base_prefix="backbone.",
    in_memory={"backbone.": "model."},
    sizes=NEMOTRON_H_SIZES,
)

# the dense FFN beside the experts is a shared expert with norms of its own
GEMMA4_TEXT = moe_row(
    "gemma4_text",
    "Gemma4ForCausalLM",
    GEMMA4_CONFIG,
    GEMMA4_BLOCK
    | {
        "norm.ffn": _LAYER + "pre_feedforward_layernorm_2.weight",
        "norm.shared": _LAYER + "pre_feedforward_layernorm.weight",
        "norm.post_shared": _LAYER + "post_feedforward_layernorm_1.weight",
        "norm.post_experts": _LAYER + "post_feedforward_layernorm_2.weight",
        "norm.router": _LAYER + "router.scale",
        "router.weight": _LAYER + "router.proj.weight",
        "router.scale": _LAYER + "router.per_expert_scale",
        "expert.gate_up": _LAYER + "experts.gate_up_proj",
        "expert.down": _LAYER + "experts.down_proj",
    }
    | {key.replace("ffn.", "shared."): name for key, name in DENSE_FFN.items()},
    num_experts=("num_experts",),
    top_k=("top_k_experts",),
    expert_width="moe_intermediate_size",
    dense_width="",  # its config has no dense layers beside others
    shared_width=("intermediate_size",),
    packed=_PACKED,
    placement=placement.switch("enable_moe_block"),
    routing=Routing("softmax", "always", scaled=True),
    inert={"router.scale": 1.0, "norm.post_shared": 1.0, "norm.post_experts": 1.0},
    routed_norm="norm.post_experts",
    **GEMMA4_ROW,
)

MOE: dict[str, Family] = {
    f.model_type: f
    for f in (
        MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GLM4_MOE, SOLAR_OPEN, DOTS1, MELLUM, HY_V3, GRANITEMOE, GRANITEMOESHARED,
        GRANITEMOEHYBRID, GRANITEMOE_SWA, ARIA_TEXT, GPT_OSS, COHERE2_MOE, HUNYUAN_MOE, ERNIE4_5_MOE, FLEX_OLMO,
        LFM2_MOE, DEEPSEEK_V3, PHIMOE, QWEN3_5_MOE, DBRX, NEMOTRON_H_MOE,
        GEMMA4_TEXT,
    )
}  # fmt: skip
