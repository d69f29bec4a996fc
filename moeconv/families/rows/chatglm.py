"""Z.ai: ChatGLM2, ChatGLM3 and GLM-4 of 9B in their first form, whose class is code in their checkpoints."""

from __future__ import annotations

from typing import Any

from moeconv.families.blocks import FUSED_FFN, FUSED_QKV, FUSED_QKV_BIAS, NO_BIAS, dense_row
from moeconv.families.records import NUMBER, Attention, ConfigKeys, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor

_LAYER = "transformer.encoder.layers.{L}."
_KIND = "the block is not that of GLM"
# settings of training and of older blocks, and the values with which the block is GLM's
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "rmsnorm": ((True,), _KIND),
    "post_layer_norm": ((True,), _KIND),
    "add_bias_linear": ((False,), _KIND),
    "apply_residual_connection_post_layernorm": ((False,), _KIND),
    "multi_query_attention": ((True,), _KIND),
    "original_rope": ((True,), "only the rotation of ChatGLM2 and later models is known"),
    "pre_seq_len": ((None,), "a prefix is part of the prompt (P-Tuning)"),
    "quantization_bit": ((0, None), "the weights are quantized when they are loaded"),
}
# settings that change rounding or training alone
_IDLE: dict[str, Any] = {
    "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True, "fp32_residual_connection": False,
    "bias_dropout_fusion": True, "hidden_dropout": 0.0, "prefix_projection": False, "classifier_dropout": None,
}  # fmt: skip
CHATGLM = dense_row(
    "chatglm",
    "ChatGLMModel",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "attention_bias": False,
            "max_position_embeddings": 2048,
            "partial_rotary_factor": None,
            "rope_ratio": None,
            **_IDLE,
            **{key: values[0] for key, (values, _) in _ONLY.items()},
            "rope_theta": None,
        },
        neutral=NO_BIAS
        | {key: (True, False) for key, value in _IDLE.items() if isinstance(value, bool)}
        | {key: values for key, (values, _) in _ONLY.items()}
        | {"classifier_dropout": (None,)},
        kinds={"rope_ratio": NUMBER, "classifier_dropout": NUMBER, "rope_theta": NUMBER, "pre_seq_len": NUMBER},
        derived={"rope_theta": lambda get: 10000.0 * (get("rope_ratio") or 1.0)},
        words={
            "vocab_size": "padded_vocab_size",
            "num_hidden_layers": "num_layers",
            "intermediate_size": "ffn_hidden_size",
            "head_dim": "kv_channels",
            "num_key_value_heads": "multi_query_group_num",
            "max_position_embeddings": "seq_length",
            "rms_norm_eps": "layernorm_epsilon",
            "attention_bias": "add_qkv_bias",
        },
        only=_ONLY,
    ),
    tensors=Tensors(
        {
            "embedding.tokens": "transformer.embedding.word_embeddings.weight",
            "embedding.lm_head": "transformer.output_layer.weight",
            "norm.final": "transformer.encoder.final_layernorm.weight",
            "norm.attention": _LAYER + "input_layernorm.weight",
            "norm.ffn": _LAYER + "post_attention_layernorm.weight",
            "attention.qkv": _LAYER + "self_attention.query_key_value.weight",
            "attention.qkv_bias": _LAYER + "self_attention.query_key_value.bias",
            "attention.o": _LAYER + "self_attention.dense.weight",
            "ffn.gate_up": _LAYER + "mlp.dense_h_to_4h.weight",
            "ffn.down": _LAYER + "mlp.dense_4h_to_h.weight",
        },
        fused=FUSED_QKV | FUSED_QKV_BIAS | FUSED_FFN,
        prefix="transformer.",
        base_prefix="",
        dropped=("transformer.rotary_pos_emb.inv_freq",),
    ),
    attention=Attention(rotary="interleaved", partial=0.5),
    runs_as=Pair("chatglm", "glm", rename={"rope_ratio": None}),
)

VENDOR = Vendor(dense=(CHATGLM,))
