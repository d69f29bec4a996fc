"""Tencent: HY V3, and HY V4 with several residual streams and attention to chosen tokens."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families import placement
from moeconv.families.blocks import (
    BLOCK,
    DENSE_FFN,
    FFN_BIAS,
    INDEXER,
    INDEXER_CONFIG,
    LAYER,
    MLA_CONFIG,
    MLA_LOW_RANK,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    WITHOUT_QKVO,
)
from moeconv.families.expert_blocks import (
    CORRECTION,
    GATE_UP_PACKED,
    GROUPED,
    MLP_EXPERTS,
    MLP_ROUTER,
    SHARED_EXPERTS,
    SHARED_MLP,
    SIGMOID,
    STACKED_NAMES,
    ZERO_SHARED_FULL,
    leading_dense,
    moe_row,
)
from moeconv.families.indexers import checked_types
from moeconv.families.placement import Get
from moeconv.families.records import (
    LIST,
    Attention,
    ConfigKeys,
    Elsewhere,
    Experts,
    Layers,
    Prediction,
    Routing,
    Tensors,
)
from moeconv.families.shapes import LATENT, config_key
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.types import JsonObject

HY_V3 = moe_row(
    "hy_v3",
    "HYV3ForCausalLM",
    config=ConfigKeys(
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
        }
    ),
    tensors=Tensors(
        BLOCK
        | QK_NORM
        | QKV_BIAS
        | O_BIAS
        | {"router.weight": LAYER + "mlp.router.gate.weight", "router.correction": LAYER + "mlp.expert_bias"}
        | MLP_EXPERTS
        | SHARED_MLP
        | DENSE_FFN
        | FFN_BIAS,
        float32=frozenset({"router.correction"}),
        in_memory={"mlp.shared_mlp.": "mlp.shared_experts."},
    ),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "num_shared_experts"),
        placement=placement.WORDS_FIRST_DENSE,
        routing=Routing("sigmoid", "always", scaling="router_scaling_factor", float32=True),
    ),
    elsewhere=Elsewhere(
        keys={
            "first_k_dense_replace": leading_dense,
            "expert_hidden_dim": "=moe_intermediate_size",
            "route_norm": True,
            "qk_norm": True,
        },
        runs=frozenset({"vllm", "llama.cpp"}),
    ),
)

_HY_V3: JsonObject = {"router_scaling_factor": 1.0, "num_shared_experts": 1, "enable_moe_fp32_combine": True}

# layers that run their own indexer, and layers that read the tokens which the last such layer chose
_OWN, _SHARED = "indexed_attention", "shared_indexed_attention"


def _kinds(get: Get, layers: int) -> list[str]:
    """Without a list, the first layer and every fourth one from the second on choose tokens."""
    words = get("indexer_types")
    if words is None:
        words = ["full" if i == 0 or (i - 1) % 4 == 0 else "shared" for i in range(layers)]
    return [_SHARED if word == "shared" else _OWN for word in checked_types(words, layers, "indexer_types")]


_MIXERS = {"attention": "hc_attn_layer.", "ffn": "hc_mlp_layer."}
_STREAMS = {
    f"streams.{block}_{part}": f"{LAYER}{mixer}hc_pre.hc_{part}"
    for block, mixer in _MIXERS.items()
    for part in ("fn", "base", "scale")
} | {f"streams.final_{part}": f"model.hc_head.hc_head_{part}" for part in ("fn", "base", "scale")}
_STREAM_SHAPES = {
    **{f"streams.{block}_fn": "2*streams, streams*hidden" for block in _MIXERS},
    **{f"streams.{block}_base": "2*streams" for block in _MIXERS},
    **{f"streams.{block}_scale": "2" for block in _MIXERS},
    "streams.final_fn": "streams, streams*hidden", "streams.final_base": "streams", "streams.final_scale": "1",
}  # fmt: skip
# as save_pretrained writes them: it inverts rules that several of the published names match
_SAVED = {
    **{f"{LAYER}hc_pre.{mixer}": f"{LAYER}{mixer}hc_pre." for mixer in _MIXERS.values()},
    "model.hc_pre.hc_head.": "model.hc_head.", "model.hc_head.hc_pre.": "model.hc_head.",
    **{f"{LAYER}mlp.{shared}linear_gate.": f"{LAYER}mlp.{shared}gate_proj." for shared in ("", "shared_experts.")},
}  # fmt: skip
HY_V4 = moe_row(
    "hy_v4",
    "HYV4ForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | INDEXER_CONFIG
        | SIGMOID
        | {
            "max_position_embeddings": 262144,
            "initializer_range": 0.006,
            "rms_norm_eps": 1e-5,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "moe_intermediate_size": 768,
            "mlp_layer_types": None,
            "layer_types": None,
            "num_nextn_predict_layers": None,
            "routed_scaling_factor": 2.827,
            "index_n_heads": 16,
            "indexer_types": None,
            "hc_mult": 4,
            "hc_magnitude": 2.0,
            "hc_eps": 1e-6,
            "learnable_sink_init": 0.0,
            "swiglu_limit": 10.0,
        },
        kinds={"indexer_types": LIST},
    ),
    tensors=Tensors(
        WITHOUT_QKVO
        | MLA_LOW_RANK
        | {
            "attention.gate": LAYER + "self_attn.linear_gate.weight",
            "attention.sinks": LAYER + "self_attn.learnable_sink_param",
        }
        | INDEXER
        | _STREAMS
        | MLP_ROUTER
        | CORRECTION
        | STACKED_NAMES
        | SHARED_EXPERTS
        | DENSE_FFN,
        packed=GATE_UP_PACKED,
        variants=_SAVED,
        in_memory={"self_attn.linear_gate": "self_attn.gate_proj"},
        float32=frozenset({"attention.sinks", "router.correction", *_STREAMS}),
        shapes=LATENT | _STREAM_SHAPES | {"attention.gate": "heads*v_latent, hidden"},
        sizes={"streams": config_key("hc_mult")},
    ),
    layers=Layers(
        kinds=_kinds,
        where={"indexer": frozenset({_OWN})},
        passed_on=("prev_topk_indices", frozenset({_SHARED})),
        streams="hc_mult",
        streams_apart=True,
        mixer="streams.ffn_fn",
    ),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.WORDS_FIRST_DENSE,
        routing=GROUPED,
    ),
    prediction=Prediction(
        {
            "mtp.norm_embedding": LAYER + "enorm.weight",
            "mtp.norm_hidden": LAYER + "hnorm.weight",
            "mtp.project": LAYER + "eh_proj.weight",
            "mtp.norm": LAYER + "final_layernorm.weight",
        },
        prefix="model.mtp_",
        otherwise="a prediction layer has one residual stream, and the layers of the model have several",
    ),
)
HY_V4_VL_TEXT = replace(
    HY_V4,
    model_type="hy_v4_vl_text",
    architecture="HYV4VLForConditionalGeneration",
    config=replace(
        HY_V4.config,
        defaults={
            **HY_V4.config.defaults,
            "q_lora_rank": 2048,
            "moe_intermediate_size": 2048,
            "index_n_heads": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]},
        },
    ),
    attention=Attention(sections=True),
)

VENDOR = Vendor(
    moe=(HY_V3, HY_V4),
    pairs=(Pair("qwen3", "hy_v3", note=ZERO_SHARED_FULL, config=_HY_V3),),
    wrappers=(
        Wrapper(
            "hy_v4_vl",
            "HYV4VLForConditionalGeneration",
            (HY_V4_VL_TEXT,),
            {"vit.": "vision"},
            prefix="model.",
            variants=_SAVED,
            in_memory={
                "^model.": "model.language_model.",
                "^vit.": "model.vision_tower.",
                "mlp.dense_h_to_4h": "mlp.fc1",
                "mlp.dense_4h_to_h": "mlp.fc2",
                "vision_tower.perceive.proj.0": "vision_tower.patch_merger.proj_conv",
                "vision_tower.perceive.proj.2": "vision_tower.patch_merger.proj_out",
            },
        ),
    ),
)
