"""rednote: dots.llm1."""

from __future__ import annotations

from moeconv.quantize.gguf.llama_cpp.numbers import SIGMOID, always, leading_dense
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp, Number

NO_GROUPS: dict[str, tuple[object, ...]] = {"n_group": (1, None), "topk_group": (1, None)}
# the keys of families whose experts are DeepSeek's: shared ones, scaled sums, leading dense layers
DEEPSEEK_NUMBERS: dict[str, Number] = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": leading_dense,
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
SIGMOID_SCORES: dict[str, Number] = {"expert_gating_func": always(SIGMOID)}

ROWS = {
    "dots1": LlamaCpp(
        "dots1",
        needs=NO_GROUPS | {"attention_bias": (False,)},
        numbers=DEEPSEEK_NUMBERS | SIGMOID_SCORES,
        dense_layers="first",
        grouped_query=False,
    ),
}
