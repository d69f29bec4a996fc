"""MiniMax: Text-01 as transformers stores it, M2, and M3, whose attention reads blocks of tokens that it chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moeconv.errors import InputError, escape
from moeconv.families import placement
from moeconv.families.blocks import BLOCK, DENSE_FFN, FFN_GATE_UP, FULL_LAYERS, FUSED_FFN, LAYER, PARTS, QK_NORM
from moeconv.families.expert_blocks import (
    CORRECTION,
    GATE_UP_PACKED,
    MLP_ROUTER,
    ROUTER_LOSS,
    SPARSE_BLOCK,
    STACKED_NAMES,
    moe_row,
)
from moeconv.families.per_layer import one_per_layer
from moeconv.families.placement import Get, Placement
from moeconv.families.records import LIST, OBJECT, Attention, ConfigKeys, Elsewhere, Experts, Layers, Routing, Tensors
from moeconv.families.shapes import WHOLE_ROW_NORMS, Size, config_key
from moeconv.families.sliding import WINDOW_KEY
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.types import JsonObject

_FACTORS = ("alpha", "beta")  # of the residual stream, and of what is added to it


def _rotary_share(get: Get) -> float:
    """The share of a head that rotates."""
    return (get("rope_parameters") or {}).get("partial_rotary_factor") or get("partial_rotary_factor") or 1.0


def _rotary_dim(get: Get) -> int:
    return int(get("head_dim") * _rotary_share(get))


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

_SPARSE = "minimax_m3_sparse"  # layers with an indexer, in the words of the class
# settings of the indexers -> their names in sparse_attention_config, which take precedence
_INDEX_KEYS = {
    "index_n_heads": "sparse_num_index_heads", "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size", "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}  # fmt: skip


def _flags(value: object, key: str, layers: int) -> list[bool]:
    return [bool(flag) for flag in one_per_layer(value, layers, key, noun="number")]


def _m3_kinds(get: Get, layers: int) -> list[str]:
    """The kind of each layer: layer_types, or the flags that MiniMax's files have instead."""
    words, flags = get("layer_types"), (get("sparse_attention_config") or {}).get("sparse_attention_freq")
    if words is None and flags is not None:
        words = [_SPARSE if flag else "full_attention" for flag in _flags(flags, "sparse_attention_freq", layers)]
    return ["full_attention"] * layers if words is None else one_per_layer(words, layers, "layer_types")


def _m3_moe(get: Get, layers: int) -> tuple[int, ...]:
    """The layers with experts: mlp_layer_types, or the flags that MiniMax's files have instead."""
    flags = get("moe_layer_freq")
    if get("mlp_layer_types") is not None or flags is None:
        return placement.WORDS.read(get, layers)
    return tuple(i for i, flag in enumerate(_flags(flags, "moe_layer_freq", layers)) if flag)


def _index(get: Get, key: str) -> int:
    """A setting of the indexers, which MiniMax's files state under another name. Raises InputError if it is not a whole
    number."""
    hub = _INDEX_KEYS[key]
    value = (get("sparse_attention_config") or {}).get(hub, get(key))
    if type(value) is not int or value < 0:
        raise InputError(
            f"config.json: {hub} of sparse_attention_config (or {key}) must be a whole number, found "
            f"{escape(value)[:80]}",
            hint="Correct config.json, or download it again.",
        )
    return value


def _m3_index(key: str) -> Size:
    return lambda get, _place: _index(get, key)


def _as_minimax(get: Get) -> JsonObject:
    """sparse_attention_config, without which vLLM assumes that of the published model."""
    flags = [int(kind == _SPARSE) for kind in _m3_kinds(get, get("num_hidden_layers"))]
    return {
        "use_sparse_attention": True,
        **{hub: _index(get, key) for key, hub in _INDEX_KEYS.items()},
        "sparse_score_type": "max",
        "sparse_init_block": 0,
        "sparse_disable_index_value": flags,
        "sparse_attention_freq": flags,
    }


def _moe_flags(get: Get) -> list[int]:
    moe = _m3_moe(get, get("num_hidden_layers"))
    return [int(layer in moe) for layer in range(get("num_hidden_layers"))]


