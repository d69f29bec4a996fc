"""MiniMax: M2."""

from __future__ import annotations

from moeconv.families.blocks import BLOCK, LAYER, QK_NORM
from moeconv.families.expert_blocks import ROUTER_LOSS, SPARSE_BLOCK, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import ConfigKeys, Elsewhere, Experts, Routing, Tensors
from moeconv.families.shapes import WHOLE_ROW_NORMS
from moeconv.families.vendor import Vendor


def _rotary_dim(get: Get) -> int:
    params = get("rope_parameters") or {}
    return int(get("head_dim") * (params.get("partial_rotary_factor") or get("partial_rotary_factor") or 1.0))


MINIMAX_M2 = moe_row(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 196608,
            "rope_theta": 5e6,
            "router_jitter_noise": 0.0,
            **ROUTER_LOSS,
        }
    ),
    tensors=Tensors(
        BLOCK | QK_NORM | SPARSE_BLOCK | {"router.correction": LAYER + "block_sparse_moe.e_score_correction_bias"},
        shapes=WHOLE_ROW_NORMS,
    ),
    experts=Experts(count=("num_local_experts",), routing=Routing("sigmoid", "always")),
    elsewhere=Elsewhere(
        keys={
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "rotary_dim": _rotary_dim,
        },
        runs=frozenset({"vllm", "llama.cpp"}),
    ),
)

VENDOR = Vendor(
    moe=(MINIMAX_M2,),
)
