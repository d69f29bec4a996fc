"""Mistral AI: Mistral, Ministral, Mixtral, and Mistral 4."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families import folds, placement, sliding
from moeconv.families.blocks import BLOCK, DENSE_FFN, MLA, MLA_CONFIG, MLA_OPTIONAL, WITHOUT_QKVO, dense_row
from moeconv.families.expert_blocks import (
    EVERY_ENGINE,
    GATE_UP_PACKED,
    GROUPED,
    MLP_ROUTER,
    ROUTER_LOSS,
    SHARED_EXPERTS,
    SIGMOID,
    SPARSE_BLOCK,
    STACKED_NAMES,
    moe_row,
)
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Routing, Tensors
from moeconv.families.rows.baichuan import BAICHUAN_OWN
from moeconv.families.rows.minicpm import MINICPM_MULTIPLIERS
from moeconv.families.shapes import LATENT
from moeconv.families.sliding import WINDOW_KEY
from moeconv.families.spec import Pair
from moeconv.families.vendor import LLAVA_NAMES, TOWER_AND_PROJECTOR, Vendor, Wrapper

MISTRAL = dense_row(
    "mistral",
    "MistralForCausalLM",
    config=ConfigKeys(
        {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "sliding_window": 4096}
    ),
    tensors=Tensors(BLOCK | DENSE_FFN),
    attention=Attention(sliding=WINDOW_KEY),
)
MINISTRAL = dense_row(
    "ministral",
    "MinistralForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "layer_types": None,
        }
    ),
    attention=Attention(sliding=sliding.ALL_LAYERS),
)
MINISTRAL3 = dense_row(
    "ministral3",
    "Ministral3ForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262144,
            "rope_theta": 1e6,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        }
    ),
    attention=Attention(sliding=WINDOW_KEY),
)
MISTRAL4 = moe_row(
    "mistral4",
    "Mistral4ForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | {
            "num_key_value_heads": 32,
            "max_position_embeddings": 1048576,
            "q_lora_rank": 1024,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "rope_interleave": True,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 0,
            **SIGMOID,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 128.0,
                "original_max_position_embeddings": 8192,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
                "partial_rotary_factor": 0.5,
            },
        }
    ),
    tensors=Tensors(
        WITHOUT_QKVO | MLA | MLP_ROUTER | STACKED_NAMES | SHARED_EXPERTS | DENSE_FFN,
        optional=MLA_OPTIONAL,
        packed=GATE_UP_PACKED,
        shapes=LATENT,
    ),
    attention=Attention(partial=0.5),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.FIRST_K,
        routing=replace(GROUPED, score="softmax", float32=False),
    ),
)
MIXTRAL = moe_row(
    "mixtral",
    "MixtralForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "router_jitter_noise": 0.0,
        }
        | ROUTER_LOSS
    ),
    tensors=Tensors(BLOCK | SPARSE_BLOCK),
    attention=Attention(sliding=WINDOW_KEY),
    experts=Experts(routing=Routing("softmax", "always")),
    elsewhere=Elsewhere(runs=EVERY_ENGINE),
)

_MULTIPLIERS = dict.fromkeys(
    ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
)  # config keys whose values granite_multipliers folds into the weights

VENDOR = Vendor(
    dense=(MISTRAL, MINISTRAL, MINISTRAL3),
    wrappers=(
        Wrapper(
            "mistral3",
            "Mistral3ForConditionalGeneration",
            (MISTRAL, MINISTRAL3, MISTRAL4, MIXTRAL),
            TOWER_AND_PROJECTOR,
            becomes="mistral3",
            tied=True,
            **LLAVA_NAMES,
        ),
    ),
    moe=(MIXTRAL,),
    pairs=(
        Pair("llama", "mixtral", default=True),
        Pair("mistral", "mixtral", default=True),
        Pair("phi3", "mixtral", default=True, note="fused tensors are split; partial rotary through longrope factors"),
        Pair(
            "gemma",
            "mixtral",
            default=True,
            note="norms plus 1, embeddings times sqrt(hidden_size)",
            rename={"hidden_activation": None},
            folds=(folds.embedding_root, folds.legacy_gelu),
        ),
        Pair("helium", "mixtral", default=True, note="rotary order"),
        Pair(
            "arcee",
            "mixtral",
            default=True,
            note="gate = up, relu: relu(x)^2 = relu(x) * x",
            folds=(folds.squared_relu,),
        ),
        Pair(
            "ministral3",
            "mixtral",
            default=True,
            note="up to original_max_position_embeddings",
            folds=(folds.below_long_context,),
        ),
        Pair("internlm3", "mixtral", default=True),
        Pair("internlm2", "mixtral", default=True, note="fused tensors are split"),
        Pair("exaone", "mixtral", default=True),
        Pair(
            "baichuan",
            "mixtral",
            default=True,
            note="fused tensors are split; the output head of Baichuan 2 with rows of length 1",
            rename=BAICHUAN_OWN,
            folds=(folds.unit_head,),
        ),
        Pair(
            "minicpm",
            "mixtral",
            note="multipliers folded into weights",
            rename=MINICPM_MULTIPLIERS,
            folds=(folds.minicpm_multipliers,),
        ),
        Pair("iquestcoder", "mixtral", default=True),
        Pair("glm", "mixtral", note="without biases; rotary order, partial rotary through longrope factors"),
        Pair("ernie4_5", "mixtral", note="rotary order"),
        Pair(
            "granite",
            "mixtral",
            note="multipliers folded into weights",
            rename=_MULTIPLIERS,
            folds=(folds.granite_multipliers,),
        ),
        Pair(
            "olmo",
            "mixtral",
            default=True,
            note="LayerNorm as RMSNorm of a centred residual stream; the head is untied",
            folds=(folds.centred_residual,),
        ),
    ),
)
