"""Rhymes AI: Aria."""

from __future__ import annotations

from moeconv.families import folds
from moeconv.families.blocks import BLOCK, LAYER, O_BIAS, QKV_BIAS
from moeconv.families.expert_blocks import SHARED_EXPERTS, ZERO_SHARED_FULL, moe_row
from moeconv.families.records import ConfigKeys, Elsewhere, Experts, Packed, Routing, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor, Wrapper

ARIA_TEXT = moe_row(
    "aria_text",
    "AriaTextForCausalLM",
    config=ConfigKeys(
        {
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "moe_num_shared_experts": 2,
        }
    ),
    tensors=Tensors(
        BLOCK
        | QKV_BIAS
        | O_BIAS
        | {
            "router.weight": LAYER + "mlp.router.weight",
            "expert.gate_up": LAYER + "mlp.experts.fc1.weight",
            "expert.down": LAYER + "mlp.experts.fc2.weight",
        }
        | SHARED_EXPERTS,
        packed={
            "expert.gate_up": Packed(("gate", "up"), transposed=True),
            "expert.down": Packed(("down",), transposed=True),
        },
    ),
    experts=Experts(
        count=("moe_num_experts",),
        top_k=("moe_topk",),
        shared_width=("intermediate_size", "moe_num_shared_experts"),
        routing=Routing("softmax_topk", "always"),
    ),
    elsewhere=Elsewhere(runs_not=frozenset({"llama.cpp"})),
)

VENDOR = Vendor(
    moe=(ARIA_TEXT,),
    pairs=(
        Pair(
            "llama", "aria_text", note=ZERO_SHARED_FULL, config={"moe_num_shared_experts": 1}, folds=(folds.only_silu,)
        ),
    ),
    wrappers=(
        Wrapper(
            "aria",
            "AriaForConditionalGeneration",
            (ARIA_TEXT,),
            {"vision_tower.": "vision", "multi_modal_projector.": "vision"},
            prefix="language_model.model.",
            head="language_model.lm_head.",
            runs=frozenset({"vllm"}),
        ),
    ),
)
