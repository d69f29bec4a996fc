"""SK Telecom: A.X K1 and A.X K2, with latent attention."""

from __future__ import annotations

from moeconv.families import placement
from moeconv.families.blocks import (
    DENSE_FFN,
    INDEXER,
    INDEXER_CONFIG,
    LAYER,
    MLA_CONFIG,
    MLA_LOW_RANK,
    WITHOUT_QKVO,
)
from moeconv.families.expert_blocks import (
    CORRECTION,
    GROUPED,
    MLP_EXPERTS,
    MLP_ROUTER,
    NO_AUX_LOSS,
    SHARED_EXPERTS,
    SIGMOID,
    leading_dense,
    moe_row,
)
from moeconv.families.records import WHOLE, ConfigKeys, Elsewhere, Experts, Tensors
from moeconv.families.shapes import LATENT, config_key
from moeconv.families.vendor import Vendor

_EXPERTS = MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN
_ELSEWHERE = Elsewhere(keys=NO_AUX_LOSS | {"moe_layer_freq": 1, "first_k_dense_replace": leading_dense})


def _gate(norm: str, name: str) -> dict[str, str]:
    """The small MLP that gates the output of a norm."""
    return {f"norm.{norm}_{part}": f"{LAYER}{name}.W_{part}.weight" for part in ("down", "up")}


AXK1 = moe_row(
    "axk1",
    "AXK1ForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | {
            "num_key_value_heads": 64,
            "max_position_embeddings": 32768,
            "rope_interleave": True,
            "moe_intermediate_size": 2048,
            "mlp_layer_types": None,
            "first_k_dense_replace": 1,
            **SIGMOID,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
        },
        only={"moe_layer_freq": ((1, None), "which layers have experts is then another rule")},
    ),
    tensors=Tensors(
        WITHOUT_QKVO | MLA_LOW_RANK | _EXPERTS | {"norm.post_ffn": LAYER + "post_mlp_layernorm.weight"},
        float32=frozenset({"router.correction"}),
        shapes=LATENT,
    ),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        only={"norm.post_ffn": True},
        normed=True,
        placement=placement.WORDS_OR_FIRST_K,
        routing=GROUPED,
    ),
    elsewhere=_ELSEWHERE,
)
AXK2 = moe_row(
    "axk2",
    "AXK2ForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | INDEXER_CONFIG
        | {
            "num_key_value_heads": 32,
            "max_position_embeddings": 131072,
            "q_lora_rank": 384,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "moe_intermediate_size": 512,
            "mlp_layer_types": None,
            "first_k_dense_replace": 1,
            "layer_types": None,
            "index_n_heads": 16,
            "gated_norm_rank": 16,
            **SIGMOID,
            "n_group": None,
            "topk_group": None,
            "routed_scaling_factor": 2.5,
        },
        kinds={"n_group": WHOLE, "topk_group": WHOLE},
        only={"moe_layer_freq": ((1, None), "which layers have experts is then another rule")},
    ),
    tensors=Tensors(
        WITHOUT_QKVO
        | MLA_LOW_RANK
        | INDEXER
        | _EXPERTS
        | {
            "norm.attention": LAYER + "input_layernorm.norm.weight",
            "norm.ffn": LAYER + "post_attention_layernorm.norm.weight",
            "norm.dense_ffn": LAYER + "post_attention_layernorm.weight",
        }
        | _gate("attention", "input_layernorm")
        | _gate("ffn", "post_attention_layernorm"),
        in_memory={"W_down": "mlp.fc1", "W_up": "mlp.fc2", "self_attn.q_b_proj": "self_attn.q_gate_proj"},
        float32=frozenset({"router.correction"}),
        # the query and the gate of the attention's output, from the compressed query before and after its norm
        shapes=LATENT
        | {"attention.q_b": "heads*nope + heads*rope + heads*v_latent, 2*q_rank", "norm.dense_ffn": "hidden"}
        | {f"norm.{norm}_down": "gate_rank, hidden" for norm in ("attention", "ffn")}
        | {f"norm.{norm}_up": "hidden, gate_rank" for norm in ("attention", "ffn")},
        sizes={"gate_rank": config_key("gated_norm_rank")},
    ),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        only={"norm.ffn": True, "norm.ffn_down": True, "norm.ffn_up": True, "norm.dense_ffn": False},
        placement=placement.WORDS_OR_FIRST_K,
        routing=GROUPED,
    ),
    elsewhere=_ELSEWHERE,
)

VENDOR = Vendor(moe=(AXK1, AXK2))
