"""Poolside: Laguna."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.families import placement
from moeconv.families.blocks import BLOCK, DENSE_FFN, LAYER, QK_NORM
from moeconv.families.expert_blocks import MLP_EXPERTS, MLP_ROUTER, ROUTER_LOSS, SHARED_EXPERT, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Routing, Tensors
from moeconv.families.shapes import Place, Size, head_dim
from moeconv.families.vendor import Vendor


def _heads_of_layer(get: Get, place: Place) -> Any:
    each = get("num_attention_heads_per_layer")
    if not isinstance(each, list):
        return get("num_attention_heads")
    return each[place.layer] if place.layer is not None and place.layer < len(each) else None


LAGUNA_SIZES: Mapping[str, Size] = {
    "heads": _heads_of_layer,
    # one gate per head, or one per value of each head
    "gates": lambda get, place: (
        _heads_of_layer(get, place)
        if get("gating") in (None, True, "per-head")
        else _heads_of_layer(get, place) * head_dim(get)
    ),
}
LAGUNA = moe_row(
    "laguna",
    "LagunaForCausalLM",
    config=ConfigKeys(
        {
            "rope_theta": 500000.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            },
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "attention_bias": False,
            "layer_types": None,
            "mlp_layer_types": None,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "moe_routed_scaling_factor": 1.0,
            **ROUTER_LOSS,
        }
    ),
    tensors=Tensors(
        BLOCK
        | QK_NORM
        | {"attention.gate": LAYER + "self_attn.g_proj.weight"}
        | MLP_ROUTER
        | {"router.correction": LAYER + "mlp.experts.e_score_correction_bias"}
        | MLP_EXPERTS
        | SHARED_EXPERT
        | DENSE_FFN,
        in_memory={"mlp.shared_expert.": "mlp.shared_experts."},
        shapes={"attention.gate": "gates, hidden"},
        sizes=LAGUNA_SIZES,
    ),
    attention=Attention(rope="per_type", partial=1.0),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("shared_expert_intermediate_size",),
        placement=placement.WORDS_FIRST_DENSE,
        routing=Routing("sigmoid", "always", scaling="moe_routed_scaling_factor"),
    ),
    elsewhere=Elsewhere(runs=frozenset({"llama.cpp"})),
)

VENDOR = Vendor(
    moe=(LAGUNA,),
)
