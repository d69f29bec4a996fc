"""OpenAI: gpt-oss."""

from __future__ import annotations

from moeconv.families import folds, sliding
from moeconv.families.blocks import BLOCK, LAYER, O_BIAS, QKV_BIAS, SINKS
from moeconv.families.expert_blocks import EVERY_ENGINE, QKVO_BIAS, ROUTER_LOSS, ZERO_QKVO_BIAS, moe_row
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Packed, Routing, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor
from moeconv.types import JsonObject

GPT_OSS = moe_row(
    "gpt_oss",
    "GptOssForCausalLM",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_theta": 150000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": None,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            **ROUTER_LOSS,
        }
    ),
    tensors=Tensors(
        BLOCK
        | SINKS
        | QKV_BIAS
        | O_BIAS
        | {
            "router.weight": LAYER + "mlp.router.weight",
            "router.bias": LAYER + "mlp.router.bias",
            "expert.gate_up": LAYER + "mlp.experts.gate_up_proj",
            "expert.gate_up_bias": LAYER + "mlp.experts.gate_up_proj_bias",
            "expert.down": LAYER + "mlp.experts.down_proj",
            "expert.down_bias": LAYER + "mlp.experts.down_proj_bias",
        },
        packed={
            "expert.gate_up": Packed(("gate", "up"), interleaved=True, transposed=True),
            "expert.gate_up_bias": Packed(("gate_bias", "up_bias"), interleaved=True),
            "expert.down": Packed(("down",), transposed=True),
            "expert.down_bias": Packed(("down_bias",)),
        },
        unserved="vLLM 0.32 reads codes of its experts in MXFP4, and others only under names of its own modules "
        "(experts.N.w13_weight_packed); it silently skips tensors with any other name",
        switched={"attention_bias": QKVO_BIAS},
        inert={"attention.sinks": -1e30, **ZERO_QKVO_BIAS},
    ),
    attention=Attention(sliding=sliding.EVERY_SECOND),
    experts=Experts(count=("num_local_experts",), routing=Routing("softmax_topk", "always")),
    elsewhere=Elsewhere(fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0}, runs=EVERY_ENGINE),
)

_GPT_OSS: JsonObject = {"swiglu_alpha": 1.0, "swiglu_limit": 1e30}

VENDOR = Vendor(
    moe=(GPT_OSS,),
    pairs=(
        Pair(
            "llama",
            "gpt_oss",
            note="the only family with expert biases; attention sinks off",
            config=_GPT_OSS,
            rename={"mlp_bias": None},
            folds=(folds.expert_biases,),
        ),
        Pair(
            "qwen2",
            "gpt_oss",
            note="attention sinks off",
            config=_GPT_OSS | {"attention_bias": True},
            folds=(folds.expert_biases,),
        ),
    ),
)
