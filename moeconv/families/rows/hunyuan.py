"""Tencent: HunYuan V1."""

from __future__ import annotations

from collections.abc import Callable

from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, LAYER, NO_BIAS, O_BIAS, QKV_BIAS, dense_row
from moeconv.families.expert_blocks import EVERY_ENGINE, MLP_EXPERTS, SHARED_MLP, ZERO_SHARED_FULL, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import ConfigKeys, Elsewhere, Experts, Routing, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor

# HunYuan normalises queries and keys after the rotation, other families before it
QK_LAYERNORM = {
    f"attention.{p}_norm_after_rope": LAYER + f"self_attn.{w}_layernorm.weight"
    for p, w in (("q", "query"), ("k", "key"))
}
HUNYUAN = dense_row(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-5,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "eod_token_id": 3,
        },
        neutral=NO_BIAS | {"pretraining_tp": (1, None)},
    ),
    tensors=Tensors(BLOCK | ATTENTION_BIAS | QK_LAYERNORM | DENSE_FFN),
)


def _each_layer(value: Callable[[Get], int]) -> Callable[[Get], list[int]]:
    return lambda get: [value(get)] * get("num_hidden_layers")


HUNYUAN_MOE = moe_row(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-5,
            "head_dim": None,
            "attention_bias": False,
            "eod_token_id": 3,
            "output_router_logits": False,
        }
    ),
    tensors=Tensors(
        BLOCK
        | QKV_BIAS
        | O_BIAS
        | QK_LAYERNORM
        | {"router.weight": LAYER + "mlp.gate.wg.weight"}
        | MLP_EXPERTS
        | SHARED_MLP,
        float32=frozenset({"router.weight"}),
    ),
    experts=Experts(
        count=("num_experts",),
        top_k=("moe_topk",),
        shared_width=("intermediate_size",),
        routing=Routing("softmax", "always", float32=True),
    ),
    elsewhere=Elsewhere(
        keys={
            "moe_intermediate_size": _each_layer(lambda get: get("intermediate_size")),
            "num_shared_expert": _each_layer(lambda _get: 1),
            "use_qk_norm": True,
            "use_mixed_mlp_moe": True,
        },
        per_layer=frozenset({"moe_topk"}),
        runs=EVERY_ENGINE,
    ),
)

VENDOR = Vendor(
    dense=(HUNYUAN,),
    moe=(HUNYUAN_MOE,),
    pairs=(Pair("hunyuan_v1_dense", "hunyuan_v1_moe", default=True, note=ZERO_SHARED_FULL),),
)
