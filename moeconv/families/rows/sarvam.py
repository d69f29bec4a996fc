"""Sarvam: a 30B with GLM-4.5's computation, and a 105B with DeepSeek-V3's."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families.blocks import DENSE_FFN, LAYER, WITHOUT_QKVO
from moeconv.families.expert_blocks import MLP_EXPERTS, MLP_ROUTER, SHARED_EXPERTS, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import WHOLE, ConfigKeys, Elsewhere, Prediction, Tensors
from moeconv.families.rows.deepseek import DEEPSEEK_V3
from moeconv.families.rows.glm import GLM4_MOE
from moeconv.families.vendor import Vendor

_COUNT = ("n_routed_experts", "num_experts")  # the names of transformers, and of the checkpoints on the hub
_KINDS = {"num_shared_experts": WHOLE}


def _shared_experts(get: Get) -> int:
    found: int | None = get("num_shared_experts")
    return 1 if found is None else found


_ATTENTION = LAYER + "attention."
SARVAM_MOE = moe_row(
    "sarvam_moe",
    "Glm4MoeForCausalLM",
    config=ConfigKeys(
        {key: value for key, value in GLM4_MOE.config.defaults.items() if key != "num_nextn_predict_layers"}
        | {
            "num_key_value_heads": 4,
            "head_dim": 64,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.006,
            "rope_theta": 8e6,
            "use_qk_norm": True,
            "moe_intermediate_size": 1024,
            "routed_scaling_factor": 2.5,
            "n_shared_experts": None,
            "num_shared_experts": None,
        },
        kinds=_KINDS,
        derived={"n_shared_experts": _shared_experts},
    ),
    tensors=Tensors(
        WITHOUT_QKVO
        | {
            "embedding.tokens": "model.word_embeddings.weight",
            "attention.qkv": _ATTENTION + "query_key_value.weight",
            "attention.qkv_bias": _ATTENTION + "query_key_value.bias",
            "attention.o": _ATTENTION + "dense.weight",
            "attention.q_norm": _ATTENTION + "query_layernorm.weight",
            "attention.k_norm": _ATTENTION + "key_layernorm.weight",
            "router.correction": LAYER + "mlp.gate.expert_bias",
        }
        | MLP_ROUTER
        | MLP_EXPERTS
        | SHARED_EXPERTS
        | DENSE_FFN,
        optional=frozenset({"attention.q_norm", "attention.k_norm"}),
        float32=frozenset({"router.correction"}),
        fused={
            "attention.qkv": ("attention.q", "attention.k", "attention.v"),
            "attention.qkv_bias": ("attention.q_bias", "attention.k_bias", "attention.v_bias"),
        },
        in_memory={
            ".attention.": ".self_attn.",
            ".query_key_value": (".q_proj", ".k_proj", ".v_proj"),
            ".self_attn.dense": ".self_attn.o_proj",
        },
    ),
    experts=replace(GLM4_MOE.experts, count=_COUNT),
)
SARVAM_MLA = replace(
    DEEPSEEK_V3,
    model_type="sarvam_mla",
    config=ConfigKeys(
        {key: value for key, value in DEEPSEEK_V3.config.defaults.items() if key != "num_nextn_predict_layers"}
        | {
            "num_key_value_heads": "=num_attention_heads",
            "initializer_range": 0.006,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": None,
            "num_shared_experts": None,
        },
        kinds=_KINDS | {"q_lora_rank": WHOLE},
        derived={"n_shared_experts": _shared_experts},
    ),
    experts=replace(DEEPSEEK_V3.experts, count=_COUNT),
    prediction=Prediction(),
    elsewhere=Elsewhere(),
)

VENDOR = Vendor(
    moe=(SARVAM_MOE, SARVAM_MLA),
)
