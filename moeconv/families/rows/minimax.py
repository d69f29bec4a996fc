"""MiniMax: Text-01 as transformers stores it, and M2."""

from __future__ import annotations

from moeconv.families.blocks import BLOCK, FULL_LAYERS, LAYER, QK_NORM
from moeconv.families.expert_blocks import ROUTER_LOSS, SPARSE_BLOCK, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Layers, Routing, Tensors
from moeconv.families.shapes import WHOLE_ROW_NORMS, config_key
from moeconv.families.sliding import WINDOW_KEY
from moeconv.families.vendor import Vendor

_FACTORS = ("alpha", "beta")  # of the residual stream, and of what is added to it


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
            "shared_intermediate_size": 0,
        },
        runs=frozenset({"vllm", "llama.cpp"}),
    ),
)

_LIGHTNING = {
    f"linear.{key}": LAYER + f"self_attn.{name}"
    for key, name in (
        ("qkv", "qkv_proj.weight"), ("gate", "output_gate.weight"), ("norm", "norm.weight"), ("out", "out_proj.weight"),
        ("slope", "slope_rate"), ("query_decay", "query_decay"), ("key_decay", "key_decay"),
        ("diagonal_decay", "diagonal_decay"),
    )
}  # fmt: skip
_DECAYS = frozenset({"linear.slope", "linear.query_decay", "linear.key_decay", "linear.diagonal_decay"})
MINIMAX = moe_row(
    "minimax",
    "MiniMaxForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "router_jitter_noise": 0.0,
            "layer_types": None,
            "block_size": 256,
            **{f"{part}_{factor}_factor": 1 for part in ("full_attn", "linear_attn", "mlp") for factor in _FACTORS},
            **ROUTER_LOSS,
        },
    ),
    tensors=Tensors(
        BLOCK | SPARSE_BLOCK | _LIGHTNING,
        optional=_DECAYS,  # the class computes them where a checkpoint has none
        float32=_DECAYS,
        shapes={
            "linear.qkv": "3*heads*head, hidden",
            "linear.gate": "heads*head, hidden",
            "linear.norm": "heads*head",
            "linear.out": "hidden, heads*head",
            "linear.slope": "heads, 1, 1",
            "linear.query_decay": "heads, block, 1",
            "linear.key_decay": "heads, block, 1",
            "linear.diagonal_decay": "1, heads, block, block",
        },
        sizes={"block": config_key("block_size")},
    ),
    attention=Attention(sliding=WINDOW_KEY),
    layers=Layers(
        kinds=lambda get, layers: (
            get("layer_types") or ["linear_attention" if i % 2 else "full_attention" for i in range(layers)]
        ),
        where={"attention": FULL_LAYERS, "linear": frozenset({"linear_attention"})},
    ),
    experts=Experts(routing=Routing("softmax", "always")),
)

VENDOR = Vendor(
    moe=(MINIMAX, MINIMAX_M2),
)
