"""The Mixture-of-Experts families, a row each. Config defaults are those of transformers' classes (5.23)."""

from __future__ import annotations

from typing import Any

from moeconv.families.dense import BASE_CONFIG, BLOCK, DENSE_FFN, O_BIAS, QK_NORM, QKV_BIAS, ROTARY_BUFFERS
from moeconv.families.sliding import LAYER_TYPES_ALTERNATING, SWITCH, WINDOW_KEY
from moeconv.families.spec import Family, Routing

_LAYER = "model.layers.{L}."
_W_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}

MLP_EXPERTS = {f"expert.{p}": _LAYER + "mlp.experts.{E}." + f"{p}_proj.weight" for p in ("gate", "up", "down")}
MLP_ROUTER = {"router.weight": _LAYER + "mlp.gate.weight"}
SPARSE_BLOCK = {"router.weight": _LAYER + "block_sparse_moe.gate.weight"} | {
    f"expert.{p}": _LAYER + "block_sparse_moe.experts.{E}." + f"{w}.weight" for p, w in _W_NAMES.items()
}
SHARED_EXPERT = {f"shared.{p}": _LAYER + f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")}
SHARED_GATE = {"shared.router": _LAYER + "mlp.shared_expert_gate.weight"}

_ROUTER_LOSS: dict[str, Any] = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
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
    | _ROUTER_LOSS,
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
    | _ROUTER_LOSS,
    sliding=LAYER_TYPES_ALTERNATING,
    num_experts=_EXPERT_COUNT,
    top_k=_TOP_K,
    expert_width="moe_intermediate_size",
    dense_layers="mlp_only_layers",
    sparse_step="decoder_sparse_step",
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
    | _ROUTER_LOSS,
    sliding=SWITCH,
    num_experts=_EXPERT_COUNT,
    top_k=_TOP_K,
    expert_width="moe_intermediate_size",
    dense_layers="mlp_only_layers",
    sparse_step="decoder_sparse_step",
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
)

MOE: dict[str, Family] = {f.model_type: f for f in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE)}
