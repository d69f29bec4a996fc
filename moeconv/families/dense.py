"""The dense families, a row each. Config defaults are those of transformers' configuration classes (5.23)."""

from __future__ import annotations

from typing import Any

from moeconv.families import sliding
from moeconv.families.placement import Get
from moeconv.families.shapes import (
    GATED_QUERY,
    GEMMA4_SIZES,
    LATENT,
    NEMOTRON_H_SIZES,
    NORM_OF_EACH_HEAD,
    WHOLE_ROW_NORMS,
    head_dim,
)
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


# -- building blocks of the rows below -----------------------------------------------------------------------------

_NO_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
_ATTENTION_BIAS = QKV_BIAS | O_BIAS
NORM_BIAS = {
    f"norm.{part}_bias": BLOCK[f"norm.{part}"].replace(".weight", ".bias") for part in ("attention", "ffn", "final")
}
FUSED_QKV = {"attention.qkv": ("attention.q", "attention.k", "attention.v")}
FUSED_FFN = {"ffn.gate_up": ("ffn.gate", "ffn.up")}
FFN_GATE_UP = {"ffn.gate_up": _LAYER + "mlp.gate_up_proj.weight", "ffn.down": _LAYER + "mlp.down_proj.weight"}
MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
}  # fmt: skip
SINKS = {"attention.sinks": _LAYER + "self_attn.sinks"}
MLA = {
    "attention.q_whole": _LAYER + "self_attn.q_proj.weight",
    "attention.q_a": _LAYER + "self_attn.q_a_proj.weight",
    "attention.q_a_norm": _LAYER + "self_attn.q_a_layernorm.weight",
    "attention.q_b": _LAYER + "self_attn.q_b_proj.weight",
    "attention.kv_a": _LAYER + "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a_norm": _LAYER + "self_attn.kv_a_layernorm.weight",
    "attention.kv_b": _LAYER + "self_attn.kv_b_proj.weight",
    "attention.o": _LAYER + "self_attn.o_proj.weight",
}
MLA_CONFIG: dict[str, Any] = {
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "attention_bias": False,
}  # fmt: skip
WITHOUT_QKVO = {k: v for k, v in BLOCK.items() if not k.startswith("attention.")}
POST_NORM = {
    "norm.attention": _LAYER + "post_attention_layernorm.weight",
    "norm.ffn": _LAYER + "post_feedforward_layernorm.weight",
}
LFM2 = {
    "embedding.tokens": "model.embed_tokens.weight",
    "embedding.lm_head": "lm_head.weight",
    "norm.final": "model.embedding_norm.weight",
    "norm.attention": _LAYER + "operator_norm.weight",
    "norm.ffn": _LAYER + "ffn_norm.weight",
    **{f"attention.{p}": _LAYER + f"self_attn.{p}_proj.weight" for p in "qkv"},
    "attention.o": _LAYER + "self_attn.out_proj.weight",
    **{f"attention.{p}_norm": _LAYER + f"self_attn.{p}_layernorm.weight" for p in "qk"},
    "conv.kernel": _LAYER + "conv.conv.weight",
    "conv.kernel_bias": _LAYER + "conv.conv.bias",
    **{f"conv.{p}": _LAYER + f"conv.{p}_proj.weight" for p in ("in", "out")},
    **{f"conv.{p}_bias": _LAYER + f"conv.{p}_proj.bias" for p in ("in", "out")},
    **{f"ffn.{p}": _LAYER + f"feed_forward.{w}.weight" for p, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
}
LFM2_OPTIONAL = frozenset({"embedding.lm_head", "conv.kernel_bias", "conv.in_bias", "conv.out_bias"})
LFM2_CONFIG: dict[str, Any] = {
    "vocab_size": 65536, "hidden_size": None, "num_hidden_layers": None, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 128000, "initializer_range": 0.02, "norm_eps": 1e-5,
    "rope_theta": 1e6, "rope_scaling": None, "rope_parameters": None, "tie_word_embeddings": True,
    "conv_bias": False, "conv_L_cache": 3, "layer_types": None,
}  # fmt: skip
FULL_LAYERS = frozenset({"full_attention", "attention", "sliding_attention"})


def _lfm2_kinds(get: Get, layers: int) -> list[str]:
    full = get("full_attn_idxs")
    chosen = range(layers) if full is None else full
    return get("layer_types") or ["full_attention" if i in chosen else "conv" for i in range(layers)]


def _lfm2_width(get: Get) -> int:
    """Lfm2MLP: two thirds of the stated size, times a multiplier, rounded up to a multiple."""
    size = get("block_ff_dim") or get("intermediate_size")
    if not get("block_auto_adjust_ff_dim"):
        return size
    size = int(2 * size / 3)
    if get("block_ffn_dim_multiplier") is not None:
        multiple = get("block_multiple_of")
        size = multiple * -(-int(get("block_ffn_dim_multiplier") * size) // multiple)
    return size


def _llama_like(
    model_type: str, architecture: str, config: dict[str, Any], *, tensors: dict[str, str] | None = None, **row: Any
) -> Family:
    """A row for Llama's block, or for `tensors` in its place."""
    named = BLOCK | DENSE_FFN if tensors is None else tensors
    row_without = {"rms_norm_eps"} if config.keys() & {"layer_norm_eps", "norm_eps"} else set()
    optional = {"embedding.lm_head", *(k for k in named if k.endswith("_bias"))}
    return Family(
        model_type=model_type,
        architecture=architecture,
        kind="dense",
        tensors=named,
        optional=frozenset(row.pop("optional", frozenset()) | optional),
        dropped=ROTARY_BUFFERS,
        config={k: v for k, v in (BASE_CONFIG | config).items() if k not in row_without},
        **row,
    )


PHI3 = _llama_like(
    "phi3",
    "Phi3ForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
        "partial_rotary_factor": None,
    },
    tensors=WITHOUT_QKVO
    | {"attention.qkv": _LAYER + "self_attn.qkv_proj.weight", "attention.o": BLOCK["attention.o"]}
    | FFN_GATE_UP,
    fused=FUSED_QKV | FUSED_FFN,
    partial=1.0,
    sliding=WINDOW_KEY,
)
GEMMA = _llama_like(
    "gemma",
    "GemmaForCausalLM",
    {
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": None,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_bidirectional_attention": None,
    },
    tensors=BLOCK | _ATTENTION_BIAS | DENSE_FFN,
    neutral=_NO_BIAS | {"use_bidirectional_attention": (None, False)},
    norm_offset=1.0,
)
GRANITE = _llama_like(
    "granite",
    "GraniteForCausalLM",
    {"attention_bias": False, "mlp_bias": False, **MULTIPLIERS},
    tensors=BLOCK | _ATTENTION_BIAS | DENSE_FFN | FFN_BIAS,
    neutral=_NO_BIAS,
)
GRANITE_SWA = _llama_like(
    "granite_swa",
    "GraniteSWAForCausalLM",
    {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": 128,
        "layer_types": None,
        "layer_rope_theta": None,
        **MULTIPLIERS,
    },
    tensors=BLOCK | SINKS | _ATTENTION_BIAS | DENSE_FFN | FFN_BIAS,
    neutral=_NO_BIAS,
    sliding=sliding.ALL_BUT_EVERY_FOURTH,
    rope="per_layer",
)
SEED_OSS = _llama_like(
    "seed_oss",
    "SeedOssForCausalLM",
    {
        "num_key_value_heads": 8,
        "attention_dropout": 0.1,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    },
    tensors=BLOCK | _ATTENTION_BIAS | DENSE_FFN | FFN_BIAS,
    neutral=_NO_BIAS | {"attention_out_bias": (False,), "pretraining_tp": (1, None)},
)
GLM = _llama_like(
    "glm",
    "GlmForCausalLM",
    {
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "max_position_embeddings": 131072,
        "attention_bias": True,
        "num_key_value_heads": 2,
        "partial_rotary_factor": None,
    },
    tensors=BLOCK | QKV_BIAS | FFN_GATE_UP,
    neutral=_NO_BIAS,
    fused=FUSED_FFN,
    rotary="interleaved",
    partial=0.5,
)
HELIUM = _llama_like(
    "helium",
    "HeliumForCausalLM",
    {
        "num_key_value_heads": 20,
        "head_dim": 128,
        "rms_norm_eps": 1e-8,
        "max_position_embeddings": 4096,
        "rope_theta": 100000.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    tensors=BLOCK | QKV_BIAS | DENSE_FFN,
    neutral=_NO_BIAS,
    rotary="interleaved",
)
ARCEE = _llama_like(
    "arcee",
    "ArceeForCausalLM",
    {
        "head_dim": None,
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "mlp_bias": False,
    },
    tensors=BLOCK | _ATTENTION_BIAS | {k: v for k, v in (DENSE_FFN | FFN_BIAS).items() if ".gate" not in k},
    neutral=_NO_BIAS,
)
MINISTRAL = _llama_like(
    "ministral",
    "MinistralForCausalLM",
    {
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "layer_types": None,
    },
    sliding=sliding.ALL_LAYERS,
)
MINISTRAL3 = _llama_like(
    "ministral3",
    "Ministral3ForCausalLM",
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "rope_theta": 1e6,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
        },
    },
    sliding=WINDOW_KEY,
)  # fmt: skip
CWM = _llama_like(
    "cwm",
    "CwmForCausalLM",
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "sliding_window": 8192,
        "layer_types": None,
        "mlp_bias": False,
        "attention_bias": False,
        "pretraining_tp": 1,
    },
    neutral=_NO_BIAS | {"pretraining_tp": (1, None)},
    sliding=sliding.ALL_BUT_EVERY_FOURTH,
)  # fmt: skip
INTERNLM3 = _llama_like(
    "internlm3",
    "InternLM3ForCausalLM",
    {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "mlp_bias": False,
        "qkv_bias": False,
        "bias": False,
    },
    tensors=BLOCK | _ATTENTION_BIAS | DENSE_FFN | FFN_BIAS,
    neutral=_NO_BIAS | {"qkv_bias": (False,), "bias": (False,)},
)
IQUESTCODER = _llama_like(
    "iquestcoder",
    "IQuestCoderForCausalLM",
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "attention_bias": False,
        "mlp_bias": False,
    },
    tensors=BLOCK | _ATTENTION_BIAS | DENSE_FFN | FFN_BIAS,
    neutral=_NO_BIAS,
)
_COHERE_CONFIG: dict[str, Any] = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
PARALLEL_BLOCK = {k: v for k, v in BLOCK.items() if k != "norm.ffn"}
COHERE = _llama_like(
    "cohere",
    "CohereForCausalLM",
    _COHERE_CONFIG | {"rope_theta": 500000.0, "use_qk_norm": False},
    tensors=PARALLEL_BLOCK | _ATTENTION_BIAS | QK_NORM | DENSE_FFN,
    optional=frozenset(QK_NORM),
    neutral=_NO_BIAS | {"use_qk_norm": (False,)},
    rotary="interleaved",
    shapes=NORM_OF_EACH_HEAD,
)
COHERE2 = _llama_like(
    "cohere2",
    "Cohere2ForCausalLM",
    _COHERE_CONFIG | {"sliding_window": 4096, "layer_types": None, "sliding_window_pattern": None, "head_dim": None},
    tensors=PARALLEL_BLOCK | _ATTENTION_BIAS | DENSE_FFN,
    sliding=sliding.ALL_BUT_LAST_OF_FOUR,
    rotary="interleaved",
    neutral={"sliding_window_pattern": (4, None)},
)
# HunYuan normalises queries and keys after the rotation, the others before it
QK_LAYERNORM = {
    f"attention.{p}_norm_after_rope": _LAYER + f"self_attn.{w}_layernorm.weight"
    for p, w in (("q", "query"), ("k", "key"))
}
HUNYUAN = _llama_like(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "eod_token_id": 3,
    },
    tensors=BLOCK | _ATTENTION_BIAS | QK_LAYERNORM | DENSE_FFN,
    neutral=_NO_BIAS | {"pretraining_tp": (1, None)},
)
ERNIE4_5 = _llama_like(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    {
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "head_dim": 128,
        "use_bias": False,
    },
    tensors=BLOCK | _ATTENTION_BIAS | DENSE_FFN | FFN_BIAS,
    neutral={"use_bias": (False,)},
    rotary="interleaved",
)
OLMO = _llama_like(
    "olmo",
    "OlmoForCausalLM",
    {"rms_norm_eps": None, "attention_bias": False, "clip_qkv": None},
    tensors={k: v for k, v in (BLOCK | _ATTENTION_BIAS | DENSE_FFN).items() if not k.startswith("norm.")},
    neutral=_NO_BIAS | {"clip_qkv": (None,)},
)
OLMO2 = _llama_like(
    "olmo2",
    "Olmo2ForCausalLM",
    {"rms_norm_eps": 1e-5, "attention_bias": False},
    tensors=BLOCK | POST_NORM | _ATTENTION_BIAS | QK_NORM | DENSE_FFN,
    shapes=WHOLE_ROW_NORMS,
)
OLMO3 = _llama_like(
    "olmo3",
    "Olmo3ForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "sliding_window": 4096,
        "layer_types": None,
    },
    tensors=BLOCK | POST_NORM | _ATTENTION_BIAS | QK_NORM | DENSE_FFN,
    sliding=sliding.ALL_BUT_LAST_OF_FOUR,
    rope="per_type",
    shapes=WHOLE_ROW_NORMS,
)
LFM2_DENSE = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    kind="dense",
    tensors=LFM2,
    optional=LFM2_OPTIONAL,
    config=LFM2_CONFIG
    | {
        "intermediate_size": 12288,
        "block_ff_dim": None,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "full_attn_idxs": None,
        "tie_embedding": True,
    },
    ffn_width=_lfm2_width,
    derived={"tie_word_embeddings": lambda get: get("tie_embedding")},  # its older word
    layer_kinds=_lfm2_kinds,
    where={"attention": FULL_LAYERS, "conv": frozenset({"conv"})},
)
SMOLLM3 = _llama_like(
    "smollm3",
    "SmolLM3ForCausalLM",
    {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    },
    tensors=BLOCK | _ATTENTION_BIAS | DENSE_FFN | FFN_BIAS,
    neutral=_NO_BIAS | {"pretraining_tp": (1, 2, None)},
    sliding=sliding.SWITCHED_TYPES,
    rope="no_rope",
)
HYPERCLOVAX = _llama_like(
    "hyperclovax",
    "HyperCLOVAXForCausalLM",
    {"head_dim": None, "attention_bias": False, "mlp_bias": False, "use_post_norm": True, **MULTIPLIERS}
    | {"attention_multiplier": None},
    tensors=BLOCK
    | {f"norm.post{i}": _LAYER + f"post_norm{i}.weight" for i in (1, 2)}
    | _ATTENTION_BIAS
    | DENSE_FFN
    | FFN_BIAS,
    optional=frozenset({"norm.post1", "norm.post2"}),
    neutral=_NO_BIAS | {"use_post_norm": (False,)},
    derived={"attention_multiplier": lambda get: head_dim(get) ** -0.5},
)
YOUTU = _llama_like(
    "youtu",
    "YoutuForCausalLM",
    MLA_CONFIG
    | {"num_key_value_heads": 16, "max_position_embeddings": 131072, "tie_word_embeddings": True}
    | {"initializer_range": None, "rope_interleave": True, "head_dim": "=qk_rope_head_dim"},
    tensors=WITHOUT_QKVO | MLA | DENSE_FFN,
    optional=frozenset({"attention.q_whole", "attention.q_a", "attention.q_a_norm", "attention.q_b"}),
    shapes=LATENT,
    derived={"initializer_range": lambda get: 2 / (5 * get("hidden_size")) ** 0.5},
)
MINICPM3 = _llama_like(
    "minicpm3",
    "MiniCPM3ForCausalLM",
    MLA_CONFIG
    | {
        "q_lora_rank": 768,
        "kv_lora_rank": 256,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": None,
        "head_dim": "=qk_rope_head_dim",
        "num_key_value_heads": 40,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "mlp_bias": False,
        "pretraining_tp": 1,
    },
    tensors=WITHOUT_QKVO | {k: v for k, v in MLA.items() if k != "attention.q_whole"} | DENSE_FFN,
    neutral=_NO_BIAS | {"pretraining_tp": (1, None)},
    shapes=LATENT,
    derived={"v_head_dim": lambda get: get("hidden_size") // get("num_attention_heads")},
)
STABLELM = _llama_like(
    "stablelm",
    "StableLmForCausalLM",
    {
        "num_key_value_heads": 32,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "partial_rotary_factor": None,
        "rotary_scaling_factor": None,
    },
    tensors=BLOCK | NORM_BIAS | QKV_BIAS | DENSE_FFN,
    neutral={"qk_layernorm": (False,), "use_parallel_residual": (False,), "rotary_scaling_factor": (None, 1.0)},
    optional=frozenset({"norm.ffn"}),  # a parallel residual has none
    partial=0.25,
)
UNGATED_FFN = {k: v for k, v in (DENSE_FFN | FFN_BIAS).items() if ".gate" not in k}
JAIS2 = _llama_like(
    "jais2",
    "Jais2ForCausalLM",
    {
        "layer_norm_eps": 1e-5,
        "hidden_act": "relu2",
        "max_position_embeddings": 8192,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": None,
    },
    tensors=BLOCK | NORM_BIAS | _ATTENTION_BIAS | UNGATED_FFN,
    neutral=_NO_BIAS,
)
NEMOTRON = _llama_like(
    "nemotron",
    "NemotronForCausalLM",
    {
        "norm_eps": 1e-5,
        "initializer_range": 0.0134,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": None,
        "partial_rotary_factor": None,
    },
    tensors=BLOCK | NORM_BIAS | _ATTENTION_BIAS | UNGATED_FFN,
    neutral=_NO_BIAS,
    partial=0.5,
    norm_offset=1.0,
)

LINEAR_ATTENTION = {
    f"linear.{key}": _LAYER + f"linear_attn.{name}"
    for key, name in (
        ("A", "A_log"), ("conv", "conv1d.weight"), ("dt", "dt_bias"), ("a", "in_proj_a.weight"),
        ("b", "in_proj_b.weight"), ("qkv", "in_proj_qkv.weight"), ("z", "in_proj_z.weight"), ("norm", "norm.weight"),
        ("out", "out_proj.weight"),
    )
}  # fmt: skip
QWEN3_5_CONFIG: dict[str, Any] = {
    "head_dim": 256, "max_position_embeddings": 32768, "partial_rotary_factor": None, "attention_bias": False,
    "layer_types": None, "full_attention_interval": None, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
QWEN3_5_WHERE = {"attention": FULL_LAYERS, "linear": frozenset({"linear_attention"})}


def qwen3_5_kinds(get: Get, layers: int) -> list[str]:
    every = get("full_attention_interval") or 4
    words = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
    return get("layer_types") or words


# q holds an output gate beside the queries; norms add 1 in both families, so nothing needs an offset
QWEN3_5 = _llama_like(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    QWEN3_5_CONFIG | {"num_key_value_heads": 4},
    tensors=BLOCK | _ATTENTION_BIAS | QK_NORM | LINEAR_ATTENTION | DENSE_FFN,
    partial=0.25,
    layer_kinds=qwen3_5_kinds,
    where=QWEN3_5_WHERE,
    shapes=GATED_QUERY,
)

MAMBA = {
    f"mamba.{key}": _LAYER + f"mamba.{name}"
    for key, name in (
        ("A", "A_log"), ("D", "D"), ("conv", "conv1d.weight"), ("conv_bias", "conv1d.bias"), ("dt", "dt_bias"),
        ("in", "in_proj.weight"), ("in_bias", "in_proj.bias"), ("norm", "norm.weight"), ("out", "out_proj.weight"),
        ("out_bias", "out_proj.bias"),
    )
}  # fmt: skip
MAMBA_CONFIG: dict[str, Any] = {
    "layer_types": None, "position_embedding_type": None, "mamba_n_heads": 128, "mamba_n_groups": 1,
    "mamba_d_state": 256, "mamba_d_head": 64, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256,
    "mamba_conv_bias": True, "mamba_proj_bias": False, "time_step_limit": None,
}  # fmt: skip


def hybrid_kinds(get: Get, layers: int) -> list[str]:
    return get("layer_types") or ["linear_attention"] * layers


HYBRID_WHERE = {"attention": FULL_LAYERS, "mamba": frozenset({"mamba", "linear_attention"})}
GRANITE_HYBRID = _llama_like(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    {"attention_bias": False, "head_dim": None, **MULTIPLIERS, **MAMBA_CONFIG}
    | {"shared_intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2},
    tensors=BLOCK
    | _ATTENTION_BIAS
    | MAMBA
    | {
        "ffn.gate_up": _LAYER + "shared_mlp.input_linear.weight",
        "ffn.down": _LAYER + "shared_mlp.output_linear.weight",
    },
    fused=FUSED_FFN,
    ffn_width=lambda get: get("shared_intermediate_size"),
    layer_kinds=hybrid_kinds,
    where=HYBRID_WHERE,
    no_experts=lambda get: get("num_local_experts") == 0,
)


def _bamba_kinds(get: Get, layers: int) -> list[str]:
    full = get("attn_layer_indices") or []
    return ["full_attention" if i in full else "linear_attention" for i in range(layers)]


BAMBA = _llama_like(
    "bamba",
    "BambaForCausalLM",
    {key: value for key, value in MAMBA_CONFIG.items() if key not in ("layer_types", "position_embedding_type")}
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "attn_layer_indices": None,
        "num_logits_to_keep": 1,
        "z_loss_coefficient": 0.0,
    },
    tensors={k: v for k, v in BLOCK.items() if k not in ("norm.final", "norm.ffn")}
    | {"norm.final": "model.final_layernorm.weight", "norm.ffn": _LAYER + "pre_ff_layernorm.weight"}
    | _ATTENTION_BIAS
    | MAMBA
    | {k: v.replace(".mlp.", ".feed_forward.") for k, v in (DENSE_FFN | FFN_BIAS).items()},
    neutral=_NO_BIAS,
    partial=0.5,
    layer_kinds=_bamba_kinds,
    where=HYBRID_WHERE,
)

_NEMOTRON = "backbone.layers.{L}."
_MIXER = _NEMOTRON + "mixer."
NEMOTRON_H_BLOCK = {
    "embedding.tokens": "backbone.embeddings.weight",
    "embedding.lm_head": "lm_head.weight",
    "norm.final": "backbone.norm_f.weight",
    "norm.ffn": _NEMOTRON + "norm.weight",
    **{f"attention.{p}": _MIXER + f"{p}_proj.weight" for p in "qkvo"},
    **{key: name.replace(_LAYER + "mamba.", _MIXER) for key, name in MAMBA.items()},
    **{f"ffn.{p}": _MIXER + f"{p}_proj.weight" for p in ("up", "down")},
    **{f"ffn.{p}_bias": _MIXER + f"{p}_proj.bias" for p in ("up", "down")},
}
# layers of one block each; what a Mixture-of-Experts needs is there whether one is or not
NEMOTRON_H_CONFIG: dict[str, Any] = {
    "hidden_act": "relu2", "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 21504,
    "max_position_embeddings": 4096, "attention_bias": False, "mlp_bias": False, "use_bias": False,
    "sliding_window": None, "layer_types": None, "ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64,
    "mamba_hidden_act": "silu", "n_groups": 8, "conv_kernel": 4, "expand": 2, "time_step_min": 0.001,
    "time_step_max": 0.1, "time_step_limit": None, "time_step_floor": 1e-4, "use_conv_bias": True, "chunk_size": 128,
    "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32", "use_mamba_kernels": True, "residual_in_fp32": False,
    "rescale_prenorm_residual": True, "num_logits_to_keep": 1, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688, "moe_shared_expert_overlap": True,
    "moe_latent_size": None, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0, "mtp_layers_block_type": None,
    "output_router_logits": False,
}  # fmt: skip
NEMOTRON_H_WORDS = {
    "layer_types": "layers_block_type",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "mlp_hidden_act",
}
NEMOTRON_H_WHERE = HYBRID_WHERE | {"ffn": frozenset({"mlp"})}
_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def nemotron_h_kinds(get: Get, layers: int) -> list[str]:
    """The list of kinds, or the older string with a letter for each."""
    kinds, pattern = get("layer_types"), get("hybrid_override_pattern")
    return [_PATTERN.get(word, word) for word in pattern] if kinds is None and isinstance(pattern, str) else kinds


def nemotron_h_layers(get: Get) -> Any:
    kinds = nemotron_h_kinds(get, 0)
    return len(kinds) if isinstance(kinds, list) else get("num_hidden_layers")


NEMOTRON_H = _llama_like(
    "nemotron_h",
    "NemotronHForCausalLM",
    NEMOTRON_H_CONFIG | {"hybrid_override_pattern": None},
    tensors=NEMOTRON_H_BLOCK,
    rope="none",
    layer_kinds=nemotron_h_kinds,
    layer_count=nemotron_h_layers,
    where=NEMOTRON_H_WHERE,
    words=NEMOTRON_H_WORDS,
    base_prefix="backbone.",
    no_experts=lambda get: "moe" not in (nemotron_h_kinds(get, 0) or ["moe"]),
    sizes=NEMOTRON_H_SIZES,
)

# norms in front of and behind both blocks; some full layers take their keys for values too
GEMMA4_BLOCK = (
    BLOCK
    | {
        "norm.post_attention": _LAYER + "post_attention_layernorm.weight",
        "norm.ffn": _LAYER + "pre_feedforward_layernorm.weight",
        "norm.post_ffn": _LAYER + "post_feedforward_layernorm.weight",
        "norm.layer": _LAYER + "layer_scalar",
    }
    | _ATTENTION_BIAS
    | QK_NORM
)
GEMMA4_CONFIG: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 131072,
    "rope_theta": 1e6, "tie_word_embeddings": True, "attention_bias": False, "sliding_window": 512,
    "layer_types": None, "final_logit_softcapping": None, "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "attention_k_eq_v": False,
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "global_head_dim": None,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    "num_global_key_value_heads": None, "per_layer_config": None, "enable_moe_block": False, "num_experts": None,
    "top_k_experts": None, "moe_intermediate_size": None,
}  # fmt: skip
GEMMA4_ROW: dict[str, Any] = {
    "sizes": GEMMA4_SIZES,
    "optional": frozenset({"attention.v"}),
    "sliding": sliding.FULL_AT_THE_END,
    "rope": "own",
    "partial": 1.0,
    "words": {"hidden_act": "hidden_activation"},
    "only": {
        "hidden_size_per_layer_input": ((0, None), "every layer reads the tokens again (per-layer inputs)"),
        "num_kv_shared_layers": ((0,), "the last layers attend to keys and values of layers before them"),
    },
}
GEMMA4 = _llama_like(
    "gemma4_text",
    "Gemma4ForCausalLM",
    GEMMA4_CONFIG,
    tensors=GEMMA4_BLOCK | DENSE_FFN,
    no_experts=lambda get: get("enable_moe_block") is False,
    **GEMMA4_ROW,
)

DENSE: dict[str, Family] = {
    f.model_type: f
    for f in (
        LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA, GRANITE, GRANITE_SWA, SEED_OSS, GLM, HELIUM, ARCEE, MINISTRAL,
        MINISTRAL3, CWM, INTERNLM3, IQUESTCODER, COHERE, COHERE2, HUNYUAN, ERNIE4_5, OLMO, OLMO2, OLMO3, LFM2_DENSE,
        SMOLLM3, HYPERCLOVAX, YOUTU, MINICPM3, STABLELM, JAIS2, NEMOTRON,
        QWEN3_5, GRANITE_HYBRID, BAMBA, NEMOTRON_H, GEMMA4,
    )
}  # fmt: skip
