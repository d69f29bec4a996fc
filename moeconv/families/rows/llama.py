"""Meta: Llama, CWM, and Llama 4."""

from __future__ import annotations

from moeconv.families import placement, sliding
from moeconv.families.blocks import (
    BLOCK,
    DENSE_FFN,
    FEED_FORWARD,
    FEED_FORWARD_FFN,
    FFN_BIAS,
    NO_BIAS,
    O_BIAS,
    PARTS,
    QKV_BIAS,
    dense_row,
)
from moeconv.families.expert_blocks import EVERY_ENGINE, ROUTER_LOSS, moe_row, served_below
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Layers, Packed, Routing, Tensors
from moeconv.families.vendor import Vendor, Wrapper

LLAMA = dense_row(
    "llama",
    "LlamaForCausalLM",
    config=ConfigKeys(
        {"head_dim": None, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
        neutral={"attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1, None)},
    ),
    tensors=Tensors(BLOCK | QKV_BIAS | O_BIAS | DENSE_FFN | FFN_BIAS),
)
CWM = dense_row(
    "cwm",
    "CwmForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 16.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
            "sliding_window": 8192,
            "layer_types": None,
            "mlp_bias": False,
            "attention_bias": False,
            "pretraining_tp": 1,
        },
        neutral=NO_BIAS | {"pretraining_tp": (1, None)},
    ),
    attention=Attention(sliding=sliding.ALL_BUT_EVERY_FOURTH),
)
LLAMA4 = moe_row(
    "llama4_text",
    "Llama4ForCausalLM",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "attention_bias": False,
            "attention_chunk_size": 8192,
            "intermediate_size_mlp": 16384,
            "interleave_moe_layer_step": 1,
            "moe_layers": None,
            "layer_types": None,
            "no_rope_layers": None,
            "router_jitter_noise": 0.0,
            **ROUTER_LOSS,
        }
    ),
    tensors=Tensors(
        BLOCK
        | QKV_BIAS
        | O_BIAS
        | {
            "router.weight": FEED_FORWARD + "router.weight",
            "expert.gate_up": FEED_FORWARD + "experts.gate_up_proj",
            "expert.down": FEED_FORWARD + "experts.down_proj",
        }
        | {f"shared.{p}": FEED_FORWARD + f"shared_expert.{p}_proj.weight" for p in PARTS}
        | FEED_FORWARD_FFN,
        packed={
            "expert.gate_up": Packed(("gate", "up"), transposed=True),
            "expert.down": Packed(("down",), transposed=True),
        },
        served=served_below(FEED_FORWARD),
        base_prefix="",
    ),
    layers=Layers(ffn_width=lambda get: get("intermediate_size_mlp")),
    experts=Experts(
        implementation="eager",
        count=("num_local_experts",),
        shared_width=("intermediate_size",),
        placement=placement.MOE_LAYERS,
        routing=Routing("sigmoid", "never", on_input=True),
    ),
    elsewhere=Elsewhere(runs=EVERY_ENGINE),
)

VENDOR = Vendor(
    dense=(LLAMA, CWM),
    moe=(LLAMA4,),
    wrappers=(
        Wrapper(
            "llama4",
            "Llama4ForConditionalGeneration",
            (LLAMA4,),
            {"vision_model.": "vision", "multi_modal_projector.": "vision"},
            prefix="language_model.model.",
            head="language_model.lm_head.",
            runs=frozenset({"vllm", "sglang"}),
        ),
    ),
)
