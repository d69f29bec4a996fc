"""Moonshot AI: Kimi-Linear, Kimi-K2, and Kimi-K2.5."""

from __future__ import annotations

from typing import Any

from moeconv.errors import InputError, escape
from moeconv.families import placement
from moeconv.families.blocks import DENSE_FFN, FULL_LAYERS, LAYER, MLA, MLA_CONFIG, PARTS, WITHOUT_QKVO
from moeconv.families.expert_blocks import EVERY_ENGINE, GROUPED, SIGMOID, W_NAMES, leading_dense, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import OBJECT, WHOLE, Attention, ConfigKeys, Elsewhere, Experts, Layers, Tensors
from moeconv.families.rows.deepseek import DEEPSEEK_V3
from moeconv.families.shapes import Place
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.types import JsonObject


def _linear(get: Get, own: str, hub: str) -> int:
    """A size of the linear layers: as Moonshot's files state it, else as transformers' do. Raises InputError if it
    is not a whole number above 0."""
    value = (get("linear_attn_config") or {}).get(hub, get(own))
    if type(value) is not int or value <= 0:
        raise InputError(
            f"config.json: {hub} of linear_attn_config (or {own}) must be a whole number above 0, found "
            f"{escape(value)[:80]}",
            hint="Correct config.json, or download it again.",
        )
    return value


def _heads(get: Get, _place: Place) -> Any:
    return _linear(get, "linear_num_heads", "num_heads")


def _head(get: Get, _place: Place) -> Any:
    return _linear(get, "linear_head_dim", "head_dim")


def _width(get: Get, place: Place) -> Any:
    return _heads(get, place) * _head(get, place)


def _kinds(get: Get, layers: int) -> list[str]:
    """The kind of each layer, as KimiLinearConfig derives it; Moonshot's files count layers from 1."""
    stated, words = get("linear_attn_config") or {}, get("layer_types")
    if words is None and {"full_attn_layers", "kda_layers"} <= stated.keys():
        full, linear = stated["full_attn_layers"], stated["kda_layers"]
        if (
            not isinstance(full, list)
            or not isinstance(linear, list)
            or sorted(map(str, full + linear)) != sorted(map(str, range(1, layers + 1)))
        ):
            raise InputError(
                f"config.json: full_attn_layers and kda_layers of linear_attn_config must name each of the layers 1 to "
                f"{layers} once",
                hint="Correct config.json, or download it again.",
            )
        return [_FULL if i + 1 in full else _LINEAR for i in range(layers)]
    if words is None:
        words = [_FULL if i and i % 4 == 0 else _LINEAR for i in range(layers)]
    return list(words)


def _is_full(get: Get, place: Place) -> bool:
    return place.layer is not None and _kinds(get, get("num_hidden_layers"))[place.layer] == _FULL


def _query_rows(get: Get, place: Place) -> Any:
    latent = get("num_attention_heads") * (get("qk_nope_head_dim") + get("qk_rope_head_dim"))
    return latent if _is_full(get, place) else _width(get, place)


def _output_columns(get: Get, place: Place) -> Any:
    return get("num_attention_heads") * get("v_head_dim") if _is_full(get, place) else _width(get, place)


def _as_moonshot(get: Get) -> JsonObject:
    """linear_attn_config, which other readers than transformers need."""
    kinds = _kinds(get, get("num_hidden_layers"))
    return {
        "full_attn_layers": [i + 1 for i, kind in enumerate(kinds) if kind == _FULL],
        "kda_layers": [i + 1 for i, kind in enumerate(kinds) if kind != _FULL],
        "head_dim": get("linear_head_dim"),
        "num_heads": get("linear_num_heads"),
        "short_conv_kernel_size": get("linear_conv_kernel_dim"),
    }


