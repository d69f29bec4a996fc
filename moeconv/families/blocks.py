"""Building blocks of the rows: tensor names and config keys of the decoder block that Llama established."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeconv.families.records import ConfigKeys, Tensors
from moeconv.families.spec import Family
from moeconv.types import JsonObject

LAYER = "model.layers.{L}."
# The decoder block that Llama established: RMSNorm before each sublayer; separate q, k, v and o projections.
BLOCK = {
    "embedding.tokens": "model.embed_tokens.weight",
    "embedding.lm_head": "lm_head.weight",
    "norm.final": "model.norm.weight",
    "norm.attention": LAYER + "input_layernorm.weight",
    "norm.ffn": LAYER + "post_attention_layernorm.weight",
    "attention.q": LAYER + "self_attn.q_proj.weight",
    "attention.k": LAYER + "self_attn.k_proj.weight",
    "attention.v": LAYER + "self_attn.v_proj.weight",
    "attention.o": LAYER + "self_attn.o_proj.weight",
}
QKV_BIAS = {f"attention.{p}_bias": LAYER + f"self_attn.{p}_proj.bias" for p in "qkv"}
O_BIAS = {"attention.o_bias": LAYER + "self_attn.o_proj.bias"}
QK_NORM = {f"attention.{p}_norm": LAYER + f"self_attn.{p}_norm.weight" for p in "qk"}
DENSE_FFN = {f"ffn.{p}": LAYER + f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
FFN_BIAS = {f"ffn.{p}_bias": LAYER + f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")}
ROTARY_BUFFERS = (LAYER + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
BASE_CONFIG: JsonObject = {
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
NO_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
ATTENTION_BIAS = QKV_BIAS | O_BIAS
NORM_BIAS = {
    f"norm.{part}_bias": BLOCK[f"norm.{part}"].replace(".weight", ".bias") for part in ("attention", "ffn", "final")
}
FUSED_QKV: dict[str, tuple[str, ...]] = {"attention.qkv": ("attention.q", "attention.k", "attention.v")}
FUSED_QKV_BIAS = {f"{key}_bias": tuple(f"{part}_bias" for part in parts) for key, parts in FUSED_QKV.items()}
FUSED_FFN: dict[str, tuple[str, ...]] = {"ffn.gate_up": ("ffn.gate", "ffn.up")}
FFN_GATE_UP = {"ffn.gate_up": LAYER + "mlp.gate_up_proj.weight", "ffn.down": LAYER + "mlp.down_proj.weight"}
MULTIPLIERS: JsonObject = {
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
}  # fmt: skip
SINKS = {"attention.sinks": LAYER + "self_attn.sinks"}
MLA = {
    "attention.q_whole": LAYER + "self_attn.q_proj.weight",
    "attention.q_a": LAYER + "self_attn.q_a_proj.weight",
    "attention.q_a_norm": LAYER + "self_attn.q_a_layernorm.weight",
    "attention.q_b": LAYER + "self_attn.q_b_proj.weight",
    "attention.kv_a": LAYER + "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a_norm": LAYER + "self_attn.kv_a_layernorm.weight",
    "attention.kv_b": LAYER + "self_attn.kv_b_proj.weight",
    "attention.o": LAYER + "self_attn.o_proj.weight",
}
MLA_CONFIG: JsonObject = {
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "attention_bias": False,
}  # fmt: skip
# the indexer of sparse attention, which chooses the tokens that latent attention reads
INDEXER = {
    "indexer.q": LAYER + "self_attn.indexer.wq_b.weight",
    "indexer.k": LAYER + "self_attn.indexer.wk.weight",
    "indexer.k_norm": LAYER + "self_attn.indexer.k_norm.weight",
    "indexer.k_norm_bias": LAYER + "self_attn.indexer.k_norm.bias",
    "indexer.weights": LAYER + "self_attn.indexer.weights_proj.weight",
}
INDEXER_CONFIG: JsonObject = {"index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64}
MLA_LOW_RANK = {key: name for key, name in MLA.items() if key != "attention.q_whole"}
WITHOUT_QKVO = {k: v for k, v in BLOCK.items() if not k.startswith("attention.")}
FULL_LAYERS = frozenset({"full_attention", "attention", "sliding_attention"})
UNGATED_FFN = {k: v for k, v in (DENSE_FFN | FFN_BIAS).items() if ".gate" not in k}
MAMBA = {
    f"mamba.{key}": LAYER + f"mamba.{name}"
    for key, name in (
        ("A", "A_log"), ("D", "D"), ("conv", "conv1d.weight"), ("conv_bias", "conv1d.bias"), ("dt", "dt_bias"),
        ("in", "in_proj.weight"), ("in_bias", "in_proj.bias"), ("norm", "norm.weight"), ("out", "out_proj.weight"),
        ("out_bias", "out_proj.bias"),
    )
}  # fmt: skip
HYBRID_WHERE = {"attention": FULL_LAYERS, "mamba": frozenset({"mamba", "linear_attention"})}
FEED_FORWARD = LAYER + "feed_forward."
PARTS = ("gate", "up", "down")
FEED_FORWARD_FFN = {f"ffn.{p}": FEED_FORWARD + f"{p}_proj.weight" for p in PARTS}
MLA_OPTIONAL = frozenset({"attention.q_whole", "attention.q_a", "attention.q_a_norm", "attention.q_b"})
LLAMA_TENSORS = Tensors(BLOCK | DENSE_FFN)


def dense_row(
    model_type: str, architecture: str, *, config: ConfigKeys, tensors: Tensors = LLAMA_TENSORS, **row: Any
) -> Family:
    """The row of a dense family with Llama's block, or with `tensors` instead.

    `config` adds to the config keys that all such families share. Biases and the output head are optional tensors.
    Raises TypeError for a keyword that is not a field of Family.
    """
    # a family with another key for the epsilon of its norms does not have this one
    other_epsilon = {"rms_norm_eps"} if config.defaults.keys() & {"layer_norm_eps", "norm_eps"} else set()
    defaults = {k: v for k, v in (BASE_CONFIG | dict(config.defaults)).items() if k not in other_epsilon}
    return Family(
        model_type, architecture, "dense", config=replace(config, defaults=defaults), tensors=completed(tensors), **row
    )


def completed(tensors: Tensors) -> Tensors:
    """`tensors`, with biases and the output head optional, and with the rotary buffers of old exports ignored."""
    optional = {"embedding.lm_head", *(key for key in tensors.names if key.endswith("_bias"))}
    return replace(tensors, optional=tensors.optional | optional, dropped=(*tensors.dropped, *ROTARY_BUFFERS))
