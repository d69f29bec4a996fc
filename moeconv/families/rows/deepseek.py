"""DeepSeek: the 16B of 2024, V2 and V3, with latent attention, and V3.2, with sparse attention too."""

from __future__ import annotations

from moeconv.families import folds, placement
from moeconv.families.blocks import (
    ATTENTION_BIAS,
    BLOCK,
    DENSE_FFN,
    FFN_BIAS,
    INDEXER,
    INDEXER_CONFIG,
    MLA,
    MLA_CONFIG,
    MLA_LOW_RANK,
    MLA_OPTIONAL,
    WITHOUT_QKVO,
)
from moeconv.families.expert_blocks import (
    CORRECTION,
    EVERY_ENGINE,
    GROUPED,
    LOSS_OFF,
    MLP_EXPERTS,
    MLP_ROUTER,
    MTP,
    NO_AUX_LOSS,
    ONE_SHARED_EXPERT,
    SHARED_EXPERTS,
    SIGMOID,
    ZERO_SHARED_FULL,
    moe_row,
)
from moeconv.families.records import WHOLE, ConfigKeys, Elsewhere, Experts, Remote, Routing, Tensors
from moeconv.families.shapes import LATENT
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor

DEEPSEEK_V2 = moe_row(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | {
            "moe_intermediate_size": 1407,
            "first_k_dense_replace": 0,
            "n_shared_experts": 2,
            "n_group": None,
            "topk_group": None,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "mlp_bias": False,
            **LOSS_OFF,
        },
        kinds={"n_group": WHOLE, "topk_group": WHOLE},
    ),
    tensors=Tensors(
        WITHOUT_QKVO | MLA | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN | FFN_BIAS,
        optional=MLA_OPTIONAL,
        shapes=LATENT,
    ),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.FIRST_K,
        routing=Routing(
            "softmax",
            "never",
            scaling="routed_scaling_factor",
            groups=("n_group", "topk_group"),
            float32=True,
            grouped_by=("topk_method", "group_limited_greedy"),
            best_of_group=1,
        ),
    ),
    elsewhere=Elsewhere(keys={"scoring_func": "softmax", "moe_layer_freq": 1}, runs=EVERY_ENGINE),
)
DEEPSEEK_V3 = moe_row(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    config=ConfigKeys(
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
        }
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
        placement=placement.FIRST_K,
        routing=GROUPED,
    ),
    prediction=MTP,
    elsewhere=Elsewhere(keys=NO_AUX_LOSS | {"moe_layer_freq": 1}, runs=EVERY_ENGINE),
)

DEEPSEEK_V32 = moe_row(
    "deepseek_v32",
    "DeepseekV32ForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | INDEXER_CONFIG
        | {
            "num_key_value_heads": 128,
            "max_position_embeddings": 163840,
            "moe_intermediate_size": 2048,
            "mlp_layer_types": None,
            "first_k_dense_replace": 3,
            "layer_types": None,
            "num_nextn_predict_layers": None,
            "mlp_bias": False,
            **SIGMOID,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
        }
    ),
    tensors=Tensors(
        WITHOUT_QKVO | MLA_LOW_RANK | INDEXER | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
        float32=frozenset({"router.correction"}),
        shapes=LATENT,
    ),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.WORDS_OR_FIRST_K,
        routing=GROUPED,
    ),
    prediction=MTP,
    elsewhere=Elsewhere(keys=NO_AUX_LOSS | {"moe_layer_freq": 1}, runs=EVERY_ENGINE),
)
# the 16B of 2024: plain attention, and a class that is code in its checkpoints
DEEPSEEK = moe_row(
    "deepseek",
    "DeepseekForCausalLM",
    config=ConfigKeys(
        {
            "attention_bias": False,
            "moe_intermediate_size": 1407,
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            "n_shared_experts": None,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
        },
        only={
            "moe_layer_freq": ((1,), "only some of the later layers would have experts"),
            "scoring_func": (("softmax",), "the router would weigh the experts in another way"),
        },
    ),
    tensors=Tensors(
        BLOCK | ATTENTION_BIAS | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
        optional=frozenset(SHARED_EXPERTS),
        switched={"n_shared_experts": tuple(SHARED_EXPERTS)},
    ),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.FIRST_K,
        routing=Routing("softmax", "norm_topk_prob", float32=True),
    ),
    elsewhere=Elsewhere(runs=EVERY_ENGINE),
    remote=Remote(),
)

_MINICPM = dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base", "head_dim"))

VENDOR = Vendor(
    moe=(DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32),
    pairs=(
        Pair(
            "youtu",
            "deepseek_v3",
            default=True,
            note=ZERO_SHARED_FULL,
            config=ONE_SHARED_EXPERT | {"num_nextn_predict_layers": 0},
            rename={"head_dim": None},
        ),
        Pair(
            "minicpm3",
            "deepseek_v3",
            default=True,
            note=f"multipliers folded into weights, rotary order; {ZERO_SHARED_FULL}",
            config=ONE_SHARED_EXPERT | {"num_nextn_predict_layers": 0},
            rename=_MINICPM,
            folds=(folds.minicpm_multipliers, folds.pairs_to_interleaved_mla),
        ),
    ),
)
