"""Microsoft: Phi-3 and Phi-3.5-MoE."""

from __future__ import annotations

from moeconv.families import folds
from moeconv.families.blocks import (
    BLOCK,
    FFN_GATE_UP,
    FUSED_FFN,
    FUSED_QKV,
    LAYER,
    NORM_BIAS,
    O_BIAS,
    QKV_BIAS,
    WITHOUT_QKVO,
    dense_row,
)
from moeconv.families.expert_blocks import EVERY_ENGINE, QKVO_BIAS, ROUTER_LOSS, SPARSE_BLOCK, ZERO_QKVO_BIAS, moe_row
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Routing, Tensors
from moeconv.families.sliding import WINDOW_KEY
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor
from moeconv.types import JsonObject

PHI3 = dense_row(
    "phi3",
    "Phi3ForCausalLM",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "sliding_window": None,
            "partial_rotary_factor": None,
        }
    ),
    tensors=Tensors(
        WITHOUT_QKVO
        | {"attention.qkv": LAYER + "self_attn.qkv_proj.weight", "attention.o": BLOCK["attention.o"]}
        | FFN_GATE_UP,
        fused=FUSED_QKV | FUSED_FFN,
    ),
    attention=Attention(partial=1.0, sliding=WINDOW_KEY),
)
PHIMOE = moe_row(
    "phimoe",
    "PhiMoEForCausalLM",  # the name on the hub, which serving engines know
    config=ConfigKeys(
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
        }
    ),
    tensors=Tensors(
        BLOCK | NORM_BIAS | QKV_BIAS | O_BIAS | SPARSE_BLOCK | {"embedding.lm_head_bias": "lm_head.bias"},
        in_memory={"block_sparse_moe.gate": "mlp.router"},
        switched={"attention_bias": QKVO_BIAS, "lm_head_bias": ("embedding.lm_head_bias",)},
        inert=ZERO_QKVO_BIAS | {"embedding.lm_head_bias": 0.0},
    ),
    attention=Attention(sliding=WINDOW_KEY, rope="mscale"),
    experts=Experts(
        # the weight of each of the two chosen experts is a softmax over the experts within the jitter; 1 without jitter
        routing=Routing("sparsemixer", "never", total=2.0, top_k=2, equal=False)
    ),
    # llama.cpp's converter requires the original context length of every model of this family
    elsewhere=Elsewhere(
        keys={"original_max_position_embeddings": "=max_position_embeddings"},
        # transformers names the class differently from the hub, vLLM and llama.cpp
        old_words={"architectures": {"PhimoeForCausalLM": "PhiMoEForCausalLM"}},
        runs=EVERY_ENGINE,
    ),
)

# llama.cpp and mlx-lm need the biases, as every published model has them
_PHIMOE: JsonObject = {
    "router_jitter_noise": 0.0, "input_jitter_noise": 0.0, "attention_bias": True, "lm_head_bias": True,
}  # fmt: skip

VENDOR = Vendor(
    dense=(PHI3,),
    moe=(PHIMOE,),
    pairs=(
        Pair(
            "stablelm",
            "phimoe",
            default=True,
            note="top-2 only; partial rotary through longrope factors",
            config=_PHIMOE,
            rename={"layer_norm_eps": "rms_norm_eps", "use_qkv_bias": "attention_bias"},
        ),
        Pair(
            "jais2",
            "phimoe",
            default=True,
            note="top-2 only; gate = up, relu",
            config=_PHIMOE,
            rename={"layer_norm_eps": "rms_norm_eps"},
            folds=(folds.squared_relu,),
        ),
        Pair(
            "nemotron",
            "phimoe",
            default=True,
            note="top-2 only; gate = up, relu; norms plus 1; partial rotary through longrope factors",
            config=_PHIMOE,
            rename={"norm_eps": "rms_norm_eps"},
            folds=(folds.squared_relu,),
        ),
    ),
)
