"""inclusionAI: Ling and Ring 1.5, 2.0 (whose classes are code in their checkpoints), and 3.0.

Sources: the configurations and modelling code that inclusionAI publishes with its models (Ling, Ling-V2), and the
classes of vLLM (bailing_moe).
"""

from __future__ import annotations

from typing import Any

from moeconv.families import placement
from moeconv.families.blocks import DENSE_FFN, FULL_LAYERS, LAYER, MLA, MLA_CONFIG, WITHOUT_QKVO
from moeconv.families.expert_blocks import GROUPED, MLP_EXPERTS, MLP_ROUTER, MTP, SHARED_EXPERTS, SIGMOID, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import (
    WHOLE,
    Attention,
    ConfigKeys,
    Elsewhere,
    Experts,
    Layers,
    Prediction,
    Remote,
    Routing,
    Tensors,
)
from moeconv.families.shapes import Place, config_key
from moeconv.families.vendor import Vendor
from moeconv.types import JsonObject

_ATTENTION = LAYER + "attention."
_TENSORS = {
    **WITHOUT_QKVO,
    "embedding.tokens": "model.word_embeddings.weight",
    "attention.qkv": _ATTENTION + "query_key_value.weight",
    "attention.qkv_bias": _ATTENTION + "query_key_value.bias",
    "attention.o": _ATTENTION + "dense.weight",
    "attention.o_bias": _ATTENTION + "dense.bias",
    **MLP_ROUTER,
    **MLP_EXPERTS,
    **SHARED_EXPERTS,
    **DENSE_FFN,
}
_FUSED = {
    "attention.qkv": ("attention.q", "attention.k", "attention.v"),
    "attention.qkv_bias": ("attention.q_bias", "attention.k_bias", "attention.v_bias"),
}
_SHARED = {"num_shared_experts": tuple(SHARED_EXPERTS)}
_CONFIG: JsonObject = {
    "head_dim": None,
    "use_bias": False,
    "use_qkv_bias": False,
    "first_k_dense_replace": 0,
    "num_shared_experts": 0,
    "norm_topk_prob": True,
    "output_router_logits": False,
    "partial_rotary_factor": 1.0,
}
_BIASES = {"use_bias": ((False,), "biases in the experts have no place in this row")}

BAILING_MOE = moe_row(
    "bailing_moe",
    "BailingMoeForCausalLM",
    config=ConfigKeys(
        _CONFIG | {"rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "moe_intermediate_size": None},
        kinds={"moe_intermediate_size": WHOLE},
        only=_BIASES,
    ),
    tensors=Tensors(_TENSORS, fused=_FUSED, optional=frozenset(SHARED_EXPERTS), switched=_SHARED),
    attention=Attention(partial=1.0),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "num_shared_experts"),
        placement=placement.FIRST_K,
        routing=Routing("softmax", "norm_topk_prob"),
    ),
    elsewhere=Elsewhere(runs=frozenset({"vllm", "sglang", "llama.cpp"})),
    remote=Remote(),
)
# the class of Sarvam's 30B has its layout and its computation
BAILING_MOE_V2 = moe_row(
    "bailing_moe_v2",
    "BailingMoeV2ForCausalLM",
    config=ConfigKeys(
        _CONFIG
        | {
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rope_theta": 600000.0,
            "moe_intermediate_size": 512,
            "first_k_dense_replace": 1,
            "num_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": True,
            "score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "num_nextn_predict_layers": 0,
        },
        only=_BIASES
        | {
            "score_function": (("sigmoid",), "the router would weigh the experts in another way"),
            "moe_router_enable_expert_bias": ((True,), "the router would have no correction bias"),
            "num_nextn_predict_layers": ((0, None), "the names of its prediction layers are not known"),
        },
    ),
    tensors=Tensors(
        _TENSORS
        | {
            "attention.q_norm": _ATTENTION + "query_layernorm.weight",
            "attention.k_norm": _ATTENTION + "key_layernorm.weight",
            "router.correction": LAYER + "mlp.gate.expert_bias",
        },
        fused=_FUSED,
        optional=frozenset({*SHARED_EXPERTS, "attention.q_norm", "attention.k_norm"}),
        switched=_SHARED | {"use_qk_norm": ("attention.q_norm", "attention.k_norm")},
        float32=frozenset({"router.correction"}),
        in_memory={
            ".attention.": ".self_attn.",
            ".query_key_value": (".q_proj", ".k_proj", ".v_proj"),
            ".self_attn.dense": ".self_attn.o_proj",
        },
    ),
    attention=Attention(partial=1.0),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "num_shared_experts"),
        placement=placement.FIRST_K,
        routing=Routing(
            "sigmoid", "norm_topk_prob", scaling="routed_scaling_factor", groups=("n_group", "topk_group"), float32=True
        ),
    ),
    elsewhere=Elsewhere(runs=frozenset({"vllm", "sglang", "llama.cpp"})),
    remote=Remote(like="sarvam_moe"),
)

_FULL, _LINEAR = "full_attention", "linear_attention"


def _kinds(get: Get, layers: int) -> list[str]:
    """The kind of each layer: full attention at the end of every group of layers, if config.json does not list them."""
    every = get("layer_group_size")
    return get("layer_types") or [_FULL if (i + 1) % every == 0 else _LINEAR for i in range(layers)]


