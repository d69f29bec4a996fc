"""Z.ai: GLM, GLM-4.5, GLM-4.7-Flash, GLM-4.5V, and GLM-5."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families import placement
from moeconv.families.blocks import (
    BLOCK,
    DENSE_FFN,
    FFN_GATE_UP,
    FUSED_FFN,
    MLA,
    MLA_CONFIG,
    MLA_OPTIONAL,
    NO_BIAS,
    QK_NORM,
    QKV_BIAS,
    WITHOUT_QKVO,
    dense_row,
)
from moeconv.families.expert_blocks import (
    CORRECTION,
    EVERY_ENGINE,
    GROUPED,
    MLP_EXPERTS,
    MLP_ROUTER,
    MTP,
    NO_AUX_LOSS,
    ONE_SHARED_EXPERT,
    SHARED_EXPERTS,
    SIGMOID,
    ZERO_SHARED_FULL,
    leading_dense,
    moe_row,
)
from moeconv.families.indexers import indexer_types
from moeconv.families.placement import Get
from moeconv.families.records import LIST, Attention, ConfigKeys, Elsewhere, Experts, Layers, Prediction, Tensors
from moeconv.families.rows.deepseek import DEEPSEEK_V32
from moeconv.families.shapes import LATENT
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor, Wrapper

GLM = dense_row(
    "glm",
    "GlmForCausalLM",
    config=ConfigKeys(
        {
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-07,
            "max_position_embeddings": 131072,
            "attention_bias": True,
            "num_key_value_heads": 2,
            "partial_rotary_factor": None,
        },
        neutral=NO_BIAS,
    ),
    tensors=Tensors(BLOCK | QKV_BIAS | FFN_GATE_UP, fused=FUSED_FFN),
    attention=Attention(rotary="interleaved", partial=0.5),
)
GLM4_MOE = moe_row(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    config=ConfigKeys(
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
        }
    ),
    tensors=Tensors(
        BLOCK | QKV_BIAS | QK_NORM | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
        optional=frozenset(QK_NORM),
        switched={"use_qk_norm": tuple(QK_NORM)},
        float32=frozenset({"router.correction"}),
    ),
    attention=Attention(partial=0.5),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.FIRST_K,
        routing=GROUPED,
    ),
    prediction=MTP,
    elsewhere=Elsewhere(runs=EVERY_ENGINE),
)
GLM4_MOE_LITE = moe_row(
    "glm4_moe_lite",
    "Glm4MoeLiteForCausalLM",
    config=ConfigKeys(
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
        | {"routed_scaling_factor": 1.8}
    ),
    tensors=Tensors(
        WITHOUT_QKVO | MLA | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
        optional=MLA_OPTIONAL,
        float32=frozenset({"router.correction"}),
        shapes=LATENT,
    ),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.WORDS_FIRST_DENSE,
        routing=GROUPED,
    ),
    prediction=MTP,
    elsewhere=Elsewhere(
        keys=NO_AUX_LOSS | {"moe_layer_freq": 1, "first_k_dense_replace": leading_dense},
        runs=frozenset({"vllm", "llama.cpp"}),
    ),
)
GLM4V_MOE_TEXT = replace(
    GLM4_MOE,
    model_type="glm4v_moe_text",
    attention=Attention(partial=0.5, sections=True),
    tensors=replace(
        GLM4_MOE.tensors,
        names={k: v for k, v in GLM4_MOE.tensors.names.items() if k not in QK_NORM},
        switched={},
    ),
    config=ConfigKeys(
        {k: v for k, v in GLM4_MOE.config.defaults.items() if k not in ("num_nextn_predict_layers", "use_qk_norm")}
        | {"attention_bias": True, "max_position_embeddings": 65536}
    ),
    prediction=Prediction(),
)

# layers that run their own indexer, and layers that read the tokens which the last such layer chose
_OWN, _SHARED = "indexed_attention", "shared_indexed_attention"


def _indexers(get: Get, layers: int) -> list[str]:
    return [_SHARED if word == "shared" else _OWN for word in indexer_types(get, layers)]


GLM_MOE_DSA = replace(
    DEEPSEEK_V32,
    model_type="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    config=ConfigKeys(
        {
            **DEEPSEEK_V32.config.defaults,
            "num_key_value_heads": 64,
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
            "q_lora_rank": 2048,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "n_group": 1,
            "topk_group": 1,
            "index_n_heads": 32,
            "indexer_types": None,
            "index_topk_freq": 1,
            "index_skip_topk_offset": 2,
        },
        kinds={"indexer_types": LIST},
    ),
    layers=Layers(
        kinds=_indexers,
        where={"indexer": frozenset({_OWN})},
        passed_on=("prev_topk_indices", frozenset({_SHARED})),
    ),
)

_GLM4 = ONE_SHARED_EXPERT | {"num_nextn_predict_layers": 0}

VENDOR = Vendor(
    dense=(GLM,),
    aliases={"Glm4vMoe_text": "glm4v_moe_text"},  # as transformers 4 saves it
    moe=(GLM4_MOE, GLM4_MOE_LITE, GLM_MOE_DSA),
    pairs=(
        Pair(
            "llama",
            "glm4_moe",
            with_shared=True,
            note=ZERO_SHARED_FULL,
            config=_GLM4 | {"use_qk_norm": False, "attention_bias": False},
        ),
        Pair("qwen2", "glm4_moe", note=ZERO_SHARED_FULL, config=_GLM4 | {"use_qk_norm": False, "attention_bias": True}),
        Pair("qwen3", "glm4_moe", note=ZERO_SHARED_FULL, config=_GLM4 | {"use_qk_norm": True}),
        Pair("seed_oss", "glm4_moe", note=ZERO_SHARED_FULL, config=_GLM4 | {"use_qk_norm": False}),
        Pair(
            "glm",
            "glm4_moe",
            default=True,
            note=f"rotary order; {ZERO_SHARED_FULL}",
            config=_GLM4 | {"use_qk_norm": False},
        ),
        Pair(
            "chatglm",
            "glm4_moe",
            default=True,
            note=f"rotary order; {ZERO_SHARED_FULL}",
            config=_GLM4 | {"use_qk_norm": False},
            rename={"rope_ratio": None},
        ),
        Pair("phi3", "glm4_moe", note=ZERO_SHARED_FULL, config=_GLM4 | {"use_qk_norm": False, "attention_bias": False}),
    ),
    wrappers=(
        Wrapper(
            "glm4v_moe",
            "Glm4vMoeForConditionalGeneration",
            (GLM4V_MOE_TEXT,),
            {"model.visual.": "vision"},
            runs=frozenset({"vllm", "sglang"}),
        ),
    ),
)
