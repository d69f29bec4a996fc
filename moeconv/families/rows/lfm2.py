"""Liquid AI: LFM2, which mixes convolutions with attention."""

from __future__ import annotations

from moeconv.families import placement
from moeconv.families.blocks import FULL_LAYERS, LAYER
from moeconv.families.expert_blocks import EVERY_ENGINE, W_NAMES, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import LIST, WHOLE, ConfigKeys, Elsewhere, Experts, Layers, Routing, Tensors
from moeconv.families.spec import Family, Pair
from moeconv.families.vendor import Vendor
from moeconv.types import JsonObject

LFM2 = {
    "embedding.tokens": "model.embed_tokens.weight",
    "embedding.lm_head": "lm_head.weight",
    "norm.final": "model.embedding_norm.weight",
    "norm.attention": LAYER + "operator_norm.weight",
    "norm.ffn": LAYER + "ffn_norm.weight",
    **{f"attention.{p}": LAYER + f"self_attn.{p}_proj.weight" for p in "qkv"},
    "attention.o": LAYER + "self_attn.out_proj.weight",
    **{f"attention.{p}_norm": LAYER + f"self_attn.{p}_layernorm.weight" for p in "qk"},
    "conv.kernel": LAYER + "conv.conv.weight",
    "conv.kernel_bias": LAYER + "conv.conv.bias",
    **{f"conv.{p}": LAYER + f"conv.{p}_proj.weight" for p in ("in", "out")},
    **{f"conv.{p}_bias": LAYER + f"conv.{p}_proj.bias" for p in ("in", "out")},
    **{f"ffn.{p}": LAYER + f"feed_forward.{w}.weight" for p, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
}
LFM2_OPTIONAL = frozenset({"embedding.lm_head", "conv.kernel_bias", "conv.in_bias", "conv.out_bias"})
LFM2_CONFIG: JsonObject = {
    "vocab_size": 65536, "hidden_size": None, "num_hidden_layers": None, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 128000, "initializer_range": 0.02, "norm_eps": 1e-5,
    "rope_theta": 1e6, "rope_scaling": None, "rope_parameters": None, "tie_word_embeddings": True,
    "conv_bias": False, "conv_L_cache": 3, "layer_types": None,
}  # fmt: skip


def _lfm2_kinds(get: Get, layers: int) -> list[str]:
    full = get("full_attn_idxs")
    chosen = range(layers) if full is None else full
    kinds: list[str] = get("layer_types") or ["full_attention" if i in chosen else "conv" for i in range(layers)]
    return kinds


def _lfm2_width(get: Get) -> int:
    """The width that Lfm2MLP computes: 2/3 of the stated size, times a multiplier, rounded up to a multiple."""
    size: int = get("block_ff_dim") or get("intermediate_size")
    if not get("block_auto_adjust_ff_dim"):
        return size
    size = int(2 * size / 3)
    if get("block_ffn_dim_multiplier") is not None:
        multiple = get("block_multiple_of")
        size = multiple * -(-int(get("block_ffn_dim_multiplier") * size) // multiple)
    return size


LFM2_DENSE = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    kind="dense",
    config=ConfigKeys(
        LFM2_CONFIG
        | {
            "intermediate_size": 12288,
            "block_ff_dim": None,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "full_attn_idxs": None,
            "tie_embedding": True,
        },
        kinds={"block_ff_dim": WHOLE, "full_attn_idxs": LIST},
        derived={"tie_word_embeddings": lambda get: get("tie_embedding")},  # an older name of the key
    ),
    tensors=Tensors(LFM2, optional=LFM2_OPTIONAL),
    layers=Layers(
        ffn_width=_lfm2_width,
        ffn_width_keys=("block_ff_dim", "intermediate_size"),
        ffn_width_as_stated={"block_auto_adjust_ff_dim": False},
        kinds=_lfm2_kinds,
        where={"attention": FULL_LAYERS, "conv": frozenset({"conv"})},
    ),
)
LFM2_MOE = moe_row(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    config=ConfigKeys(
        {
            "intermediate_size": 7168,
            "moe_intermediate_size": 1792,
            "num_dense_layers": 2,
            "use_expert_bias": True,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": True,
            "output_router_logits": False,
        }
    ),
    tensors=Tensors(
        LFM2
        | {"router.weight": LAYER + "feed_forward.gate.weight", "router.correction": LAYER + "feed_forward.expert_bias"}
        | {f"expert.{p}": LAYER + "feed_forward.experts.{E}." + f"{w}.weight" for p, w in W_NAMES.items()},
        optional=LFM2_OPTIONAL | {"router.correction"},
        float32=frozenset({"router.correction"}),
    ),
    layers=Layers(
        kinds=lambda get, layers: get("layer_types") or ["full_attention"] * layers,
        where={"attention": FULL_LAYERS, "conv": frozenset({"conv"})},
    ),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        placement=placement.NUM_DENSE,
        routing=Routing("sigmoid", "norm_topk_prob", scaling="routed_scaling_factor"),
    ),
    base=LFM2_CONFIG,
    elsewhere=Elsewhere(runs=EVERY_ENGINE),
)

VENDOR = Vendor(
    dense=(LFM2_DENSE,),
    moe=(LFM2_MOE,),
    pairs=(
        Pair(
            "lfm2",
            "lfm2_moe",
            default=True,
            config={"norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True},
            rename=dict.fromkeys(
                (
                    "block_ff_dim",
                    "block_multiple_of",
                    "block_ffn_dim_multiplier",
                    "block_auto_adjust_ff_dim",
                    "full_attn_idxs",
                    "tie_embedding",
                )
            ),
            backwards={"block_auto_adjust_ff_dim": False},
            tolerance=1e-3,
        ),
    ),
)