_FULL, _LINEAR = "full_attention", "linear_attention"
_BLOCK = LAYER + "block_sparse_moe."
_ATTENTION = LAYER + "self_attn."
_DELTA = {
    f"linear.{key}": _ATTENTION + name
    for key, name in (
        ("k", "k_proj.weight"), ("v", "v_proj.weight"), ("q_conv", "q_conv1d.weight"), ("k_conv", "k_conv1d.weight"),
        ("v_conv", "v_conv1d.weight"), ("decay_a", "f_a_proj.weight"), ("decay_b", "f_b_proj.weight"), ("A", "A_log"),
        ("dt", "dt_bias"), ("beta", "b_proj.weight"), ("gate_a", "g_a_proj.weight"), ("gate_b", "g_b_proj.weight"),
        ("norm", "o_norm.weight"),
    )
}  # fmt: skip
KIMI_LINEAR = moe_row(
    "kimi_linear",
    "KimiLinearForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | {
            "num_key_value_heads": 32,
            "max_position_embeddings": 1048576,
            "rms_norm_eps": 1e-5,
            "q_lora_rank": None,
            "moe_intermediate_size": 1024,
            "mlp_layer_types": None,
            "first_k_dense_replace": 1,
            "layer_types": None,
            "linear_attn_config": None,
            "linear_head_dim": 128,
            "linear_num_heads": 32,
            "linear_conv_kernel_dim": 4,
            **SIGMOID,
            "routed_scaling_factor": 2.446,
        },
        words={
            "max_position_embeddings": "model_max_length",
            "norm_topk_prob": "moe_renormalize",
            "n_group": "num_expert_group",
            "n_shared_experts": "num_shared_experts",
        },
        kinds={"q_lora_rank": WHOLE, "linear_attn_config": OBJECT},
        only={"q_lora_rank": ((None,), "the queries of its full-attention layers then have another form")},
    ),
    tensors=Tensors(
        WITHOUT_QKVO
        | {key: name for key, name in MLA.items() if "q_a" not in key and "q_b" not in key}
        | _DELTA
        | {"router.weight": _BLOCK + "gate.weight", "router.correction": _BLOCK + "gate.e_score_correction_bias"}
        | {f"expert.{part}": _BLOCK + "experts.{E}." + f"{name}.weight" for part, name in W_NAMES.items()}
        | {f"shared.{part}": _BLOCK + f"shared_experts.{part}_proj.weight" for part in PARTS}
        | DENSE_FFN,
        # save_pretrained takes the FFN of a dense layer for a block with experts
        variants={f"{_BLOCK}{part}_proj.": LAYER + f"mlp.{part}_proj." for part in PARTS},
        in_memory={".block_sparse_moe.": ".mlp.", "self_attn.f_": "self_attn.forget_gate.f_"},
        float32=frozenset({"router.correction", "linear.dt"}),
        shapes={
            "attention.q_whole": "query_rows, hidden", "attention.o": "hidden, output_columns",
            "linear.k": "delta, hidden", "linear.v": "delta, hidden", "linear.q_conv": "delta, 1, linear_kernel",
            "linear.k_conv": "delta, 1, linear_kernel", "linear.v_conv": "delta, 1, linear_kernel",
            "linear.decay_a": "delta_head, hidden", "linear.decay_b": "delta, delta_head",
            "linear.A": "1, 1, delta_heads, 1", "linear.dt": "delta", "linear.beta": "delta_heads, hidden",
            "linear.gate_a": "delta_head, hidden", "linear.gate_b": "delta, delta_head", "linear.norm": "delta_head",
        },
        sizes={
            "query_rows": _query_rows, "output_columns": _output_columns, "delta": _width, "delta_head": _head,
            "delta_heads": _heads,
            "linear_kernel": lambda get, _place: _linear(get, "linear_conv_kernel_dim", "short_conv_kernel_size"),
        },
    ),
    attention=Attention(rope="none"),
    layers=Layers(
        kinds=_kinds,
        where={
            "linear": frozenset({_LINEAR}),
            **dict.fromkeys(("attention.kv_a", "attention.kv_a_norm", "attention.kv_b"), FULL_LAYERS),
        },
    ),
    experts=Experts(
        count=("num_experts",),
        top_k=("num_experts_per_token",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.WORDS_OR_FIRST_K,
        routing=GROUPED,
    ),
    elsewhere=Elsewhere(
        keys={
            "linear_attn_config": _as_moonshot, "first_k_dense_replace": leading_dense, "moe_layer_freq": 1,
            "moe_router_activation_func": "sigmoid", "use_grouped_topk": True, "mla_use_nope": True,
            "rope_theta": 10000.0,  # no layer rotates, and still mlx-lm requires it
        },
        # where it reads them, it takes the plain kernels that it joins into one for packed weights too (5.24)
        not_loaded=frozenset({"compressed-tensors"}),
        runs=EVERY_ENGINE,
    ),
)  # fmt: skip

VENDOR = Vendor(
    moe=(KIMI_LINEAR,),
    wrappers=(
        Wrapper(
            "kimi_k25",
            "Kimi_K25ForConditionalGeneration",
            (DEEPSEEK_V3,),
            {"vision_tower.": "vision", "mm_projector.": "vision"},
            prefix="language_model.model.",
            head="language_model.lm_head.",
            tied=True,
            # save_pretrained writes these: it takes the text's layers for blocks of the vision tower
            variants={
                "language_model.model.blocks.": "language_model.model.layers.",
                "model.mm_projector.": "mm_projector.",
            },
            in_memory={
                "language_model.model.": "model.language_model.",
                "language_model.lm_head": "lm_head",
                "vision_tower.encoder.blocks.": "model.vision_tower.layers.",
                ".mlp.fc1": ".mlp.fc2",
                ".mlp.fc0": ".mlp.fc1",
                ".wqkv": (".attn.q_proj", ".attn.k_proj", ".attn.v_proj"),
                ".wo": ".attn.proj",
                "mm_projector.proj.0": "model.mm_projector.in_proj",
                "mm_projector.proj.2": "model.mm_projector.out_proj",
            },
            runs=frozenset({"vllm", "sglang"}),
        ),
    ),
    # its class is remote code, a copy of DeepSeek-V3's; the class of kimi_k25 replaces the name in the same way
    aliases={"kimi_k2": "deepseek_v3"},
)
