"""LG AI Research: EXAONE."""

from __future__ import annotations

from moeconv.families import placement, sliding
from moeconv.families.blocks import BLOCK, DENSE_FFN, LAYER, NO_BIAS, QK_NORM, dense_row
from moeconv.families.expert_blocks import (
    EVERY_ENGINE,
    GROUPED,
    LOSS_OFF,
    MLP_EXPERTS,
    MLP_ROUTER,
    NO_AUX_LOSS,
    QWEN_MTP,
    SHARED_EXPERTS,
    moe_row,
)
from moeconv.families.placement import Get
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor


def _is_moe_layer(get: Get) -> list[bool]:
    moe = placement.WORDS_OR_FIRST_K.read(get, get("num_hidden_layers"))
    return [layer in moe for layer in range(get("num_hidden_layers"))]


_H = "transformer.h.{L}."
# Llama's block with the names of GPT-2. Its config class is new in transformers 5.24, and code in older checkpoints
EXAONE = dense_row(
    "exaone",
    "ExaoneForCausalLM",
    config=ConfigKeys(
        {
            "head_dim": None,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "rope_theta": 500000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "embed_dropout": 0.0,
        },
        neutral=NO_BIAS | {"embed_dropout": (0.0, 0)},
        words={"num_hidden_layers": "num_layers", "hidden_act": "activation_function",
               "rms_norm_eps": "layer_norm_epsilon"},
    ),
    tensors=Tensors(
        {
            "embedding.tokens": "transformer.wte.weight",
            "embedding.lm_head": "lm_head.weight",
            "norm.final": "transformer.ln_f.weight",
            "norm.attention": _H + "ln_1.weight",
            "norm.ffn": _H + "ln_2.weight",
            "attention.o": _H + "attn.attention.out_proj.weight",
            "ffn.gate": _H + "mlp.c_fc_0.weight",
            "ffn.up": _H + "mlp.c_fc_1.weight",
            "ffn.down": _H + "mlp.c_proj.weight",
        }
        | {f"attention.{part}": _H + f"attn.attention.{part}_proj.weight" for part in "qkv"},
        prefix="transformer.",
        base_prefix="",
        dropped=(_H + "attn.attention.rotary.inv_freq",),
    ),
    runs_as=Pair("exaone", "llama"),
)  # fmt: skip
EXAONE_MOE = moe_row(
    "exaone_moe",
    "ExaoneMoeForCausalLM",
    config=ConfigKeys(
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
            **LOSS_OFF,
        }
    ),
    tensors=Tensors(
        BLOCK
        | QK_NORM
        | MLP_ROUTER
        | {"router.correction": LAYER + "mlp.e_score_correction_bias"}
        | MLP_EXPERTS
        | SHARED_EXPERTS
        | DENSE_FFN,
        float32=frozenset({"router.correction"}),
    ),
    attention=Attention(sliding=sliding.ALL_BUT_LAST_OF_FOUR),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "num_shared_experts"),
        placement=placement.WORDS_OR_FIRST_K,
        routing=GROUPED,
    ),
    prediction=QWEN_MTP,
    elsewhere=Elsewhere(keys=NO_AUX_LOSS | {"is_moe_layer": _is_moe_layer}, runs=EVERY_ENGINE),
)

VENDOR = Vendor(
    dense=(EXAONE,),
    moe=(EXAONE_MOE,),
)
