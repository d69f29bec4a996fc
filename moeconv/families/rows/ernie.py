"""Baidu: ERNIE 4.5."""

from __future__ import annotations

from moeconv.families import placement
from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, FFN_BIAS, LAYER, dense_row
from moeconv.families.expert_blocks import EVERY_ENGINE, MLP_EXPERTS, MLP_ROUTER, ROUTER_LOSS, SHARED_EXPERTS, moe_row
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Prediction, Routing, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor
from moeconv.types import JsonObject

ERNIE4_5 = dense_row(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "head_dim": 128,
            "use_bias": False,
        },
        neutral={"use_bias": (False,)},
    ),
    tensors=Tensors(BLOCK | ATTENTION_BIAS | DENSE_FFN | FFN_BIAS),
    attention=Attention(rotary="interleaved"),
)
_ERNIE_MTP = {
    "mtp.norm_embedding": "model.emb_norm.{L}.weight",
    "mtp.norm_hidden": "model.hidden_norm.{L}.weight",
    "mtp.project": "model.linear_proj.{L}.weight",
}
ERNIE4_5_MOE = moe_row(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "head_dim": None,
            "use_bias": False,
            "moe_intermediate_size": 1536,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": None,
            "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
            **ROUTER_LOSS,
        }
    ),
    tensors=Tensors(
        BLOCK
        | MLP_ROUTER
        | {"router.correction_row": LAYER + "mlp.moe_statics.e_score_correction_bias"}
        | MLP_EXPERTS
        | SHARED_EXPERTS
        | DENSE_FFN,
        optional=frozenset(SHARED_EXPERTS),
        float32=frozenset({"router.weight", "router.correction_row"}),
    ),
    attention=Attention(rotary="interleaved"),
    experts=Experts(
        count=("moe_num_experts",),
        top_k=("moe_k",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "moe_num_shared_experts"),
        placement=placement.RANGE,
        routing=Routing("softmax", "always", float32=True),
    ),
    prediction=Prediction(names=_ERNIE_MTP, prefix="model.mtp_", layers="block."),
    elsewhere=Elsewhere(runs=EVERY_ENGINE),
)

_ERNIE: JsonObject = {"moe_num_shared_experts": 0, "use_bias": False, "moe_norm_min": 1e-12}

VENDOR = Vendor(
    dense=(ERNIE4_5,),
    moe=(ERNIE4_5_MOE,),
    pairs=(
        Pair("llama", "ernie4_5_moe", note="rotary order", config=_ERNIE),
        Pair("ernie4_5", "ernie4_5_moe", default=True, config=_ERNIE),
    ),
)
