"""Google: Gemma and Gemma 4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moeconv.families.model import Model
from moeconv.families.placement import Get
from moeconv.quantize.gguf.llama_cpp.changes import plus_one
from moeconv.quantize.gguf.llama_cpp.expression import Expression
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.numbers import always, window, window_pattern
from moeconv.quantize.gguf.llama_cpp.record import Constant, LlamaCpp
from moeconv.quantize.gguf.llama_cpp.rope import rope_of

_GELU = ("gelu_pytorch_tanh",)
_STILL = 1e30  # divides the frequencies of pairs that do not rotate


def _tied(model: Model) -> str | None:
    untied = model.own_head or not model.value("tie_word_embeddings")
    return "an output head that is not the token embedding" if untied else None


def _full_head(model: Model) -> int:
    """Rows of a head in the layers without a window."""
    return _rows(model, slides=False) or model.value("head_dim")


def _rows(model: Model, *, slides: bool) -> int:
    """Rows of a head in the first layer with or without a window, by the norm of its queries; 0 if there is none."""
    tensors, name = model.checkpoint.tensors, model.family.name
    layers = (at for at, word in enumerate(model.sliding.layers) if word == slides)
    return next((tensors[name("attention.q_norm", layer=at)].shape[0] for at in layers), 0)


def _kv_heads(model: Model) -> int | list[int]:
    tensors, name = model.checkpoint.tensors, model.family.name
    found = []
    for at in range(model.num_layers):
        head = tensors[name("attention.q_norm", layer=at)].shape[0]
        found.append(tensors[name("attention.k", layer=at)].shape[0] // head)
    return found[0] if len(set(found)) == 1 and model.value("num_global_key_value_heads") is None else found


def _window_head(model: Model) -> int:
    return _rows(model, slides=True) or model.value("head_dim")


def _window_theta(model: Model) -> float:
    found = (model.value("rope_parameters") or {}).get("sliding_attention") or {}
    return float(found.get("rope_theta", 10000.0))


def _windows_rotate_fully(model: Model) -> str | None:
    found = (model.value("rope_parameters") or {}).get("sliding_attention") or {}
    plain = found.get("rope_type", "default") == "default" and found.get("partial_rotary_factor", 1.0) == 1.0
    return None if plain else "scaled or partial rotary embeddings in layers with a window"


def _still_pairs(model: Model) -> Iterator[Constant]:
    """The pairs of a head that rotate in layers without a window, and those that do not."""
    half = _full_head(model) // 2
    turning = int(_full_head(model) * float(rope_of(model).get("partial_rotary_factor") or 1.0) / 2)
    yield Constant("rope_freqs.weight", (1.0,) * turning + (_STILL,) * (half - turning))


_NAMES_4 = layer(
    {
        "norm.layer": "layer_output_scale.weight", "norm.post_attention": "post_attention_norm.weight",
        "norm.post_ffn": "post_ffw_norm.weight", "norm.router": "ffn_gate_inp.scale",
        "router.scale": "ffn_down_exps.scale", "norm.post_shared": "post_ffw_norm_1.weight",
        "norm.post_experts": "post_ffw_norm_2.weight", "expert.gate_up": "ffn_gate_up_exps.weight",
        # with experts, the dense FFN beside them is what other families call the shared expert
        **{f"shared.{p}": f"ffn_{p}.weight" for p in ("gate", "up", "down")},
        "norm.shared": "ffn_norm.weight",
    }
)  # fmt: skip


def _norm_of_experts(get: Get, part: Expression) -> Mapping[str, Expression]:
    return {"blk.{L}.pre_ffw_norm_2.weight" if get("enable_moe_block") else "": part}


ROWS = {
    "gemma": LlamaCpp(
        "gemma",
        names={"embedding.lm_head": ""},
        changes=dict.fromkeys(("norm.attention", "norm.ffn", "norm.final"), plus_one),
        needs={"hidden_activation": (None, *_GELU), "use_bidirectional_attention": (None, False),
               "attention_bias": (False,)},
        checks=(_tied,),
        activations=_GELU,
    ),
    "gemma4_text": LlamaCpp(
        "gemma4",
        names=_NAMES_4,
        changes={"norm.ffn": _norm_of_experts},
        constants=_still_pairs,
        needs={"hidden_size_per_layer_input": (0, None), "num_kv_shared_layers": (0, None), "attention_bias": (False,),
               "use_double_wide_mlp": (False, None)},
        checks=(_windows_rotate_fully,),
        numbers={
            "attention.key_length": _full_head,
            "attention.value_length": _full_head,
            "attention.key_length_swa": _window_head,
            "attention.value_length_swa": _window_head,
            "attention.head_count_kv": _kv_heads,
            "attention.sliding_window": window,
            "attention.sliding_window_pattern": window_pattern,
            "attention.shared_kv_layers": always(0),
            "embedding_length_per_layer_input": always(0),
            "expert_feed_forward_length": lambda model: model.expert_width if model.num_experts else None,
            "final_logit_softcapping": "final_logit_softcapping",
            "rope.dimension_count": _full_head,
            "rope.dimension_count_swa": _window_head,
            "rope.freq_base_swa": _window_theta,
        },
        activations=_GELU,
        rope=frozenset({"proportional"}),
        sliding=frozenset({"mixed"}),
    ),
}  # fmt: skip
