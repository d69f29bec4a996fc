"""Databricks: DBRX."""

from __future__ import annotations

from moeconv.families import folds
from moeconv.families.blocks import BASE_CONFIG, FUSED_QKV
from moeconv.families.expert_blocks import EVERY_ENGINE, moe_row
from moeconv.families.records import ConfigKeys, Elsewhere, Experts, Packed, Routing, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor

_DBRX = "transformer.blocks.{L}."
DBRX = moe_row(
    "dbrx",
    "DbrxForCausalLM",
    config=ConfigKeys(
        {
            "clip_qkv": None,
            "num_key_value_heads": 1,
            "moe_normalize_expert_weights": 1.0,
            "moe_jitter_eps": None,
            "output_router_logits": False,
        },
        words={
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
            "max_position_embeddings": "max_seq_len",
            "num_key_value_heads": "attn_config.kv_n_heads",
            "clip_qkv": "attn_config.clip_qkv",
            "attention_dropout": "attn_config.attn_pdrop",
            "rope_theta": "attn_config.rope_theta",
            "intermediate_size": "ffn_config.ffn_hidden_size",
            "hidden_act": "ffn_config.ffn_act_fn.name",
            "moe_num_experts": "ffn_config.moe_num_experts",
            "moe_top_k": "ffn_config.moe_top_k",
            "moe_normalize_expert_weights": "ffn_config.moe_normalize_expert_weights",
            "moe_jitter_eps": "ffn_config.moe_jitter_eps",
        },
    ),
    tensors=Tensors(
        {
            "embedding.tokens": "transformer.wte.weight",
            "embedding.lm_head": "lm_head.weight",
            "norm.final": "transformer.norm_f.weight",
            "norm.attention": _DBRX + "norm_attn_norm.norm_1.weight",
            "norm.ffn": _DBRX + "norm_attn_norm.norm_2.weight",
            "attention.qkv": _DBRX + "norm_attn_norm.attn.Wqkv.weight",
            "attention.o": _DBRX + "norm_attn_norm.attn.out_proj.weight",
            "router.weight": _DBRX + "ffn.router.layer.weight",
            **{
                f"expert.{p}": _DBRX + f"ffn.experts.mlp.{w}" for p, w in (("gate", "w1"), ("up", "v1"), ("down", "w2"))
            },
        },
        fused=FUSED_QKV,
        packed={
            "expert.gate": Packed(("gate",), flat=True),
            "expert.up": Packed(("up",), flat=True),
            "expert.down": Packed(("down",), transposed=True, flat=True),
        },
        base_prefix="transformer.",
    ),
    experts=Experts(
        implementation="eager",
        count=("moe_num_experts",),
        top_k=("moe_top_k",),
        routing=Routing("softmax", "moe_normalize_expert_weights"),
        modules_above=1,
    ),
    base={key: value for key, value in BASE_CONFIG.items() if key != "rms_norm_eps"},
    elsewhere=Elsewhere(
        nested={
            "attn_config": frozenset({"model_type", "attn_pdrop", "clip_qkv", "kv_n_heads", "rope_theta"}),
            "ffn_config": frozenset(
                {
                    "model_type",
                    "ffn_act_fn",
                    "ffn_hidden_size",
                    "moe_num_experts",
                    "moe_top_k",
                    "moe_jitter_eps",
                    "moe_loss_weight",
                    "moe_normalize_expert_weights",
                }
            ),
        },
        runs=EVERY_ENGINE,
    ),
)

VENDOR = Vendor(
    moe=(DBRX,),
    pairs=(
        Pair(
            "olmo",
            "dbrx",
            note="with clip_qkv; the head is untied",
            config={"moe_normalize_expert_weights": 1.0, "moe_jitter_eps": None},
            rename={"rms_norm_eps": None},
            folds=(folds.untied_head, folds.unit_norms, folds.dbrx_words),
        ),
    ),
)
