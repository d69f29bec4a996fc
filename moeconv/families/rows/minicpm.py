"""OpenBMB: MiniCPM3 with latent attention, and MiniCPM and MiniCPM-MoE, whose class is code in their checkpoints."""

from __future__ import annotations

from moeconv.families import folds
from moeconv.families.blocks import BLOCK, DENSE_FFN, LAYER, MLA, MLA_CONFIG, NO_BIAS, WITHOUT_QKVO, dense_row
from moeconv.families.expert_blocks import MLP_ROUTER, W_NAMES, moe_row
from moeconv.families.records import ConfigKeys, Elsewhere, Experts, Remote, Routing, Tensors
from moeconv.families.shapes import LATENT
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor

MINICPM3 = dense_row(
    "minicpm3",
    "MiniCPM3ForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | {
            "q_lora_rank": 768,
            "kv_lora_rank": 256,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64,
            "v_head_dim": None,
            "head_dim": "=qk_rope_head_dim",
            "num_key_value_heads": 40,
            "initializer_range": 0.1,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
            "mlp_bias": False,
            "pretraining_tp": 1,
        },
        neutral=NO_BIAS | {"pretraining_tp": (1, None)},
        derived={"v_head_dim": lambda get: get("hidden_size") // get("num_attention_heads")},
    ),
    tensors=Tensors(
        WITHOUT_QKVO | {k: v for k, v in MLA.items() if k != "attention.q_whole"} | DENSE_FFN, shapes=LATENT
    ),
)

# as the class of vLLM (minicpm) reads it
MINICPM_MOE = moe_row(
    "minicpm",
    "MiniCPMForCausalLM",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "scale_emb": 1.0,
            "scale_depth": 1.0,
            "dim_model_base": 1.0,
            "num_experts": 0,
            "num_experts_per_tok": 2,
        }
    ),
    tensors=Tensors(
        BLOCK
        | MLP_ROUTER
        | {f"expert.{part}": LAYER + "mlp.experts.{E}." + f"{name}.weight" for part, name in W_NAMES.items()}
    ),
    experts=Experts(count=("num_experts",), routing=Routing("softmax", "always")),
    elsewhere=Elsewhere(runs=frozenset({"vllm"})),
    remote=Remote(),
)
# the class is code in the checkpoints: Llama's block with multipliers
MINICPM_MULTIPLIERS = dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base"))  # keys whose values folds work in
MINICPM = dense_row(
    "minicpm",
    "MiniCPMForCausalLM",
    config=ConfigKeys(
        {
            "attention_bias": False,
            "tie_word_embeddings": True,
            "scale_emb": 1.0,
            "scale_depth": 1.0,
            "dim_model_base": 1.0,
            "pretraining_tp": 1,
            "num_experts": 0,
        },
        neutral=NO_BIAS | {"pretraining_tp": (1, None), "num_experts": (0, None)},
    ),
    is_dense=lambda get: not get("num_experts"),
    runs_as=Pair("minicpm", "granite", rename=MINICPM_MULTIPLIERS, folds=(folds.minicpm_as_multipliers,)),
)

VENDOR = Vendor(
    moe=(MINICPM_MOE,),
    dense=(MINICPM, MINICPM3),
)
