"""Baidu: ERNIE 4.5."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.families.placement import Get
from moeconv.quantize.gguf.llama_cpp.expression import Expression
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.numbers import always, leading_dense
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp


def _row(_get: Get, part: Expression) -> Mapping[str, Expression]:
    return {"": part.reshape(-1)}


ROWS = {
    "ernie4_5": LlamaCpp("ernie4_5", needs={"use_bias": (False,)}),
    "ernie4_5_moe": LlamaCpp(
        "ernie4_5-moe",
        names=layer({"router.correction_row": "exp_probs_b.bias"}),
        changes={"router.correction_row": _row},
        needs={"use_bias": (False,), "moe_layer_interval": (1,)},
        numbers={
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "moe_num_shared_experts",
            "expert_shared_feed_forward_length": lambda model: model.shared_width or None,
            "leading_dense_block_count": leading_dense,
            "interleave_moe_layer_step": always(1),
        },
        dense_layers="first",
    ),
}
