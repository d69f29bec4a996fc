"""Tiny models of every family that GGUF is written for, with the settings with which llama.cpp computes the same, and a
tokenizer as small as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from contract.stock import DENSE_CASES, MOE_CASES, save_stock

_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_MSCALE = {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}
_SLIDES = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_LINEAR_EPS = {"rms_norm_eps": 1e-6}
_LLAMA4 = {"num_hidden_layers": 4, "attention_chunk_size": 8192, "no_rope_layers": [1, 1, 1, 0], "moe_layers": None}
# name -> (case of stock.py, settings beside it, largest difference of log-probabilities in float32)
_EXACT = 1e-4
_GELU = 1e-2  # llama.cpp reads GELU from a table in float16
_CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    **{
        name: (name, {}, _EXACT)
        for name in (
            "arcee", "bamba", "cohere", "cohere2", "ernie4_5", "glm", "glm-no-bias", "granite", "granite-bias",
            "granite-tied", "granite_swa", "granitemoehybrid", "hunyuan_v1_dense", "internlm3", "iquestcoder", "lfm2",
            "llama", "llama-bias", "llama-head-dim", "llama-mlp-bias", "llama-rope", "llama-tied", "mistral",
            "nemotron", "olmo", "olmo-clip", "olmo2", "olmo3", "phi3", "phi3-longrope", "phi3-partial", "qwen2",
            "qwen2-tied", "qwen3", "qwen3-tied", "seed_oss", "stablelm", "youtu",
        )
    },
    **{name: (name, {}, _GELU) for name in ("gemma", "gemma4_text", "gemma4_text-k-eq-v")},
    "llama-yarn": ("llama", {"rope_parameters": _YARN}, _EXACT),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}, _EXACT),
    "qwen2-yarn": ("qwen2", {"rope_parameters": _YARN}, _EXACT),
    "qwen3-yarn": ("qwen3", {"rope_parameters": _YARN}, _EXACT),
    "qwen3_5_text": ("qwen3_5_text", _LINEAR_EPS, 1e-3),
    "olmo3-sliding": ("olmo3", _SLIDES | {"sliding_window": 5}, _EXACT),
    "ministral": ("ministral", {"layer_types": ["full_attention"] * 3}, _EXACT),
    "smollm3": (
        "smollm3",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4},
        _EXACT,
    ),
    **{
        f"{name} experts": (f"{name} experts", {}, _EXACT)
        for name in (
            "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "glm4_moe",
            "glm4_moe_lite", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe",
            "hy_v3", "jamba", "lfm2_moe", "minimax_m2", "mixtral", "nemotron_h-latent", "qwen3_moe", "solar_open",
        )
    },
    "gemma4 experts": ("gemma4 experts", {}, _GELU),
    # llama.cpp rounds the bounds of yarn's ramp, which the class does not (truncate: false)
    "gpt_oss experts": ("gpt_oss experts", {}, 1e-2),
    "gpt_oss-yarn experts": ("gpt_oss experts", {"rope_parameters": _YARN}, _EXACT),
    "afmoe experts": (
        "afmoe experts", {"mup_enabled": True, "num_hidden_layers": 4, "global_attn_every_n_layers": 4}, _EXACT,
    ),
    "cohere2_moe-softmax experts": ("cohere2_moe experts", {"expert_selection_fn": "softmax"}, _EXACT),
    "deepseek_v2-yarn experts": ("deepseek_v2 experts", _MSCALE, _EXACT),
    "deepseek_v3-yarn experts": ("deepseek_v3 experts", _MSCALE, _EXACT),
    "dots1 experts": ("dots1 experts", {"num_key_value_heads": 4}, _EXACT),
    "exaone_moe-mixed experts": ("exaone_moe experts", _SLIDES, _EXACT),
    "granitemoehybrid-nope experts": ("granitemoehybrid experts", {"position_embedding_type": "nope"}, _EXACT),
    "hunyuan_v1_moe-alpha experts": (
        "hunyuan_v1_moe experts",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}},
        _EXACT,
    ),
    "llama4 experts": ("llama4 experts", _LLAMA4, _EXACT),
    "llama4-step experts": ("llama4 experts", _LLAMA4 | {"interleave_moe_layer_step": 2}, _EXACT),
    "minimax_m2-partial experts": (
        "minimax_m2 experts",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        _EXACT,
    ),
    "nemotron_h experts": (
        "nemotron_h experts", {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}, _EXACT,
    ),
    "olmoe experts": ("olmoe experts", {"num_key_value_heads": 4}, _EXACT),
    "qwen2_moe experts": ("qwen2_moe experts", {"mlp_only_layers": [], "norm_topk_prob": False}, _EXACT),
    "qwen3_5_moe experts": ("qwen3_5_moe experts", _LINEAR_EPS, 1e-3),
    # the language models of multimodal models
    "gemma4-vision experts": ("gemma4-vision experts", {}, _GELU),
    "internvl experts": ("internvl experts", {}, _EXACT),
    "qwen3_5_moe-vision experts": ("qwen3_5_moe-vision experts", _LINEAR_EPS, 1e-3),
    "qwen3_next experts": ("qwen3_next experts", _LINEAR_EPS, 1e-3),
}  # fmt: skip


def _settings(case: str, changes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    name = case.removesuffix(" experts")
    kind, config = MOE_CASES[name] if name != case else DENSE_CASES[name]
    if (text := config.get("text_config")) is not None:
        changed = {key: value for key, value in (text | changes).items() if changes.get(key, "") is not None}
        return kind, config | {"text_config": changed}
    return kind, {key: value for key, value in (config | changes).items() if changes.get(key, "") is not None}


# name -> (model_type, config, largest difference of log-probabilities)
CASES = {name: (*_settings(case, changes), limit) for name, (case, changes, limit) in _CASES.items()}
SIZE = 128  # tokens, as many as the models have rows
_LETTERS = [chr(33 + i) for i in range(94)]


def tokenizer(folder: Path) -> None:
    """A byte-level BPE of printable ASCII and a few pairs of letters."""
    words = [*_LETTERS, *(f"q{chr(97 + i)}" for i in range(26)), *(f"z{chr(97 + i)}" for i in range(8))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [{"id": i, "content": words[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False} for i in range(3)]  # fmt: skip
    value = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None, "normalizer": None,
        "decoder": level | {"add_prefix_space": True}, "added_tokens": special, "pre_tokenizer": level,
        "model": {"type": "BPE", "byte_fallback": False, "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False,
                  "vocab": {word: i for i, word in enumerate(words)},
                  "merges": [[word[0], word[1]] for word in words if len(word) == 2]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(value))
    special_tokens = {"bos_token": words[1], "eos_token": words[2], "pad_token": words[0]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special_tokens})
    )


def make(folder: Path, name: str) -> Path:
    """The random model of a case in float32, with the tokenizer."""
    kind, config, _ = CASES[name]
    save_stock(folder, kind, config, dtype=torch.float32)
    tokenizer(folder)
    return folder
