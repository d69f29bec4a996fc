"""Mistral AI: Mistral, Ministral, and Mixtral."""

from __future__ import annotations

from moeconv.families import folds, sliding
from moeconv.families.blocks import BLOCK, DENSE_FFN, dense_row
from moeconv.families.expert_blocks import EVERY_ENGINE, ROUTER_LOSS, SPARSE_BLOCK, moe_row
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Routing, Tensors
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
            (MISTRAL, MINISTRAL3, MIXTRAL),
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
