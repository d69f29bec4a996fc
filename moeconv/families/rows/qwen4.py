"""Alibaba: Qwen4-Exp, Qwen3.5 with several residual streams, embeddings of n-grams and attention to chosen tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moeconv.families.blocks import BASE_CONFIG, LAYER
from moeconv.families.expert_blocks import moe_row
from moeconv.families.placement import Get
from moeconv.families.records import LIST, WHOLE, WORD, ConfigKeys, Elsewhere, Layers, Routing, Tensors
from moeconv.families.rows.qwen3_5 import QWEN3_5_MOE, QWEN3_5_WHERE, qwen3_5_kinds
from moeconv.families.shapes import GATED_QUERY, Size, config_key
from moeconv.families.vendor import Vendor, Wrapper

_INDEXER = ("indexer_n_heads", "indexer_kv_heads", "indexer_head_dim", "indexer_budget", "indexer_compress_ratio")
_PARTS = {
    "norm": "hc_norm.weight", "down": "input_mix_weight_down.weight", "up": "input_mix_weight_up.weight",
    "inject": "block_inject_weight.weight",
}  # fmt: skip
_MIXERS = {
    "attention": LAYER + "attn_hyper_connection.", "ffn": LAYER + "mlp_hyper_connection.",
    "final": "model.hyper_connection_mixer.",
}  # fmt: skip
_STREAMS = {
    f"norm.{block}" if part == "norm" else f"streams.{block}_{part}": mixer + name
    for block, mixer in _MIXERS.items()
    for part, name in _PARTS.items()
    if (block, part) != ("final", "inject")
}
_STREAM_SHAPES = {
    "down": "stream_rank, streams*hidden", "up": "streams*hidden, stream_rank",
    "inject": "streams, streams*hidden",
}  # fmt: skip
_NGRAMS = {
    f"ngrams.{key}": f"{LAYER}ple.{name}.weight"
    for key, name in (
        ("key", "key_proj"), ("value", "value_proj"), ("norm_key", "norm_key"), ("norm_query", "norm_query"),
        ("norm_conv", "norm_conv"), ("conv", "conv1d"),
    )
}  # fmt: skip
_SIZES: Mapping[str, Size] = {
    "streams": config_key("hc_count"),
    "stream_rank": config_key("hc_lowrank"),
    "ngrams": lambda get, _place: get("ple_embed_dim") or get("hidden_size"),
    "ngram_kernel": config_key("ple_conv_kernel_size"),
    "index_heads": config_key("indexer_n_heads"),
    "index_kv": config_key("indexer_kv_heads"),
    "index_head": config_key("indexer_head_dim"),
}


def _kinds(get: Get, layers: int) -> list[str]:
    """As in Qwen3.5, but full attention has an indexer, and the class calls it so."""
    return ["indexed_attention" if word == "full_attention" else word for word in qwen3_5_kinds(get, layers)]


def _ngram_layers(get: Get) -> list[int]:
    """The layers with embeddings of n-grams, which config.json counts from 1."""
    return [number - 1 for number in get("ple_layer_ids") or [] if type(number) is int]


QWEN4_EXP = moe_row(
    "qwen4_exp_text",
    "Qwen4ExpForCausalLM",
    config=ConfigKeys(
        dict(QWEN3_5_MOE.config.defaults)
        | {
            "hc_count": 4,
            "hc_lowrank": 320,
            "ple_layer_ids": None,
            "ple_embed_dim": None,
            "ple_conv_kernel_size": 4,
            "ngram_size": 3,
            "heads_per_ngram": 8,
            "ngram_vocab_size_base": 20_000_000,
            "make_ngram_vocab_size_divisible_by": 128,
            "seed": 1234,
            "split_ngram_parts": 512,
            **dict.fromkeys(_INDEXER),
            "norm_topk_prob": True,
            "output_gate_type": None,
        },
        kinds={
            "ple_layer_ids": LIST,
            "ple_embed_dim": WHOLE,
            "output_gate_type": WORD,
            **dict.fromkeys(_INDEXER, WHOLE),
        },
        derived={"ple_layer_ids": lambda _get: [], "ple_embed_dim": lambda get: get("hidden_size")},
    ),
    tensors=Tensors(
        {key: name for key, name in QWEN3_5_MOE.tensors.names.items() if not key.startswith("norm.")}
        | {
            "attention.index_qk": LAYER + "self_attn.indexer.index_qk_proj.weight",
            "attention.index_q_norm": LAYER + "self_attn.indexer.q_layernorm.weight",
            "attention.index_k_norm": LAYER + "self_attn.indexer.k_layernorm.weight",
        }
        | _STREAMS
        | _NGRAMS,
        unchanged={LAYER + "ple.ple_embedding.": "lookup"},
        layouts=QWEN3_5_MOE.tensors.layouts,
        shapes=GATED_QUERY
        | {key: _STREAM_SHAPES.get(key.rpartition("_")[2], "streams*hidden") for key in _STREAMS}
        | {
            "attention.index_qk": "index_heads*index_head + index_kv*index_head, hidden",
            "attention.index_q_norm": "index_head",
            "attention.index_k_norm": "index_head",
            "ngrams.key": "streams*hidden, ngrams",
            "ngrams.value": "hidden, ngrams",
            "ngrams.conv": "streams*hidden, 1, ngram_kernel",
            **{f"ngrams.norm_{part}": "streams*hidden" for part in ("key", "query", "conv")},
        },
        sizes=_SIZES,
    ),
    layers=Layers(
        kinds=_kinds,
        where=QWEN3_5_WHERE | {"attention": frozenset({"indexed_attention"})},
        listed={"ngrams": _ngram_layers},
        streams="hc_count",
    ),
    experts=replace(QWEN3_5_MOE.experts, routing=Routing("softmax", "norm_topk_prob")),
    base={key: value for key, value in BASE_CONFIG.items() if key != "intermediate_size"},
    # transformers joins the parts of the tables of n-grams, but not while it reads packed weights
    elsewhere=Elsewhere(not_loaded=frozenset({"compressed-tensors"})),
)

VENDOR = Vendor(
    moe=(QWEN4_EXP,),
    wrappers=(Wrapper("qwen4_exp", "Qwen4ExpForConditionalGeneration", (QWEN4_EXP,), {"model.visual.": "vision"}),),
)
