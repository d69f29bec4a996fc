"""Xiaomi: MiMo and MiMo-V2-Flash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moeconv.families import placement, sliding
from moeconv.families.blocks import BLOCK, DENSE_FFN, LAYER, QKV_BIAS, SINKS
from moeconv.families.expert_blocks import (
    CORRECTION,
    GROUPED,
    MLP_EXPERTS,
    MLP_ROUTER,
    MTP,
    NO_AUX_LOSS,
    SIGMOID,
    moe_row,
)
from moeconv.families.placement import Get
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Prediction, Tensors
from moeconv.families.rows.qwen import QWEN2
from moeconv.families.settings import MAX_MTP
from moeconv.families.shapes import Place, Size, config_key
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor


def _mimo_kv(get: Get, place: Place) -> Any:
    """The number of key and value heads: twice as many in layers with a sliding window."""
    kinds = get("layer_types")
    if not isinstance(kinds, list) or place.layer is None or place.layer >= len(kinds):
        return None
    return get("num_key_value_heads") * (2 if kinds[place.layer] == "sliding_attention" else 1)


MIMO_SIZES: Mapping[str, Size] = {"kv": _mimo_kv, "v_head": config_key("v_head_dim")}
# dense layers with the attention of layers that have a window; the prefix "model.mtp." replaces "model."
_MIMO_MTP = {key: MTP.names[key] for key in ("mtp.norm_embedding", "mtp.norm_hidden", "mtp.project")} | {
    "mtp.norm_ffn": LAYER + "pre_mlp_layernorm.weight",
    "mtp.norm": LAYER + "final_layernorm.weight",
}


def _per_layer(key: str, word: str) -> Callable[[Get], list[int] | None]:
    def flags(get: Get) -> list[int] | None:
        words = get(key)
        return None if words is None else [int(each == word) for each in words]

    return flags


def _rotation(kind: str, key: str, assumed: float) -> Callable[[Get], float]:
    """A rotary parameter of one type of layer; config.json may have one set of parameters for all layers."""

    def found(get: Get) -> float:
        params = get("rope_parameters")
        of_kind = params.get(kind, params) if isinstance(params, dict) else {}
        return of_kind.get(key, assumed) if isinstance(of_kind, dict) else assumed

    return found


MIMO_V2_FLASH = moe_row(
    "mimo_v2_flash",
    "MiMoV2FlashForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e6,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.334},
            },
            "head_dim": 192,
            "v_head_dim": 128,
            "attention_value_scale": 0.707,
            "max_position_embeddings": 131072,
            "attention_bias": False,
            "sliding_window": 129,
            "layer_types": None,
            "mlp_layer_types": None,
            "moe_intermediate_size": 2048,
            **{k: v for k, v in SIGMOID.items() if k != "n_shared_experts"},
        }
    ),
    tensors=Tensors(
        BLOCK
        | QKV_BIAS
        | {"attention.sinks": LAYER + "self_attn.attention_sink_bias"}
        | MLP_ROUTER
        | CORRECTION
        | MLP_EXPERTS
        | DENSE_FFN,
        optional=frozenset(SINKS),
        float32=frozenset({"router.correction"}),
        sizes=MIMO_SIZES,
    ),
    attention=Attention(rope="per_type", partial=1.0, sliding=sliding.ALL_BUT_LAST_OF_SIX),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        placement=placement.WORDS_FIRST_DENSE,
        routing=GROUPED,
    ),
    prediction=Prediction(names=_MIMO_MTP, prefix="model.mtp.", slides=True),
    elsewhere=Elsewhere(
        keys=NO_AUX_LOSS
        | {
            "layernorm_epsilon": "=rms_norm_eps",
            "rope_theta": _rotation("full_attention", "rope_theta", 5e6),
            "partial_rotary_factor": _rotation("full_attention", "partial_rotary_factor", 1.0),
            "swa_rope_theta": _rotation("sliding_attention", "rope_theta", 1e4),
            "swa_num_attention_heads": "=num_attention_heads",
            "swa_num_key_value_heads": lambda get: 2 * get("num_key_value_heads"),
            "swa_head_dim": "=head_dim",
            "swa_v_head_dim": "=v_head_dim",
            "sliding_window_size": lambda get: get("sliding_window") - 1,
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "attention_value_scale": "=attention_value_scale",
            "hybrid_layer_pattern": _per_layer("layer_types", "sliding_attention"),
            "moe_layer_freq": _per_layer("mlp_layer_types", "sparse"),
        },
        nulls=frozenset({"n_shared_experts"}),
        # llama.cpp's converter looks for partial_rotary_factor here, where parameters per type of layer lack it
        implied=frozenset({"rope_parameters"}),
        runs=frozenset({"vllm", "llama.cpp"}),
    ),
)

# the class is code in the checkpoints: Qwen2's block, and prediction layers with the prefix "model.mtp_layers."
MIMO = replace(
    QWEN2,
    model_type="mimo",
    architecture="MiMoForCausalLM",
    config=ConfigKeys(
        {**QWEN2.config.defaults, "head_dim": None, "attention_bias": True, "use_mrope": False,
         "num_nextn_predict_layers": 0},
        neutral={"attention_bias": (True,), "use_mrope": (False,), "num_nextn_predict_layers": tuple(range(MAX_MTP))},
    ),
    prediction=Prediction(
        {
            "mtp.norm_embedding": LAYER + "token_layernorm.weight",
            "mtp.norm_hidden": LAYER + "hidden_layernorm.weight",
            "mtp.project": LAYER + "input_proj.weight",
            "mtp.norm": LAYER + "final_layernorm.weight",
        },
        prefix="model.mtp_",
    ),
    runs_as=Pair("mimo", "qwen2"),
)  # fmt: skip

VENDOR = Vendor(
    dense=(MIMO,),
    moe=(MIMO_V2_FLASH,),
)
