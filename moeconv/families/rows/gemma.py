"""Google: Gemma and Gemma 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moeconv.families import folds, placement, sliding
from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, LAYER, NO_BIAS, QK_NORM, dense_row
from moeconv.families.expert_blocks import GATE_UP_PACKED, moe_row, served_below
from moeconv.families.placement import Get
from moeconv.families.records import (
    NUMBER,
    OBJECT,
    WHOLE,
    WORD,
    Attention,
    ConfigKeys,
    Elsewhere,
    Experts,
    Routing,
    Tensors,
)
from moeconv.families.shapes import Place, Size
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.types import JsonObject


def _in_layer(get: Get, place: Place, key: str) -> Any:
    """The value that config.json states for one layer only; None if it states none."""
    each = get("per_layer_config")
    of_layer = each.get(str(place.layer)) if isinstance(each, dict) else None
    return of_layer.get(key) if isinstance(of_layer, dict) else None


def _global_heads(get: Get, place: Place) -> Any:
    """The size of a layer's heads. Gemma 4's layers without a window have another size, which has two possible keys."""
    stated = place.slides or get("per_layer_config") is not None
    return _in_layer(get, place, "head_dim") or (get("head_dim") if stated else get("global_head_dim"))


def _global_kv(get: Get, place: Place) -> Any:
    stated = get("per_layer_config") is not None or place.slides or not get("attention_k_eq_v")
    apart = None if stated else get("num_global_key_value_heads")
    return _in_layer(get, place, "num_key_value_heads") or apart or get("num_key_value_heads")


def _in_full_layers(key: str, otherwise: str = "") -> Callable[[Get], Any]:
    """The value of a key that per_layer_config gives to every layer without a window, where it gives none to others.

    `otherwise` is the key with the value of layers for which it has none. The value is None if it differs between them.
    """

    def find(get: Get) -> Any:
        each, words = get("per_layer_config"), get("layer_types") or []
        full = [str(i) for i, word in enumerate(words) if word == "full_attention"]
        if not isinstance(each, dict) or not {str(layer) for layer in each} <= set(full):
            return None
        stated = ({str(layer): value for layer, value in each.items()}.get(layer) or {} for layer in full)
        found = [one.get(key, get(otherwise) if otherwise else None) for one in stated]
        return found[0] if found and all(value == found[0] for value in found) else None

    return find


# every other reader, and transformers before 5.24, knows these keys in place of per_layer_config
_GLOBAL: JsonObject = {
    "global_head_dim": _in_full_layers("head_dim", otherwise="head_dim"),
    "num_global_key_value_heads": _in_full_layers("num_key_value_heads"),
}
GEMMA4_SIZES: Mapping[str, Size] = {"head": _global_heads, "v_head": _global_heads, "kv": _global_kv}
GEMMA = dense_row(
    "gemma",
    "GemmaForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 16,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": None,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "use_bidirectional_attention": None,
        },
        kinds={"hidden_activation": WORD},
        neutral=NO_BIAS | {"use_bidirectional_attention": (None, False)},
    ),
    tensors=Tensors(BLOCK | ATTENTION_BIAS | DENSE_FFN, norm_offset=1.0),
)
# norms before and after both blocks; some full layers use their keys as values too
GEMMA4_BLOCK = (
    BLOCK
    | {
        "norm.post_attention": LAYER + "post_attention_layernorm.weight",
        "norm.ffn": LAYER + "pre_feedforward_layernorm.weight",
        "norm.post_ffn": LAYER + "post_feedforward_layernorm.weight",
        "norm.layer": LAYER + "layer_scalar",
    }
    | ATTENTION_BIAS
    | QK_NORM
)
GEMMA4_CONFIG: JsonObject = {
    "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 131072,
    "rope_theta": 1e6, "tie_word_embeddings": True, "attention_bias": False, "sliding_window": 512,
    "layer_types": None, "final_logit_softcapping": None, "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "attention_k_eq_v": False,
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "global_head_dim": None,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    "num_global_key_value_heads": None, "per_layer_config": None, "enable_moe_block": False, "num_experts": None,
    "top_k_experts": None, "moe_intermediate_size": None,
}  # fmt: skip
_GEMMA4_CONFIG = ConfigKeys(
    GEMMA4_CONFIG,
    kinds={
        "global_head_dim": WHOLE,
        "num_global_key_value_heads": WHOLE,
        "final_logit_softcapping": NUMBER,
        "per_layer_config": OBJECT,
    },
    words={"hidden_act": "hidden_activation"},
    only={
        "hidden_size_per_layer_input": ((0, None), "every layer reads the tokens again (per-layer inputs)"),
        "num_kv_shared_layers": ((0,), "the last layers attend to keys and values of layers before them"),
    },
)
_GEMMA4_ELSEWHERE = Elsewhere(keys=_GLOBAL, runs=frozenset({"vllm", "llama.cpp"}))
_GEMMA4_ATTENTION = Attention(sliding=sliding.FULL_AT_THE_END, rope="own", partial=1.0)
_GEMMA4_TENSORS = Tensors(GEMMA4_BLOCK | DENSE_FFN, optional=frozenset({"attention.v"}), sizes=GEMMA4_SIZES)
GEMMA4 = dense_row(
    "gemma4_text",
    "Gemma4ForCausalLM",
    config=_GEMMA4_CONFIG,
    tensors=_GEMMA4_TENSORS,
    attention=_GEMMA4_ATTENTION,
    elsewhere=_GEMMA4_ELSEWHERE,
    is_dense=lambda get: get("enable_moe_block") is False,
)
# the same language model without the settings that only Gemma 4's others have
_UNIFIED = {
    "vocab_size_per_layer_input", "hidden_size_per_layer_input", "enable_moe_block", "num_experts", "top_k_experts",
    "moe_intermediate_size",
}  # fmt: skip
GEMMA4_UNIFIED = replace(
    GEMMA4,
    model_type="gemma4_unified_text",
    architecture="Gemma4UnifiedForCausalLM",
    config=replace(
        _GEMMA4_CONFIG,
        defaults={key: value for key, value in GEMMA4.config.defaults.items() if key not in _UNIFIED}
        | {"max_position_embeddings": 262144, "sliding_window": 1024, "use_bidirectional_attention": "vision"},
        only={key: rule for key, rule in _GEMMA4_CONFIG.only.items() if key not in _UNIFIED},
    ),
    elsewhere=Elsewhere(keys=_GLOBAL),
    is_dense=None,
)
# the dense FFN beside the experts is treated as a shared expert that has its own norms
GEMMA4_TEXT = moe_row(
    "gemma4_text",
    "Gemma4ForCausalLM",
    config=_GEMMA4_CONFIG,
    tensors=replace(
        _GEMMA4_TENSORS,
        names=GEMMA4_BLOCK
        | {
            "norm.ffn": LAYER + "pre_feedforward_layernorm_2.weight",
            "norm.shared": LAYER + "pre_feedforward_layernorm.weight",
            "norm.post_shared": LAYER + "post_feedforward_layernorm_1.weight",
            "norm.post_experts": LAYER + "post_feedforward_layernorm_2.weight",
            "norm.router": LAYER + "router.scale",
            "router.weight": LAYER + "router.proj.weight",
            "router.scale": LAYER + "router.per_expert_scale",
            "expert.gate_up": LAYER + "experts.gate_up_proj",
            "expert.down": LAYER + "experts.down_proj",
        }
        | {key.replace("ffn.", "shared."): name for key, name in DENSE_FFN.items()},
        packed=GATE_UP_PACKED,
        served=served_below(LAYER),
        inert={"router.scale": 1.0, "norm.post_shared": 1.0, "norm.post_experts": 1.0},
    ),
    attention=_GEMMA4_ATTENTION,
    experts=Experts(
        count=("num_experts",),
        top_k=("top_k_experts",),
        width="moe_intermediate_size",
        dense_width="",  # its config cannot have dense layers and layers with experts
        shared_width=("intermediate_size",),
        placement=placement.switch("enable_moe_block"),
        routing=Routing("softmax", "always", scaled=True),
        routed_norm="norm.post_experts",
    ),
    elsewhere=_GEMMA4_ELSEWHERE,
)

VENDOR = Vendor(
    dense=(GEMMA, GEMMA4, GEMMA4_UNIFIED),
    moe=(GEMMA4_TEXT,),
    pairs=tuple(
        Pair(
            source,
            "gemma4_text",
            default=True,
            note="zero dense branch of 128 neurons, or the whole FFN in it (--shared-experts full)",
            config={"intermediate_size": 128} | beside,
            folds=(folds.second_branch,),
            tolerance=1e-3,
            unless="its FFNs give outputs whose variance is not well above rms_norm_eps, as those of tiny random "
            "models",
        )
        for source, beside in (("gemma4_text", {}), ("gemma4_unified_text", {"hidden_size_per_layer_input": 0}))
    ),
    wrappers=(
        Wrapper(
            "gemma4",
            "Gemma4ForConditionalGeneration",
            (GEMMA4, GEMMA4_TEXT),
            {
                "model.vision_tower.": "vision",
                "model.embed_vision.": "vision",
                "model.audio_tower.": "audio",
                "model.embed_audio.": "audio",
            },
            becomes="gemma4",
            tied=True,
            runs=frozenset({"vllm", "llama.cpp"}),
        ),
        Wrapper(
            "gemma4_unified",
            "Gemma4UnifiedForConditionalGeneration",
            (GEMMA4_UNIFIED,),
            {"model.vision_embedder.": "vision", "model.embed_vision.": "vision", "model.embed_audio.": "audio"},
            tied=True,
        ),
    ),
)
