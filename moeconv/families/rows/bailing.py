"""inclusionAI: Ling and Ring. The class of Ling 1.5 and 2.0 is code in their checkpoints.

Sources: the configurations and modelling code that inclusionAI publishes with its models (Ling, Ling-V2), and the
classes of vLLM (bailing_moe).
"""

from __future__ import annotations

from moeconv.families import placement
from moeconv.families.blocks import DENSE_FFN, LAYER, WITHOUT_QKVO
from moeconv.families.expert_blocks import MLP_EXPERTS, MLP_ROUTER, SHARED_EXPERTS, moe_row
from moeconv.families.records import WHOLE, Attention, ConfigKeys, Elsewhere, Experts, Remote, Routing, Tensors
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

VENDOR = Vendor(
    moe=(BAILING_MOE, BAILING_MOE_V2),
)