def _is_full(get: Get, place: Place) -> bool:
    """Whether a layer has full attention, as prediction layers have."""
    kinds = _kinds(get, get("num_hidden_layers"))
    return place.layer is None or place.layer >= len(kinds) or kinds[place.layer] == _FULL


def _delta(get: Get, _place: Place) -> Any:
    return get("num_attention_heads") * get("head_dim")


def _query_rows(get: Get, place: Place) -> Any:
    latent = get("num_attention_heads") * (get("qk_nope_head_dim") + get("qk_rope_head_dim"))
    return latent if _is_full(get, place) else _delta(get, place)


def _output_columns(get: Get, place: Place) -> Any:
    return get("num_attention_heads") * get("v_head_dim") if _is_full(get, place) else _delta(get, place)


def _gates(get: Get, place: Place) -> Any:
    return get("num_attention_heads") if _is_full(get, place) else _delta(get, place)


_LATENT_ATTENTION = ("kv_a", "kv_a_norm", "kv_b")
_DELTA = {
    f"linear.{key}": _ATTENTION + name
    for key, name in (
        ("k", "k_proj.weight"), ("v", "v_proj.weight"), ("q_conv", "q_conv1d.weight"), ("k_conv", "k_conv1d.weight"),
        ("v_conv", "v_conv1d.weight"), ("decay", "f_proj.weight"), ("A", "A_log"), ("dt", "dt_bias"),
        ("beta", "b_proj.weight"), ("norm", "o_norm.weight"),
    )
}  # fmt: skip
BAILING_HYBRID = moe_row(
    "bailing_hybrid",
    "BailingHybridForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | {
            "num_key_value_heads": 32,
            "q_lora_rank": None,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_theta": 6e6,
            "moe_intermediate_size": 768,
            "first_k_dense_replace": 2,
            "mlp_layer_types": None,
            "layer_types": None,
            "layer_group_size": 6,
            "short_conv_kernel_size": 4,
            "kda_safe_gate": True,
            "kda_lower_bound": -5.0,
            "num_nextn_predict_layers": 1,
            **SIGMOID,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
        },
        words={
            "max_position_embeddings": "model_max_length",
            "norm_topk_prob": "moe_renormalize",
            "n_group": "num_expert_group",
            "n_shared_experts": "num_shared_experts",
        },
        kinds={"q_lora_rank": WHOLE},
        only={"q_lora_rank": ((None,), "the queries of its full-attention layers then have another form")},
    ),
    tensors=Tensors(
        WITHOUT_QKVO
        | {
            "embedding.tokens": "model.word_embeddings.weight",
            "attention.q_whole": _ATTENTION + "q_proj.weight",
            "attention.o": _ATTENTION + "dense.weight",
            "attention.gate": _ATTENTION + "g_proj.weight",
            **{
                f"attention.{key}": MLA[f"attention.{key}"].replace("self_attn", "attention")
                for key in _LATENT_ATTENTION
            },
            **_DELTA,
            "router.correction": LAYER + "mlp.gate.expert_bias",
        }
        | MLP_ROUTER
        | MLP_EXPERTS
        | SHARED_EXPERTS
        | DENSE_FFN,
        float32=frozenset({"router.weight", "router.correction", "linear.dt", "linear.A"}),
        in_memory={
            ".attention.": ".self_attn.",
            ".self_attn.f_proj": ".self_attn.forget_gate.f_proj",
            ".self_attn.dense": ".self_attn.o_proj",
        },
        shapes={
            "attention.q_whole": "query_rows, hidden", "attention.o": "hidden, output_columns",
            "attention.gate": "gates, hidden", "linear.k": "delta, hidden", "linear.v": "delta, hidden",
            "linear.q_conv": "delta, 1, linear_kernel", "linear.k_conv": "delta, 1, linear_kernel",
            "linear.v_conv": "delta, 1, linear_kernel", "linear.decay": "delta, hidden", "linear.A": "heads",
            "linear.dt": "delta", "linear.beta": "heads, hidden", "linear.norm": "head",
        },
        sizes={
            "query_rows": _query_rows, "output_columns": _output_columns, "gates": _gates, "delta": _delta,
            "linear_kernel": config_key("short_conv_kernel_size"),
        },
    ),
    attention=Attention(rope="plain"),
    layers=Layers(
        kinds=_kinds,
        where={
            "linear": frozenset({_LINEAR}),
            **dict.fromkeys((f"attention.{key}" for key in _LATENT_ATTENTION), FULL_LAYERS),
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
    # as the class of vLLM (bailing_moe_v3_mtp) reads them
    prediction=Prediction({**MTP.names, "mtp.norm_last": LAYER + "final_layernorm.weight"}),
    elsewhere=Elsewhere(
        # it takes the plain kernels that it joins into one for packed weights too (5.24)
        not_loaded=frozenset({"compressed-tensors"}),
        runs=frozenset({"vllm"}),
    ),
)  # fmt: skip

VENDOR = Vendor(
    moe=(BAILING_MOE, BAILING_MOE_V2, BAILING_HYBRID),
)
