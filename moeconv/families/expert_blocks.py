"""Building blocks of the Mixture-of-Experts rows: names of experts, routers and shared experts, and routing rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeconv.families.blocks import BASE_CONFIG, LAYER, completed
from moeconv.families.placement import Get
from moeconv.families.records import ConfigKeys, ExpertLayout, Experts, Packed, Prediction, Routing, Tensors
from moeconv.families.spec import Family
from moeconv.types import Config, JsonObject

# names of experts, routers and shared experts, as Mixtral, Qwen and DeepSeek established them
W_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
MLP_EXPERTS = {f"expert.{p}": LAYER + "mlp.experts.{E}." + f"{p}_proj.weight" for p in ("gate", "up", "down")}
_STACK = LAYER + "mlp.experts."
STACKED_NAMES = {"expert.gate_up": _STACK + "gate_up_proj", "expert.down": _STACK + "down_proj"}
GATE_UP_PACKED = {"expert.gate_up": Packed(("gate", "up")), "expert.down": Packed(("down",))}
SEPARATE = ExpertLayout(MLP_EXPERTS)
STACKED = ExpertLayout(STACKED_NAMES, GATE_UP_PACKED)
# separate experts below the module that stacks them in memory: the names under which vLLM reads codes
SEPARATE_PARTS = {f"expert.{p}": "experts.{E}." + f"{p}_proj.weight" for p in ("gate", "up", "down")}


def served_below(module: str) -> ExpertLayout:
    """The layout of separate experts below `module`, a name that ends with a dot."""
    return ExpertLayout({key: module + name for key, name in SEPARATE_PARTS.items()}, readers="vLLM")


MLP_ROUTER = {"router.weight": LAYER + "mlp.gate.weight"}
SPARSE_BLOCK = {"router.weight": LAYER + "block_sparse_moe.gate.weight"} | {
    f"expert.{p}": LAYER + "block_sparse_moe.experts.{E}." + f"{w}.weight" for p, w in W_NAMES.items()
}
SHARED_EXPERT = {f"shared.{p}": LAYER + f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")}
SHARED_GATE = {"shared.router": LAYER + "mlp.shared_expert_gate.weight"}
# config keys and their defaults
ROUTER_LOSS: JsonObject = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
LOSS_OFF: JsonObject = {"output_router_logits": False}
EXPERT_COUNT = ("num_local_experts", "num_experts")
TOP_K = ("num_experts_per_tok",)
SHARED_EXPERTS = {f"shared.{p}": LAYER + f"mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")}
SHARED_MLP = {f"shared.{p}": LAYER + f"mlp.shared_mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
CORRECTION = {"router.correction": LAYER + "mlp.gate.e_score_correction_bias"}
QKVO_BIAS = ("attention.q_bias", "attention.k_bias", "attention.v_bias", "attention.o_bias")
SIGMOID: JsonObject = {
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_shared_experts": 1,
    "output_router_logits": False,
}  # fmt: skip
GROUPED = Routing(
    "sigmoid", "norm_topk_prob", scaling="routed_scaling_factor", groups=("n_group", "topk_group"), float32=True
)
# the biases of a family whose config switch adds all four, at the value at which they have no effect
ZERO_QKVO_BIAS = dict.fromkeys(QKVO_BIAS, 0.0)
# multi-token-prediction layers whose numbers follow the last layer, as in checkpoints of DeepSeek-V3 and GLM-4.5
MTP = Prediction(
    {
        "mtp.embedding": LAYER + "embed_tokens.weight",
        "mtp.norm_embedding": LAYER + "enorm.weight",
        "mtp.norm_hidden": LAYER + "hnorm.weight",
        "mtp.project": LAYER + "eh_proj.weight",
        "mtp.norm": LAYER + "shared_head.norm.weight",
        "mtp.head": LAYER + "shared_head.head.weight",
    }
)
# multi-token-prediction layers with a prefix of their own: "mtp." replaces "model."
QWEN_MTP = Prediction(
    {
        "mtp.norm_embedding": "model.pre_fc_norm_embedding.weight",
        "mtp.norm_hidden": "model.pre_fc_norm_hidden.weight",
        "mtp.project": "model.fc.weight",
        "mtp.norm": "model.norm.weight",
    },
    prefix="mtp.",
)
# what a pair sets in a target with grouped routing and a shared expert, so that weights of identical experts sum to 1
ONE_SHARED_EXPERT: JsonObject = {
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
# notes of pairs
ZERO_SHARED_128 = "zero shared expert of 128 neurons: the family cannot be without one"
ZERO_SHARED_FULL = "zero shared expert as wide as a routed one: the family cannot be without one"
EVERY_ENGINE = frozenset({"vllm", "sglang", "llama.cpp"})
# without them vLLM and SGLang ignore the correction bias, and every reader except transformers scores by softmax
NO_AUX_LOSS: JsonObject = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def leading_dense(get: Get) -> int | None:
    """The number of dense layers before the first one with experts; None if a later layer is dense too."""
    words = get("mlp_layer_types")
    if words is None:
        return 1
    first = next((i for i, word in enumerate(words) if word == "sparse"), len(words))
    return first if "dense" not in words[first:] else None


def moe_row(
    model_type: str,
    architecture: str,
    *,
    config: ConfigKeys,
    tensors: Tensors,
    experts: Experts,
    base: Config = BASE_CONFIG,
    **row: Any,
) -> Family:
    """The row of a family with experts.

    `config` adds to the config keys of `base`. Biases and the output head are optional tensors. If `experts` has no
    keys for the number of experts and the experts per token, the usual keys are used. Raises TypeError for a keyword
    that is not a field of Family.
    """
    return Family(
        model_type,
        architecture,
        "moe",
        config=replace(config, defaults={**base, **config.defaults}),
        tensors=completed(tensors),
        experts=replace(experts, count=experts.count or EXPERT_COUNT, top_k=experts.top_k or TOP_K),
        **row,
    )
