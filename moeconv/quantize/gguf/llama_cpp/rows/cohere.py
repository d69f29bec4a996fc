"""Cohere: Command R and its successors."""

from __future__ import annotations

from moeconv.families.model import Model
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.numbers import SIGMOID, SOFTMAX, always, leading_dense, window, window_pattern
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp, Number

_NUMBERS: dict[str, Number] = {
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.layer_norm_rms_epsilon": always(None),
    "logit_scale": "logit_scale",
    "rope.scaling.type": always("none"),
}
_WINDOWS: dict[str, Number] = {
    "attention.sliding_window": window,
    "attention.sliding_window_pattern": window_pattern,
}
_PLAIN = frozenset({"default"})


def _scores(model: Model) -> int:
    return SIGMOID if model.value("expert_selection_fn") == "sigmoid" else SOFTMAX


def _dense_layers_rotate(model: Model) -> str | None:
    """llama.cpp rotates all dense layers, and of the others those with a window."""
    if leading_dense(model) and model.value("prefix_dense_sliding_window_pattern") != 1:
        return "dense layers without a rotary embedding (prefix_dense_sliding_window_pattern)"
    return None


def _shared(model: Model) -> int | None:
    return model.value("num_shared_experts") or None


ROWS = {
    "cohere": LlamaCpp(
        "command-r",
        needs={"use_qk_norm": (False,), "attention_bias": (False,)},
        numbers=_NUMBERS,
        rope=_PLAIN,
    ),
    "cohere2": LlamaCpp(
        "cohere2",
        needs={"attention_bias": (False,)},
        numbers=_NUMBERS | _WINDOWS,
        rope=_PLAIN,
        sliding=frozenset({"mixed", "all"}),
    ),
    "cohere2_moe": LlamaCpp(
        "cohere2moe",
        names=layer({"router.correction": ""}),
        needs={"attention_bias": (False,), "norm_topk_prob": (True,),
               "shared_expert_combination_strategy": ("average",)},
        checks=(_dense_layers_rotate,),
        numbers=_NUMBERS | _WINDOWS | {
            "attention.layer_norm_rms_epsilon": "rms_norm_eps",  # an RMSNorm where it is stated
            "expert_gating_func": _scores,
            "expert_feed_forward_length": "intermediate_size",
            "feed_forward_length": lambda model: model.ffn_width,
            "leading_dense_block_count": leading_dense,
            "expert_weights_norm": "norm_topk_prob",
            "expert_shared_count": _shared,
            "expert_shared_feed_forward_length": lambda model: (_shared(model) or 0) * model.expert_width or None,
        },
        rope=_PLAIN,
        sliding=frozenset({"mixed", "all"}),
        dense_layers="first",
    ),
}  # fmt: skip
