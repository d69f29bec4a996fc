"""AI21: Jamba, which mixes state spaces with attention."""

from __future__ import annotations

from moeconv.families import placement
from moeconv.families.blocks import BLOCK, FEED_FORWARD, FEED_FORWARD_FFN, FULL_LAYERS, LAYER, PARTS
from moeconv.families.expert_blocks import ROUTER_LOSS, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Layers, Routing, Tensors
from moeconv.families.vendor import Vendor

MAMBA_1 = {
    "mamba.A": "mamba_inner, mamba_state",
    "mamba.D": "mamba_inner",
    "mamba.conv": "mamba_inner, 1, mamba_kernel",
    "mamba.conv_bias": "mamba_inner",
    "mamba.in": "2*mamba_inner, hidden",
    "mamba.in_bias": "2*mamba_inner",
    "mamba.x": "mamba_rank + 2*mamba_state, mamba_inner",
    "mamba.dt": "mamba_inner, mamba_rank",
    "mamba.dt_bias": "mamba_inner",
    "mamba.dt_norm": "mamba_rank",
    "mamba.b_norm": "mamba_state",
    "mamba.c_norm": "mamba_state",
}


def _jamba_kinds(get: Get, layers: int) -> list[str]:
    period, offset = get("attn_layer_period") or 1, get("attn_layer_offset") or 0
    return ["attention" if i % period == offset else "mamba" for i in range(layers)]


JAMBA = moe_row(
    "jamba",
    "JambaForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            **ROUTER_LOSS,
        }
    ),
    tensors=Tensors(
        {k: v for k, v in BLOCK.items() if k not in ("norm.final", "norm.ffn")}
        | {"norm.final": "model.final_layernorm.weight", "norm.ffn": LAYER + "pre_ff_layernorm.weight"}
        | {
            f"mamba.{key}": LAYER + f"mamba.{name}"
            for key, name in (
                ("A", "A_log"),
                ("D", "D"),
                ("b_norm", "b_layernorm.weight"),
                ("c_norm", "c_layernorm.weight"),
                ("dt_norm", "dt_layernorm.weight"),
                ("conv", "conv1d.weight"),
                ("conv_bias", "conv1d.bias"),
                ("dt", "dt_proj.weight"),
                ("dt_bias", "dt_proj.bias"),
                ("in", "in_proj.weight"),
                ("in_bias", "in_proj.bias"),
                ("out", "out_proj.weight"),
                ("out_bias", "out_proj.bias"),
                ("x", "x_proj.weight"),
            )
        }
        | {"router.weight": FEED_FORWARD + "router.weight"}
        | {f"expert.{p}": FEED_FORWARD + "experts.{E}." + f"{p}_proj.weight" for p in PARTS}
        | FEED_FORWARD_FFN,
        shapes=MAMBA_1,
    ),
    attention=Attention(rope="none"),
    layers=Layers(kinds=_jamba_kinds, where={"attention": FULL_LAYERS, "mamba": frozenset({"mamba"})}),
    experts=Experts(count=("num_experts",), placement=placement.PERIOD, routing=Routing("softmax", "never")),
    elsewhere=Elsewhere(runs=frozenset({"vllm", "llama.cpp"})),
)

VENDOR = Vendor(
    moe=(JAMBA,),
)
