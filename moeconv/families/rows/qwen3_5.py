"""Alibaba: Qwen3-Next and Qwen3.5, which mix linear attention with full attention."""

from __future__ import annotations

from moeconv.families import placement
from moeconv.families.blocks import (
    ATTENTION_BIAS,
    BASE_CONFIG,
    BLOCK,
    DENSE_FFN,
    FULL_LAYERS,
    LAYER,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    dense_row,
)
from moeconv.families.expert_blocks import (
    EVERY_ENGINE,
    MLP_EXPERTS,
    MLP_ROUTER,
    QWEN_MTP,
    ROUTER_LOSS,
    SEPARATE,
    SHARED_EXPERT,
    SHARED_GATE,
    STACKED,
    ZERO_SHARED_128,
    moe_row,
)
from moeconv.families.placement import Get
from moeconv.families.records import (
    LIST,
    SWITCH,
    WHOLE,
    Attention,
    ConfigKeys,
    Elsewhere,
    Experts,
    Layers,
    Routing,
    Tensors,
)
from moeconv.families.shapes import GATED_QUERY
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.types import JsonObject

LINEAR_ATTENTION = {
    f"linear.{key}": LAYER + f"linear_attn.{name}"
    for key, name in (
        ("A", "A_log"), ("conv", "conv1d.weight"), ("dt", "dt_bias"), ("a", "in_proj_a.weight"),
        ("b", "in_proj_b.weight"), ("qkv", "in_proj_qkv.weight"), ("z", "in_proj_z.weight"), ("norm", "norm.weight"),
        ("out", "out_proj.weight"),
    )
}  # fmt: skip
QWEN3_5_CONFIG: JsonObject = {
    "head_dim": 256, "max_position_embeddings": 32768, "partial_rotary_factor": None, "attention_bias": False,
    "layer_types": None, "full_attention_interval": None, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
QWEN3_5_WHERE = {"attention": FULL_LAYERS, "linear": frozenset({"linear_attention"})}


def qwen3_5_kinds(get: Get, layers: int) -> list[str]:
    """The kind of each layer's token mixer: if config.json does not list them, full attention in every fourth layer."""
    every = get("full_attention_interval") or 4
    words = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
    return get("layer_types") or words


def _interval(get: Get) -> int | None:
    """Every how many layers attention is full, where layer_types is as regular as that."""
    words = get("layer_types") or []
    full = [i for i, word in enumerate(words) if word == "full_attention"]
    return full[0] + 1 if full and full == list(range(full[0], len(words), full[0] + 1)) else None


# mlx-lm reads this key in place of layer_types
_INTERVAL: JsonObject = {"full_attention_interval": _interval}

# keys of the prediction layers, which `upcycle` leaves out, and of experts, which the dense class ignores
_LEFT_OUT = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mlp_only_layers")
# q contains an output gate beside the queries; norms add 1 in both families, so no offset is needed
QWEN3_5 = dense_row(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    config=ConfigKeys(
        QWEN3_5_CONFIG | {"num_key_value_heads": 4} | dict.fromkeys(_LEFT_OUT),
        kinds={"mtp_num_hidden_layers": WHOLE, "mtp_use_dedicated_embeddings": SWITCH, "mlp_only_layers": LIST},
    ),
    tensors=Tensors(BLOCK | ATTENTION_BIAS | QK_NORM | LINEAR_ATTENTION | DENSE_FFN, shapes=GATED_QUERY),
    attention=Attention(partial=0.25, sections=True),
    layers=Layers(kinds=qwen3_5_kinds, where=QWEN3_5_WHERE),
    prediction=QWEN_MTP,
)
QWEN3_5_MOE = moe_row(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    config=ConfigKeys(
        QWEN3_5_CONFIG
        | {
            "num_key_value_heads": 2,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            **ROUTER_LOSS,
        }
    ),
    tensors=Tensors(
        BLOCK | QKV_BIAS | O_BIAS | QK_NORM | LINEAR_ATTENTION | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERT | SHARED_GATE,
        # the hub's checkpoints stack the experts of the model's layers, and only some those of the prediction layers
        layouts=(SEPARATE, STACKED),
        # a tool that edits the language model alone may keep the names that it has in the multimodal model
        variants={"model.language_model.": "model."},
        shapes=GATED_QUERY,
    ),
    attention=Attention(partial=0.25, sections=True),
    layers=Layers(kinds=qwen3_5_kinds, where=QWEN3_5_WHERE),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("shared_expert_intermediate_size",),
        shared_weight=0.5,  # sigmoid(0) of its gate
        routing=Routing("softmax", "always"),
    ),
    prediction=QWEN_MTP,
    base={key: value for key, value in BASE_CONFIG.items() if key != "intermediate_size"},
    elsewhere=Elsewhere(keys=_INTERVAL, runs=frozenset({"llama.cpp"})),
)
QWEN3_NEXT = moe_row(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    config=ConfigKeys(
        QWEN3_5_CONFIG
        | {
            "num_key_value_heads": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 512,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 512,
            **ROUTER_LOSS,
        }
    ),
    tensors=Tensors(
        BLOCK
        | QKV_BIAS
        | O_BIAS
        | QK_NORM
        | {k: v for k, v in LINEAR_ATTENTION.items() if k not in ("linear.a", "linear.b", "linear.qkv", "linear.z")}
        | {
            "linear.ba": LAYER + "linear_attn.in_proj_ba.weight",
            "linear.qkvz": LAYER + "linear_attn.in_proj_qkvz.weight",
        }
        | MLP_ROUTER
        | MLP_EXPERTS
        | SHARED_EXPERT
        | SHARED_GATE
        | DENSE_FFN,
        shapes=GATED_QUERY,
    ),
    attention=Attention(partial=0.25),
    layers=Layers(kinds=qwen3_5_kinds, where=QWEN3_5_WHERE),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("shared_expert_intermediate_size",),
        placement=placement.LIST,
        routing=Routing("softmax", "norm_topk_prob"),
    ),
    prediction=QWEN_MTP,
    elsewhere=Elsewhere(keys=_INTERVAL, runs=EVERY_ENGINE),
)

VENDOR = Vendor(
    dense=(QWEN3_5,),
    moe=(QWEN3_5_MOE, QWEN3_NEXT),
    pairs=(
        Pair(
            "qwen3_5_text",
            "qwen3_5_moe_text",
            default=True,
            note=ZERO_SHARED_128,
            config={"shared_expert_intermediate_size": 128},
            rename={"intermediate_size": None, **dict.fromkeys(_LEFT_OUT)},
        ),
    ),
    wrappers=(
        Wrapper(
            "qwen3_5",
            "Qwen3_5ForConditionalGeneration",
            (QWEN3_5,),
            {"model.visual.": "vision"},
            becomes="qwen3_5_moe",
        ),
        Wrapper(
            "qwen3_5_moe",
            "Qwen3_5MoeForConditionalGeneration",
            (QWEN3_5_MOE,),
            {"model.visual.": "vision"},
            parts={"vision_config": "qwen3_5_moe_vision"},
            runs=frozenset({"vllm", "sglang"}),
        ),
    ),
)
