"""MiniMax: M2."""

from __future__ import annotations

from moeconv.families.blocks import BLOCK, LAYER, QK_NORM
from moeconv.families.expert_blocks import ROUTER_LOSS, SPARSE_BLOCK, moe_row
from moeconv.families.shapes import WHOLE_ROW_NORMS
from moeconv.families.spec import Routing
from moeconv.families.vendor import Vendor

MINIMAX_M2 = moe_row(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "rope_theta": 5e6,
        "router_jitter_noise": 0.0,
        **ROUTER_LOSS,
    },
    BLOCK | QK_NORM | SPARSE_BLOCK | {"router.correction": LAYER + "block_sparse_moe.e_score_correction_bias"},
    num_experts=("num_local_experts",),
    routing=Routing("sigmoid", "always"),
    shapes=WHOLE_ROW_NORMS,
)

VENDOR = Vendor(
    moe=(MINIMAX_M2,),
)
