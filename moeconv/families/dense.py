"""The dense families, a row each. Config defaults are those of transformers' configuration classes (5.23)."""

from __future__ import annotations

from typing import Any

from moeconv.families.sliding import LAYER_TYPES, WINDOW_KEY
from moeconv.families.spec import Family

_LAYER = "model.layers.{L}."

# The decoder block that Llama made common: pre-norm RMSNorm, separate q, k, v, o.
BLOCK = {
    "embedding.tokens": "model.embed_tokens.weight",
    "embedding.lm_head": "lm_head.weight",
    "norm.final": "model.norm.weight",
    "norm.attention": _LAYER + "input_layernorm.weight",
    "norm.ffn": _LAYER + "post_attention_layernorm.weight",
    "attention.q": _LAYER + "self_attn.q_proj.weight",
    "attention.k": _LAYER + "self_attn.k_proj.weight",
    "attention.v": _LAYER + "self_attn.v_proj.weight",
    "attention.o": _LAYER + "self_attn.o_proj.weight",
}
QKV_BIAS = {f"attention.{p}_bias": _LAYER + f"self_attn.{p}_proj.bias" for p in "qkv"}
O_BIAS = {"attention.o_bias": _LAYER + "self_attn.o_proj.bias"}
QK_NORM = {f"attention.{p}_norm": _LAYER + f"self_attn.{p}_norm.weight" for p in "qk"}
DENSE_FFN = {f"ffn.{p}": _LAYER + f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
FFN_BIAS = {f"ffn.{p}_bias": _LAYER + f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")}
ROTARY_BUFFERS = (_LAYER + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

BASE_CONFIG: dict[str, Any] = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": "=num_attention_heads",
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_QWEN_SLIDING = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    kind="dense",
    tensors=BLOCK | QKV_BIAS | O_BIAS | DENSE_FFN | FFN_BIAS,
    optional=frozenset({"embedding.lm_head", *QKV_BIAS, *O_BIAS, *FFN_BIAS}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG | {"head_dim": None, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    neutral={"attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1, None)},
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    kind="dense",
    tensors=BLOCK | DENSE_FFN,
    optional=frozenset({"embedding.lm_head"}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG
    | {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "sliding_window": 4096},
    sliding=WINDOW_KEY,
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    kind="dense",
    tensors=BLOCK | QKV_BIAS | DENSE_FFN,
    optional=frozenset({"embedding.lm_head"}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG | {"num_key_value_heads": 32, "max_position_embeddings": 32768} | _QWEN_SLIDING,
    sliding=LAYER_TYPES,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    kind="dense",
    tensors=BLOCK | QK_NORM | QKV_BIAS | O_BIAS | DENSE_FFN,
    optional=frozenset({"embedding.lm_head", *QKV_BIAS, *O_BIAS}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG
    | {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "attention_bias": False}
    | _QWEN_SLIDING,
    sliding=LAYER_TYPES,
)

DENSE: dict[str, Family] = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3)}
