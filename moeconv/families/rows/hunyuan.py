"""Tencent: HunYuan V1."""

from __future__ import annotations

from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, LAYER, NO_BIAS, O_BIAS, QKV_BIAS, dense_row
from moeconv.families.expert_blocks import MLP_EXPERTS, SHARED_MLP, ZERO_SHARED_FULL, moe_row
from moeconv.families.spec import Pair, Routing
from moeconv.families.vendor import Vendor

# HunYuan normalises queries and keys after the rotation, the others before it
QK_LAYERNORM = {
    f"attention.{p}_norm_after_rope": LAYER + f"self_attn.{w}_layernorm.weight"
    for p, w in (("q", "query"), ("k", "key"))
}
HUNYUAN = dense_row(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "eod_token_id": 3,
    },
    tensors=BLOCK | ATTENTION_BIAS | QK_LAYERNORM | DENSE_FFN,
    neutral=NO_BIAS | {"pretraining_tp": (1, None)},
)
HUNYUAN_MOE = moe_row(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "head_dim": None,
        "attention_bias": False,
        "eod_token_id": 3,
        "output_router_logits": False,
    },
    BLOCK
    | QKV_BIAS
    | O_BIAS
    | QK_LAYERNORM
    | {"router.weight": LAYER + "mlp.gate.wg.weight"}
    | MLP_EXPERTS
    | SHARED_MLP,
    num_experts=("num_experts",),
    top_k=("moe_topk",),
    shared_width=("intermediate_size",),
    routing=Routing("softmax", "always", float32=True),
    float32=frozenset({"router.weight"}),
)

VENDOR = Vendor(
    dense=(HUNYUAN,),
    moe=(HUNYUAN_MOE,),
    pairs=(Pair("hunyuan_v1_dense", "hunyuan_v1_moe", default=True, note=ZERO_SHARED_FULL),),
)