def _indexer(stem: str) -> dict[str, str]:
    names = {"q": "q_proj", "k": "k_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
    return {f"indexer.{key}": f"{LAYER}self_attn.{stem}{name}.weight" for key, name in names.items()}


_BLOCK_SPARSE = LAYER + "block_sparse_moe."
_IN_MEMORY: Mapping[str, str | tuple[str, ...]] = {
    ".block_sparse_moe.": ".mlp.", ".self_attn.index_": ".self_attn.indexer.",
    ".gate_proj": ".gate_up_proj", ".up_proj": ".gate_up_proj",
}  # fmt: skip
# the language model alone, whose tensors have the names that the class has in memory
MINIMAX_M3 = moe_row(
    "minimax_m3_vl_text",
    "MiniMaxM3VLForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "rope_theta": 5e6,
            "dense_intermediate_size": 12288,
            "shared_intermediate_size": 3072,
            "routed_scaling_factor": 2.0,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "mlp_layer_types": None,
            "moe_layer_freq": None,
            "layer_types": None,
            "sparse_attention_config": None,
            "index_n_heads": 4,
            "index_head_dim": 128,
            "index_block_size": 128,
            "index_topk_blocks": 16,
            "index_local_blocks": 1,
            "router_jitter_noise": 0.0,
            **ROUTER_LOSS,
        },
        kinds={"moe_layer_freq": LIST, "sparse_attention_config": OBJECT},
    ),
    tensors=Tensors(
        BLOCK
        | QK_NORM
        | _indexer("indexer.")
        | MLP_ROUTER
        | CORRECTION
        | STACKED_NAMES
        | {
            "shared.gate_up": LAYER + "mlp.shared_experts.gate_up_proj.weight",
            "shared.down": LAYER + "mlp.shared_experts.down_proj.weight",
        }
        | FFN_GATE_UP,
        fused=FUSED_FFN | {"shared.gate_up": ("shared.gate", "shared.up")},
        packed=GATE_UP_PACKED,
        shapes={"indexer.q": "index_heads*index_head, hidden", "indexer.q_norm": "index_head"},
        sizes={"index_heads": _m3_index("index_n_heads"), "index_head": _m3_index("index_head_dim")},
        norm_offset=1.0,
    ),
    layers=Layers(
        kinds=_m3_kinds,
        where={"indexer": frozenset({_SPARSE})},
        ffn_width=lambda get: get("dense_intermediate_size"),
    ),
    experts=Experts(
        count=("num_local_experts",),
        dense_width="dense_intermediate_size",
        shared_width=("shared_intermediate_size",),
        placement=Placement(_m3_moe, placement.WORDS.write, placement.WORDS.can),
        routing=Routing("sigmoid", "always", scaling="routed_scaling_factor"),
    ),
)
# the same inside the multimodal model, under the names that MiniMax gave the tensors
_M3_INSIDE = replace(
    MINIMAX_M3,
    tensors=replace(
        MINIMAX_M3.tensors,
        names=BLOCK
        | QK_NORM
        | _indexer("index_")
        | SPARSE_BLOCK
        | {"router.correction": _BLOCK_SPARSE + "e_score_correction_bias"}
        | {f"shared.{part}": _BLOCK_SPARSE + f"shared_experts.{part}_proj.weight" for part in PARTS}
        | DENSE_FFN,
        fused={},
        packed={},
        in_memory=_IN_MEMORY,
    ),
    elsewhere=Elsewhere(
        keys={
            "moe_layer_freq": _moe_flags, "sparse_attention_config": _as_minimax, "n_shared_experts": 1,
            "scoring_func": "sigmoid", "use_routing_bias": True, "use_gemma_norm": True, "use_qk_norm": True,
            "qk_norm_type": "per_head", "swiglu_beta": 1.0, "partial_rotary_factor": _rotary_share,
        },
        # transformers writes this whatever the model computes, and vLLM takes no other word than its default
        implied=frozenset({"hidden_act"}),
        # transformers joins the plain matrices of FFNs, but not while it reads packed weights
        not_loaded=frozenset({"compressed-tensors"}),
    ),
)  # fmt: skip
_TOWER = "vision_tower.vision_model."

VENDOR = Vendor(
    moe=(MINIMAX, MINIMAX_M2, MINIMAX_M3),
    wrappers=(
        Wrapper(
            "minimax_m3_vl",
            "MiniMaxM3SparseForConditionalGeneration",
            (_M3_INSIDE,),
            {"vision_tower.": "vision", "multi_modal_projector.": "vision", "patch_merge_mlp.": "vision"},
            prefix="language_model.model.",
            head="language_model.lm_head.",
            runs=frozenset({"vllm", "sglang"}),
            # as transformers 5.20 saves what is no block of experts
            variants={
                f"language_model.{_BLOCK_SPARSE}{part}_proj.": f"language_model.{LAYER}mlp.{part}_proj."
                for part in PARTS
            }
            | {_TOWER + "encoder.layers.{L}.block_sparse_moe.": _TOWER + "encoder.layers.{L}.mlp."},
            in_memory={
                "language_model.model.": "model.language_model.",
                "language_model.lm_head": "lm_head",
                _TOWER + "embeddings.patch_embedding": "model.vision_tower.embeddings.proj",
                _TOWER + "encoder.layers.": "model.vision_tower.layers.",
                _TOWER + "pre_layrnorm": "model.vision_tower.pre_layrnorm",
                "multi_modal_projector.": "model.multi_modal_projector.",
                "patch_merge_mlp.": "model.multi_modal_projector.merge_",
            },
        ),
    ),
)
