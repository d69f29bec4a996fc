"""Alibaba: Qwen2 and Qwen3, their Mixture-of-Experts, and Qwen3-VL."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families import placement
from moeconv.families.blocks import (
    BASE_CONFIG,
    BLOCK,
    DENSE_FFN,
    LAYER,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    ROTARY_BUFFERS,
    dense_row,
)
from moeconv.families.expert_blocks import (
    EVERY_ENGINE,
    MLP_EXPERTS,
    MLP_ROUTER,
    ROUTER_LOSS,
    SHARED_EXPERT,
    SHARED_GATE,
    STACKED,
    STACKED_NAMES,
    ZERO_SHARED_128,
    moe_row,
    served_below,
)
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, ExpertLayout, Experts, Routing, Tensors
from moeconv.families.sliding import LAYER_TYPES, LAYER_TYPES_ALTERNATING, SWITCH
from moeconv.families.spec import Family, Pair
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.types import JsonObject

_QWEN_SLIDING = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "dense",
    config=ConfigKeys(BASE_CONFIG | {"num_key_value_heads": 32, "max_position_embeddings": 32768} | _QWEN_SLIDING),
    # the biases of its queries, keys and values are not optional: no config key turns them off
    tensors=Tensors(BLOCK | QKV_BIAS | DENSE_FFN, optional=frozenset({"embedding.lm_head"}), dropped=ROTARY_BUFFERS),
    attention=Attention(sliding=LAYER_TYPES),
)
QWEN3 = dense_row(
    "qwen3",
    "Qwen3ForCausalLM",
    config=ConfigKeys(
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "attention_bias": False}
        | _QWEN_SLIDING
    ),
    tensors=Tensors(BLOCK | QK_NORM | QKV_BIAS | O_BIAS | DENSE_FFN),
    attention=Attention(sliding=LAYER_TYPES),
)
_QWEN_MOE: JsonObject = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False}
QWEN2_MOE = moe_row(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    config=ConfigKeys(
        {
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
        | ROUTER_LOSS
    ),
    tensors=Tensors(BLOCK | QKV_BIAS | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERT | SHARED_GATE | DENSE_FFN),
    attention=Attention(sliding=LAYER_TYPES_ALTERNATING),
    experts=Experts(
        width="moe_intermediate_size",
        shared_width=("shared_expert_intermediate_size",),
        shared_weight=0.5,  # sigmoid(0) of its gate
        placement=placement.LIST,
        routing=Routing("softmax", "norm_topk_prob"),
    ),
    elsewhere=Elsewhere(
        one_window=True, ignored={"norm_topk_prob": (False, "llama.cpp and mlx-lm")}, runs=EVERY_ENGINE
    ),
)
QWEN3_MOE = moe_row(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 4,
            "head_dim": None,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "moe_intermediate_size": 768,
        }
        | _QWEN_MOE
        | ROUTER_LOSS
    ),
    tensors=Tensors(BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS | DENSE_FFN),
    attention=Attention(sliding=SWITCH),
    experts=Experts(
        width="moe_intermediate_size", placement=placement.LIST, routing=Routing("softmax", "norm_topk_prob")
    ),
    elsewhere=Elsewhere(runs=EVERY_ENGINE),
)
# the language models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL rotate text as Qwen2 and Qwen3 do
QWEN2_VL_TEXT = replace(
    QWEN2,
    model_type="qwen2_vl_text",
    config=ConfigKeys(
        dict(QWEN2.config.defaults)
        | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80}
    ),
    attention=Attention(sliding=LAYER_TYPES, sections=True),
)
# as some versions of transformers saved them
_LATER_NAMES = {"model.language_model.": "model.", "model.visual.": "visual."}
QWEN2_5_VL_TEXT = replace(QWEN2_VL_TEXT, model_type="qwen2_5_vl_text")
QWEN3_VL_TEXT = replace(
    QWEN3,
    model_type="qwen3_vl_text",
    config=ConfigKeys(
        {key: value for key, value in QWEN3.config.defaults.items() if key not in _QWEN_SLIDING}
        | {"max_position_embeddings": 128000, "rope_theta": 500000.0}
    ),
    attention=Attention(sections=True),
)
_TRANSPOSED = ExpertLayout(STACKED_NAMES, {key: replace(way, transposed=True) for key, way in STACKED.packed.items()})
# router weights are renormalised whatever config.json contains; transformers 5 saves experts untransposed, the hub's
# checkpoints have them transposed, and every other reader knows the latter alone
QWEN3_VL_MOE_TEXT = replace(
    QWEN3_MOE,
    model_type="qwen3_vl_moe_text",
    tensors=replace(
        QWEN3_MOE.tensors,
        names={k: v for k, v in QWEN3_MOE.tensors.names.items() if k not in MLP_EXPERTS} | STACKED_NAMES,
        packed=_TRANSPOSED.packed,
        layouts=(STACKED, _TRANSPOSED),
        served=served_below(LAYER + "mlp."),
    ),
    config=ConfigKeys(
        {
            k: v
            for k, v in QWEN3_MOE.config.defaults.items()
            if k not in ("norm_topk_prob", "use_sliding_window", "sliding_window")
        }
        | {
            "num_key_value_heads": 16,
            "max_position_embeddings": 128000,
            "rope_theta": 500000.0,
            "moe_intermediate_size": 1408,
        }
    ),
    attention=Attention(sections=True),
    experts=replace(QWEN3_MOE.experts, routing=Routing("softmax", "always")),
    elsewhere=replace(QWEN3_MOE.elsewhere, keys={"norm_topk_prob": True}),
)

_QWEN: JsonObject = {"norm_topk_prob": True, "decoder_sparse_step": 1}
_QWEN2_MOE = _QWEN | {"shared_expert_intermediate_size": 128}

VENDOR = Vendor(
    dense=(QWEN2, QWEN3),
    moe=(QWEN2_MOE, QWEN3_MOE),
    pairs=(
        Pair("llama", "qwen2_moe", note=ZERO_SHARED_128, config=_QWEN2_MOE | {"qkv_bias": False}),
        Pair("qwen2", "qwen2_moe", default=True, note=ZERO_SHARED_128, config=_QWEN2_MOE | {"qkv_bias": True}),
        Pair(
            "mimo",
            "qwen2_moe",
            default=True,
            note=f"without prediction layers; {ZERO_SHARED_128}",
            config=_QWEN2_MOE | {"qkv_bias": True},
        ),
        Pair(
            "seed_oss",
            "qwen2_moe",
            default=True,
            note=ZERO_SHARED_128,
            config=_QWEN2_MOE,
            rename={"attention_bias": "qkv_bias"},
        ),
        Pair("ministral", "qwen2_moe", default=True, note=ZERO_SHARED_128, config=_QWEN2_MOE | {"qkv_bias": False}),
        Pair("cwm", "qwen2_moe", default=True, note=ZERO_SHARED_128, config=_QWEN2_MOE | {"qkv_bias": False}),
        Pair("qwen3", "qwen3_moe", default=True, config=_QWEN),
        Pair("qwen2_vl_text", "qwen2_moe", default=True, note=ZERO_SHARED_128, config=_QWEN2_MOE | {"qkv_bias": True}),
        Pair(
            "qwen2_5_vl_text", "qwen2_moe", default=True, note=ZERO_SHARED_128, config=_QWEN2_MOE | {"qkv_bias": True}
        ),
        Pair("qwen3_vl_text", "qwen3_moe", default=True, config=_QWEN),
        Pair("qwen3_vl_text", "qwen3_vl_moe_text", default=True, config={"decoder_sparse_step": 1}),
    ),
    wrappers=(
        *(
            Wrapper(
                name, architecture, (text,), {"visual.": "vision"}, prefix="model.", flat=True, variants=_LATER_NAMES
            )
            for name, architecture, text in (
                ("qwen2_vl", "Qwen2VLForConditionalGeneration", QWEN2_VL_TEXT),
                ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", QWEN2_5_VL_TEXT),
            )
        ),
        Wrapper(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            (QWEN3_VL_TEXT,),
            {"model.visual.": "vision"},
            becomes="qwen3_vl_moe",
        ),
        Wrapper(
            "qwen3_vl_moe",
            "Qwen3VLMoeForConditionalGeneration",
            (QWEN3_VL_MOE_TEXT,),
            {"model.visual.": "vision"},
            parts={"vision_config": "qwen3_vl_moe_vision"},
            runs=frozenset({"vllm", "sglang"}),
        ),
    ),
)
