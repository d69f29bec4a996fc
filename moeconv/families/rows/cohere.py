"""Cohere: Command R and its successors."""

from __future__ import annotations

from moeconv.families import folds, placement, sliding
from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, NO_BIAS, O_BIAS, QK_NORM, QKV_BIAS, dense_row
from moeconv.families.expert_blocks import EVERY_ENGINE, MLP_EXPERTS, MLP_ROUTER, SHARED_EXPERTS, moe_row
from moeconv.families.records import WHOLE, Attention, ConfigKeys, Elsewhere, Experts, Layers, Routing, Tensors
from moeconv.families.shapes import NORM_OF_EACH_HEAD
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor
from moeconv.types import JsonObject

_COHERE_CONFIG: JsonObject = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
PARALLEL_BLOCK = {k: v for k, v in BLOCK.items() if k != "norm.ffn"}
COHERE = dense_row(
    "cohere",
    "CohereForCausalLM",
    config=ConfigKeys(
        _COHERE_CONFIG | {"rope_theta": 500000.0, "use_qk_norm": False}, neutral=NO_BIAS | {"use_qk_norm": (False,)}
    ),
    tensors=Tensors(
        PARALLEL_BLOCK | ATTENTION_BIAS | QK_NORM | DENSE_FFN, optional=frozenset(QK_NORM), shapes=NORM_OF_EACH_HEAD
    ),
    attention=Attention(rotary="interleaved"),
)
COHERE2 = dense_row(
    "cohere2",
    "Cohere2ForCausalLM",
    config=ConfigKeys(
        _COHERE_CONFIG
        | {"sliding_window": 4096, "layer_types": None, "sliding_window_pattern": None, "head_dim": None},
        neutral={"sliding_window_pattern": (4, None)},
    ),
    tensors=Tensors(PARALLEL_BLOCK | ATTENTION_BIAS | DENSE_FFN),
    attention=Attention(sliding=sliding.ALL_BUT_LAST_OF_FOUR, rotary="interleaved"),
)
COHERE2_MOE = moe_row(
    "cohere2_moe",
    "Cohere2MoeForCausalLM",
    config=ConfigKeys(
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
        kinds={"prefix_dense_intermediate_size": WHOLE},
    ),
    tensors=Tensors(
        PARALLEL_BLOCK | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
        optional=frozenset(SHARED_EXPERTS),
    ),
    attention=Attention(sliding=sliding.ALL_BUT_LAST_OF_FOUR, rotary="interleaved"),
    layers=Layers(ffn_width=lambda get: get("prefix_dense_intermediate_size") or get("intermediate_size")),
    experts=Experts(
        count=("num_experts",),
        dense_width="prefix_dense_intermediate_size",
        shared_width=("intermediate_size", "num_shared_experts"),
        averaged=("shared_expert_combination_strategy", "average"),
        placement=placement.WORDS,
        routing=Routing("softmax_topk", "always"),
        rules=("expert_selection_fn", {"sigmoid": Routing("sigmoid", "norm_topk_prob")}),
    ),
    elsewhere=Elsewhere(runs=EVERY_ENGINE),
)

_COHERE: JsonObject = {
    "expert_selection_fn": "softmax", "num_shared_experts": 0, "shared_expert_combination_strategy": "sum",
    "norm_topk_prob": True, "prefix_dense_intermediate_size": None,
    "prefix_dense_sliding_window_pattern": 4,  # 1 would make dense layers rotate whatever their kind
}  # fmt: skip

VENDOR = Vendor(
    dense=(COHERE, COHERE2),
    moe=(COHERE2_MOE,),
    pairs=(
        Pair("cohere2", "cohere2_moe", default=True, config=_COHERE),
        Pair(
            "cohere",
            "cohere2_moe",
            default=True,
            note="every layer slides, with a window as long as the context",
            config=_COHERE,
            folds=(folds.all_layers_slide,),
        ),
    ),
)
