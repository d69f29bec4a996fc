"""Stock transformers models for the contract suite: one tiny config a family row, random in every parameter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moeconv.families.names import usual_name
from moeconv.families.registry import tables
from moeconv.families.spec import Family
from moeconv.quantize.spec import Format
from moeconv.versions import OLDEST_PACKED, release

VOCAB, HIDDEN = 128, 64
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.05,
}  # fmt: skip
_DENSE = _COMMON | {"intermediate_size": 96}
_MOE = _COMMON | {"num_experts_per_tok": 2}

_HEAD = _DENSE | {"head_dim": 16}
_LINEAR_ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
_LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 64, "original_max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
                        "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.5 + i for i in range(8)]},
}  # fmt: skip
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_MULTIPLIED = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.5,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.3,
}
_MLA = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
        "v_head_dim": 16}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 16}
_NEMOTRON_H = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16}
_MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GEMMA4_DENSE = {
    "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "global_head_dim": 16, "hidden_size_per_layer_input": 0, "rms_norm_eps": 1e-6,
}  # fmt: skip
_BIASED = _DENSE | {"attention_bias": True}

# the pairs whose source has a class of its own; the others: test_wrapped_dense.py, test_remote_code.py
STOCK_PAIRS = [p for p in tables().pairs if p.source in tables().dense and not tables().dense[p.source].runs_as]
# name of the case -> (model_type, config, targets; none named: every pair of the source)
Case = tuple[str, dict[str, Any], tuple[str, ...]]
CASES: dict[str, Case] = {
    "llama": ("llama", _DENSE, ()),
    "llama-tied": ("llama", _DENSE | {"tie_word_embeddings": True}, ("mixtral", "granitemoe")),
    "llama-head-dim": ("llama", _DENSE | {"head_dim": 32}, ("mixtral", "qwen2_moe", "glm4_moe", "ernie4_5_moe")),
    "llama-rope": ("llama", _DENSE | _LINEAR_ROPE, ("mixtral", "glm4_moe", "gpt_oss")),
    "llama-bias": (
        "llama", _BIASED,
        ("granitemoe", "granitemoeshared", "granitemoehybrid", "aria_text", "gpt_oss"),
    ),
    "llama-mlp-bias": ("llama", _BIASED | {"mlp_bias": True}, ("gpt_oss",)),
    "mistral": ("mistral", _DENSE | {"sliding_window": None}, ()),
    "mistral-sliding": ("mistral", _DENSE | {"sliding_window": 5}, ()),
    "ministral": ("ministral", _HEAD | _MIXED, ()),
    "ministral3": (
        "ministral3",
        _HEAD | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 32.0,
                                     "beta_slow": 1.0, "original_max_position_embeddings": 32,
                                     "llama_4_scaling_beta": 0.1}},
        (),
    ),
    "internlm3": ("internlm3", _HEAD, ()),
    "iquestcoder": ("iquestcoder", _HEAD, ()),
    "phi3": ("phi3", _DENSE, ("mixtral", "glm4_moe")),
    "phi3-sliding": ("phi3", _DENSE | {"sliding_window": 5}, ("mixtral",)),
    "phi3-longrope": ("phi3", _DENSE | _LONGROPE, ("mixtral",)),
    "phi3-partial": ("phi3", _DENSE | _PARTIAL, ()),
    "phi3-partial-longrope": (
        "phi3",
        _DENSE | _LONGROPE | {"rope_parameters": _LONGROPE["rope_parameters"] | {
            "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}},
        ("mixtral",),
    ),
    "gemma": ("gemma", _HEAD | {"tie_word_embeddings": True}, ()),
    "gemma-untied": ("gemma", _HEAD | {"tie_word_embeddings": False}, ()),
    "granite": ("granite", _DENSE | _MULTIPLIED, ()),
    "granite-tied": ("granite", _DENSE | _MULTIPLIED | {"tie_word_embeddings": True}, ("granitemoe", "mixtral")),
    "granite-bias": ("granite", _BIASED | _MULTIPLIED, ("granitemoe",)),
    "granite_swa": ("granite_swa", _DENSE | _MULTIPLIED | _MIXED, ()),
    "hyperclovax": ("hyperclovax", _HEAD | _MULTIPLIED | {"use_post_norm": False}, ()),
    "seed_oss": ("seed_oss", _HEAD, ()),
    "glm": ("glm", _HEAD, ("glm4_moe",)),
    "glm-no-bias": ("glm", _HEAD | {"attention_bias": False}, ()),
    "helium": ("helium", _HEAD, ()),
    "arcee": ("arcee", _HEAD, ()),
    "cwm": ("cwm", _HEAD | _MIXED, ()),
    "qwen2": ("qwen2", _DENSE, ()),
    "qwen2-tied": ("qwen2", _DENSE | {"tie_word_embeddings": True}, ("qwen2_moe", "glm4_moe")),
    "qwen2-sliding": (
        "qwen2", _DENSE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        ("qwen2_moe", "gpt_oss"),
    ),
    "qwen3": ("qwen3", _DENSE | {"head_dim": 32}, ()),
    "qwen3-tied": ("qwen3", _HEAD | {"tie_word_embeddings": True}, ("qwen3_moe",)),
    "qwen3-sliding": (
        "qwen3", _HEAD | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        ("qwen3_moe", "dots1", "mellum"),
    ),
    "qwen3-mixed": (
        "qwen3", _HEAD | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, ("dots1", "mellum"),
    ),
    "qwen3-attention-bias": ("qwen3", _HEAD | {"attention_bias": True}, ("qwen3_moe", "dots1", "mellum", "hy_v3")),
    "smollm3": (
        "smollm3",
        _DENSE | {"no_rope_layers": [1, 0, 1], "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True},
        (),
    ),
    "cohere2": ("cohere2", _HEAD | _MIXED | {"tie_word_embeddings": True}, ()),
    "cohere": ("cohere", _DENSE | {"tie_word_embeddings": True}, ()),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEAD, ()),
    "ernie4_5": ("ernie4_5", _HEAD, ()),
    "olmo": ("olmo", _DENSE, ()),
    "olmo-tied": ("olmo", _DENSE | {"tie_word_embeddings": True}, ()),
    "olmo-clip": ("olmo", _DENSE | {"clip_qkv": 0.3, **_LINEAR_ROPE}, ("dbrx",)),
    "olmo2": ("olmo2", _DENSE, ()),
    "olmo3": ("olmo3", _DENSE | {"layer_types": ["full_attention"] * 3}, ()),
    "lfm2": (
        "lfm2",
        _DENSE | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": True,
                  "block_multiple_of": 16, "conv_L_cache": 3, "tie_word_embeddings": True},
        (),
    ),
    "qwen3_5_text": (
        "qwen3_5_text",
        _HEAD | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_key_head_dim": 8,
                 "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        (),
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        _DENSE | _MULTIPLIED | {
            "num_local_experts": 0, "shared_intermediate_size": 96, "position_embedding_type": "rope",
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "mamba_n_heads": 8,
            "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 16},
        (),
    ),
    "bamba": ("bamba", _DENSE | _MAMBA | {"attn_layer_indices": [1]}, ()),
    "bamba-bias": ("bamba", _BIASED | _MAMBA | {"attn_layer_indices": [0, 2], "mamba_proj_bias": True}, ()),
    "nemotron_h": (
        "nemotron_h",
        _HEAD | _NEMOTRON_H | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
        (),
    ),
    "gemma4_text": ("gemma4_text", _HEAD | _GEMMA4_DENSE, ()),
    "gemma4_text-k-eq-v": (
        "gemma4_text",
        _HEAD | _GEMMA4_DENSE | {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
                           "final_logit_softcapping": 30.0, "tie_word_embeddings": False},
        (),
    ),
    "gemma4_unified_text": (
        "gemma4_unified_text",
        {k: v for k, v in (_HEAD | _GEMMA4_DENSE).items() if k != "hidden_size_per_layer_input"},
        (),
    ),
    # its class zeroes the padding row of whatever it loads
    "youtu": ("youtu", _DENSE | _MLA | {"pad_token_id": None}, ()),
    "minicpm3": ("minicpm3", _DENSE | _MLA | {"scale_emb": 3, "dim_model_base": 16, "scale_depth": 1.4}, ()),
    "stablelm": ("stablelm", _DENSE | {"use_qkv_bias": True, **_PARTIAL}, ()),
    "jais2": ("jais2", _HEAD | {"mlp_bias": False, "attention_bias": True}, ()),
    "nemotron": ("nemotron", _HEAD | _PARTIAL, ()),
}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 16, "patch_size": 4}  # fmt: skip
_QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": HIDDEN, "patch_size": 4,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
}  # fmt: skip
# the class looks these up in the embeddings, and takes them out of the text
_GEMMA4_TOKENS = {"image_token_id": 0, "video_token_id": 1, "audio_token_id": 2}


def _llava(text: str, config: dict[str, Any], **vision: Any) -> dict[str, Any]:
    return {"text_config": config | {"model_type": text}, "vision_config": _VISION | vision}


_CLIP, _PIXTRAL = {"model_type": "clip_vision_model"}, {"model_type": "pixtral", "head_dim": 16}
_GRID: dict[str, Any] = {"image_grid_pinpoints": [[16, 16]]}
# name -> (model_type, config, the language model that --to makes inside a multimodal model; "" if there is none)
WRAPPED_DENSE: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3_5": (
        "qwen3_5",
        {"text_config": CASES["qwen3_5_text"][1], "vision_config": _QWEN_VISION | {"num_position_embeddings": 16}},
        "qwen3_5_moe_text",
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {"text_config": _HEAD | _MROPE,
         "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
        "qwen3_vl_moe_text",
    ),
    "qwen2_5_vl": ("qwen2_5_vl", {"text_config": _DENSE | _MROPE, "vision_config": _QWEN_VISION}, ""),
    "qwen2_vl": (
        "qwen2_vl",
        {"text_config": _DENSE | _MROPE, "vision_config": _QWEN_VISION | {"embed_dim": 32, "hidden_size": HIDDEN}},
        "",
    ),
    "gemma4": (
        "gemma4",
        {"text_config": CASES["gemma4_text"][1], "audio_config": None, **_GEMMA4_TOKENS,
         "vision_config": _VISION | {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16}},
        "gemma4_text",
    ),
    "gemma4_unified": (
        "gemma4_unified",
        {"text_config": CASES["gemma4_unified_text"][1],
         "audio_config": None, **_GEMMA4_TOKENS, "vision_config": {"patch_size": 4, "mm_embed_dim": 32}},
        "",
    ),
    "mistral3": (
        "mistral3", _llava("ministral3", CASES["ministral3"][1], **_PIXTRAL) | {"spatial_merge_size": 2}, "mixtral",
    ),
    "mistral3-mistral": (
        "mistral3",
        _llava("mistral", CASES["mistral"][1], **_PIXTRAL) | {"spatial_merge_size": 2, "tie_word_embeddings": False},
        "mixtral",
    ),
    "llava": ("llava", _llava("llama", _DENSE, **_CLIP), "mixtral"),
    "llava_next": ("llava_next", _llava("mistral", CASES["mistral"][1], **_CLIP) | _GRID, "mixtral"),
    "llava_next_video": ("llava_next_video", _llava("llama", _DENSE, **_CLIP) | _GRID, "mixtral"),
    "video_llava": ("video_llava", _llava("llama", _DENSE, **_CLIP), "mixtral"),
    "lfm2_vl": ("lfm2_vl", _llava("lfm2", CASES["lfm2"][1], model_type="siglip2_vision_model"), "lfm2_moe"),
    "idefics3": ("idefics3", {"text_config": _DENSE | {"model_type": "llama"}, "vision_config": _VISION}, "mixtral"),
    "smolvlm": ("smolvlm", {"text_config": _DENSE | {"model_type": "llama"}, "vision_config": _VISION}, "mixtral"),
    "llava_onevision": (
        "llava_onevision", _llava("qwen2", _DENSE, model_type="siglip_vision_model") | _GRID, "qwen2_moe",
    ),
    "internvl": ("internvl", _llava("qwen3", _HEAD, image_size=[16, 16], patch_size=[4, 4]), "qwen3_moe"),
}  # fmt: skip
DENSE_CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (kind, config) for name, (kind, config, _) in CASES.items()}
# Features that the target cannot express: (model_type, config, --to, word that the refusal names)
REFUSED: dict[str, tuple[str, dict[str, Any], str | None, str]] = {
    "llama attention_bias -> mixtral": ("llama", _DENSE | {"attention_bias": True}, None, "attention_bias"),
    "llama mlp_bias -> mixtral": ("llama", _DENSE | {"mlp_bias": True}, None, "mlp_bias"),
    "qwen2 -> mixtral": ("qwen2", _DENSE, "mixtral", "biases"),
    "llama -> qwen3_moe": ("llama", _DENSE, "qwen3_moe", "normalises"),
    "llama attention_bias -> glm4_moe": ("llama", _BIASED, "glm4_moe", "o_proj.bias"),
    "llama mlp_bias -> granitemoe": ("llama", _DENSE | {"mlp_bias": True}, "granitemoe", "mlp_bias"),
    "llama -> phimoe": ("llama", _DENSE, "phimoe", "LayerNorm"),
    "glm with biases -> mixtral": ("glm", _HEAD, "mixtral", "attention_bias"),
    "ernie4_5 use_bias -> ernie4_5_moe": ("ernie4_5", _HEAD | {"use_bias": True}, None, "proj.bias"),
    "olmo clip_qkv -> mixtral": ("olmo", _DENSE | {"clip_qkv": 4.0}, None, "clip_qkv"),
    "olmo3 sliding -> flex_olmo": ("olmo3", _DENSE | {"sliding_window": 5}, None, "sliding"),
    "mixed sliding -> glm4_moe": (
        "qwen3",
        _HEAD | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "glm4_moe",
        "sliding",
    ),
    "hyperclovax post norm -> granitemoe": ("hyperclovax", _HEAD, None, "use_post_norm"),
    "stablelm parallel -> phimoe": (
        "stablelm",
        _DENSE | {"use_parallel_residual": True},
        None,
        "use_parallel_residual",
    ),
    "jais2 mlp_bias -> phimoe": ("jais2", _HEAD, None, "mlp_bias"),
    "cohere use_qk_norm -> cohere2_moe": ("cohere", _DENSE | {"use_qk_norm": True}, None, "use_qk_norm"),
    "arcee gelu -> mixtral": ("arcee", _HEAD | {"hidden_act": "gelu"}, None, "hidden_act"),
    "partial llama3 rope -> mixtral": (
        "glm",
        _HEAD
        | {
            "attention_bias": False,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        "mixtral",
        "partial rotary",
    ),
    "bamba mlp_bias -> granitemoehybrid": ("bamba", _DENSE | _MAMBA | {"mlp_bias": True}, None, "mlp_bias"),
    "gemma4 per-layer inputs": (
        "gemma4_text",
        _HEAD | _GEMMA4_DENSE | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
        None,
        "hidden_size_per_layer_input",
    ),
    "gemma4 shared keys and values": (
        "gemma4_text",
        _HEAD | _GEMMA4_DENSE | {"num_kv_shared_layers": 1, "use_double_wide_mlp": True},
        None,
        "num_kv_shared_layers",
    ),
    "gemma2": ("gemma2", _HEAD, None, "softcap"),
    "glm4": ("glm4", _HEAD, None, "norms before and after"),
    "qwen3 mixed sliding -> qwen3_moe": (
        "qwen3",
        _DENSE | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        None,
        "sliding",
    ),
}
_SPARSE = _MOE | {"intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 16}
_LATENT = {k: v for k, v in _SPARSE.items() if k != "head_dim"} | _MLA
_INDEXER = {"index_topk": 7, "index_head_dim": 16, "index_n_heads": 4}
_GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_HY_V4 = (
    _LATENT
    | _INDEXER
    | {"n_routed_experts": 8, "routed_scaling_factor": 1.5, "hc_mult": 2, "swiglu_limit": 0.05}
    | {"indexer_types": ["full", "full", "full"]}
)
_QWEN4 = (
    _SPARSE
    | _LINEAR
    | {"layer_types": ["linear_attention", "linear_attention", "full_attention"], "num_experts": 8}
    | {"shared_expert_intermediate_size": 48, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [2]}
    | {"ngram_vocab_size_base": 50, "heads_per_ngram": 2, "split_ngram_parts": 4, "indexer_n_heads": 2}
    | {"indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2}
)
# the first layer reads all tokens, and the indexers of the others choose fewer blocks than the tests' texts have
_MINIMAX_M3 = _MOE | {
    "num_local_experts": 8, "intermediate_size": 32, "dense_intermediate_size": 96, "shared_intermediate_size": 48,
    "head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 2,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}  # fmt: skip
# layers with a window have more heads, of other sizes
_DOTS3 = _LATENT | _GROUPS | _INDEXER | {
    "head_dim": 20, "n_routed_experts": 8, "shared_experts_intermediate_size": 48, "sliding_window": 5,
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"], "swa_num_attention_heads": 6,
    "swa_num_key_value_heads": 6, "swa_q_lora_rank": 20, "swa_kv_lora_rank": 18, "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 10,
}  # fmt: skip
_QWEN_MOE = _MOE | {"moe_intermediate_size": 32, "intermediate_size": 96, "norm_topk_prob": True}
MOE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _MOE | {"intermediate_size": 96, "num_local_experts": 8}),
    "qwen2_moe": (
        "qwen2_moe",
        _QWEN_MOE | {"num_experts": 8, "shared_expert_intermediate_size": 64, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("qwen3_moe", _QWEN_MOE | {"num_experts": 8, "head_dim": 16}),
    "qwen3_moe-step": ("qwen3_moe", _QWEN_MOE | {"num_experts": 8, "head_dim": 16, "decoder_sparse_step": 2}),
    "olmoe": ("olmoe", _MOE | {"intermediate_size": 64, "num_experts": 8, "norm_topk_prob": False}),
    "glm4_moe": (
        "glm4_moe",
        _SPARSE | _GROUPS | {"n_routed_experts": 8, "use_qk_norm": True, "first_k_dense_replace": 1},
    ),
    "solar_open": ("solar_open", _SPARSE | {"n_routed_experts": 8, "routed_scaling_factor": 1.5}),
    "dots1": (
        "dots1",
        _SPARSE | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True},
    ),
    "dots3_note_text": ("dots3_note_text", _DOTS3),
    "deepseek_v3": ("deepseek_v3", _LATENT | _GROUPS | {"n_routed_experts": 8, "first_k_dense_replace": 1}),
    "deepseek_v32": (
        "deepseek_v32",
        _LATENT | _GROUPS | _INDEXER | {"n_routed_experts": 8, "first_k_dense_replace": 1},
    ),
    "glm_moe_dsa": ("glm_moe_dsa", _LATENT | _INDEXER | {"n_routed_experts": 8, "first_k_dense_replace": 1}),
    "axk1": ("axk1", _LATENT | _GROUPS | {"n_routed_experts": 8}),
    "axk2": ("axk2", _LATENT | _INDEXER | {"n_routed_experts": 8, "gated_norm_rank": 6}),
    "axk2-groups": (
        "axk2",
        _LATENT | _INDEXER | {"n_routed_experts": 8, "gated_norm_rank": 6, "n_group": 2, "topk_group": 1},
    ),
    "minimax": ("minimax", _MOE | {"num_local_experts": 8, "intermediate_size": 32, "head_dim": 16, "block_size": 8}),
    "kimi_linear": (
        "kimi_linear",
        _LATENT
        | {
            "q_lora_rank": None,
            "num_experts": 8,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "mellum": ("mellum", _SPARSE | _MIXED | {"num_experts": 8}),
    "hy_v3": ("hy_v3", _SPARSE | {"num_experts": 8}),
    "hy_v4": ("hy_v4", _HY_V4),
    "granitemoe": ("granitemoe", _MOE | _MULTIPLIED | {"intermediate_size": 32, "num_local_experts": 8}),
    "granitemoeshared": (
        "granitemoeshared",
        _MOE | {"intermediate_size": 32, "num_local_experts": 8, "shared_intermediate_size": 48},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        _MOE
        | {
            "intermediate_size": 32,
            "num_local_experts": 8,
            "shared_intermediate_size": 48,
            "position_embedding_type": "rope",
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "mamba_chunk_size": 16,
        },
    ),
    "granitemoe_swa": (
        "granitemoe_swa",
        _MOE | _MIXED | {"intermediate_size": 32, "num_local_experts": 8, "shared_intermediate_size": 48},
    ),
    "aria_text": ("aria_text", _MOE | {"intermediate_size": 32, "moe_num_experts": 8, "moe_topk": 2}),
    "gpt_oss": (
        "gpt_oss",
        _SPARSE | {"intermediate_size": 32, "num_local_experts": 8, "sliding_window": 5, "hidden_act": "silu"},
    ),
    "cohere2_moe": (
        "cohere2_moe",
        _MOE
        | _MIXED
        | {
            "num_experts": 8,
            "intermediate_size": 32,
            "num_shared_experts": 1,
            "head_dim": 16,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "tie_word_embeddings": True,
            "prefix_dense_intermediate_size": 96,
            "expert_selection_fn": "sigmoid",
        },
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        _MOE | {"num_experts": 8, "moe_topk": 2, "intermediate_size": 32, "head_dim": 16},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        _SPARSE | {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    "flex_olmo": ("flex_olmo", _MOE | {"num_experts": 8, "intermediate_size": 32, "norm_topk_prob": True}),
    "lfm2_moe": (
        "lfm2_moe",
        _SPARSE
        | {
            "num_experts": 8,
            "num_dense_layers": 1,
            "conv_L_cache": 3,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "phimoe": (
        "phimoe",
        _MOE | {"num_local_experts": 8, "intermediate_size": 32, "attention_bias": True, "lm_head_bias": True},
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        _SPARSE | _LINEAR | {"num_experts": 8, "shared_expert_intermediate_size": 32},
    ),
    "dbrx": (
        "dbrx",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        _SPARSE
        | _NEMOTRON_H
        | {
            "n_routed_experts": 8,
            "moe_shared_expert_intermediate_size": 48,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
            "routed_scaling_factor": 1.5,
        },
    ),
    "nemotron_h-latent": (
        "nemotron_h",
        _SPARSE
        | _NEMOTRON_H
        | {
            "n_routed_experts": 8,
            "moe_shared_expert_intermediate_size": 48,
            "moe_latent_size": 32,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        },
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        # its class reads the width of a linear head from the key into which it writes qk_rope_head_dim
        _LATENT
        | _GROUPS
        | {"num_experts": 8, "first_k_dense_replace": 1, "layer_group_size": 2, "q_lora_rank": None, "head_dim": 8},
    ),
    "deepseek_v2": ("deepseek_v2", _LATENT | {"n_routed_experts": 8, "first_k_dense_replace": 1}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        _LATENT | _GROUPS | {"n_routed_experts": 8, "topk_method": "group_limited_greedy", "q_lora_rank": None},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT | _GROUPS | {"n_routed_experts": 8}),
    "exaone_moe": (
        "exaone_moe",
        _SPARSE | _GROUPS | {"num_experts": 8, "first_k_dense_replace": 1, "sliding_window": 5},
    ),
    "afmoe": (
        "afmoe",
        _SPARSE
        | {
            "num_experts": 8,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "sliding_window": 5,
            "global_attn_every_n_layers": 2,
            "route_scale": 1.5,
        },
    ),
    "qwen3_next": ("qwen3_next", _SPARSE | _LINEAR | {"num_experts": 8, "shared_expert_intermediate_size": 32}),
    "jamba": (
        "jamba",
        _MOE
        | {
            "num_experts": 8,
            "intermediate_size": 32,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 8,
        },
    ),
    "llama4": (
        "llama4_text",
        _MOE
        | {
            "num_local_experts": 8,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "head_dim": 16,
            "moe_layers": [1, 2],
            "attention_chunk_size": 8,
        },
    ),
    "minimax_m2": ("minimax_m2", _MOE | {"num_local_experts": 8, "intermediate_size": 32, "head_dim": 16}),
    "minimax_m3": ("minimax_m3_vl_text", _MINIMAX_M3),
    "laguna": ("laguna", _SPARSE | {"num_experts": 8, "shared_expert_intermediate_size": 32}),
    "mimo_v2_flash": ("mimo_v2_flash", _SPARSE | {"n_routed_experts": 8, "v_head_dim": 16, "sliding_window": 5}),
    "kolibri1": (
        "kolibri1",
        _MOE
        | _MIXED
        | {"num_experts": 8, "head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
        | {"norm_topk_prob": True},
    ),
    "flint": (
        "flint",
        _SPARSE | _MIXED | {"num_experts": 8, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
    ),
    "lara_mini": (
        "lara_mini",
        _MOE
        | _LINEAR
        | {"num_experts": 8, "head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
        | {"sliding_window": 5, "layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
    ),
    "beam": (
        "beam",
        _SPARSE
        | _MIXED
        | {"num_experts": 8, "n_group": 2, "topk_group": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "sarvam_moe": ("sarvam_moe", _SPARSE | {"n_routed_experts": 8, "first_k_dense_replace": 1}),
    "sarvam_moe-bias": ("sarvam_moe", _SPARSE | {"n_routed_experts": 8, "attention_bias": True}),
    "sarvam_mla": ("sarvam_mla", _LATENT | {"n_routed_experts": 8, "first_k_dense_replace": 1, "q_lora_rank": None}),
    "qwen4_exp": ("qwen4_exp_text", _QWEN4),
}
_GEMMA4 = _MOE | {
    "num_hidden_layers": 3, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24, "intermediate_size": 48,
    "enable_moe_block": True, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1,
    "attention_k_eq_v": True, "sliding_window": 5, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
MOE_CASES["gemma4"] = ("gemma4_text", _GEMMA4)
# expert widths unlike half the hidden size, so that a transposed tensor is seen to be one
WRAPPED_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4-vision": (
        "llama4",
        {
            "text_config": MOE_CASES["llama4"][1],
            "vision_config": _VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        },
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {
            "text_config": MOE_CASES["qwen3_moe"][1] | _MROPE | {"moe_intermediate_size": 24},
            "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
    ),
    "qwen3_5_moe-vision": (
        "qwen3_5_moe",
        {
            "text_config": MOE_CASES["qwen3_5_moe"][1],
            "vision_config": _QWEN_VISION | {"num_position_embeddings": 16},
        },
    ),
    "qwen4_exp-vision": (
        "qwen4_exp",
        {"text_config": _QWEN4, "vision_config": _QWEN_VISION | {"num_position_embeddings": 16}},
    ),
    "hy_v4_vl": (
        "hy_v4_vl",
        {
            "text_config": _HY_V4
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
            "vision_config": _VISION | {"out_hidden_size": HIDDEN, "max_image_size": 16},
        },
    ),
    "glm4v_moe": (
        "glm4v_moe",
        {
            "text_config": _SPARSE
            | _GROUPS
            | {"n_routed_experts": 8}
            | {"rope_parameters": _PARTIAL["rope_parameters"] | {"mrope_section": [2, 1, 1]}},
            "vision_config": _QWEN_VISION | {"image_size": 16},
        },
    ),
    "gemma4-vision": (
        "gemma4",
        {
            "text_config": _GEMMA4,
            "vision_config": _VISION | {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16},
            "audio_config": None,
            **_GEMMA4_TOKENS,
        },
    ),
    "kimi_k25": (
        "kimi_k25",
        {
            "text_config": MOE_CASES["deepseek_v3"][1] | {"n_group": 1},
            "vision_config": _VISION | {"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 1},
            "projection_hidden_size": 32,
            "tie_word_embeddings": False,
        },
    ),
    "mistral3-mistral4": (
        "mistral3",
        {
            "text_config": _LATENT | {"model_type": "mistral4", "n_routed_experts": 8, "first_k_dense_replace": 1},
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
        },
    ),
    "mistral_large4": (
        "mistral_large4",
        {
            "text_config": {k: v for k, v in (_LATENT | _INDEXER).items() if k != "q_lora_rank"}
            | {"n_routed_experts": 8, "no_rope_layers": [1, 0, 1]},
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
        },
    ),
    "aria": ("aria", {"text_config": MOE_CASES["aria_text"][1], "vision_config": _VISION}),
    "internvl": (
        "internvl",
        {
            "text_config": MOE_CASES["qwen3_moe"][1] | {"model_type": "qwen3_moe"},
            "vision_config": _VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
        },
    ),
}
_OCR_TEXT = {k: v for k, v in _SPARSE.items() if k != "head_dim"} | {
    "n_routed_experts": 8, "mlp_layer_types": ["dense", "sparse", "sparse"],
}  # fmt: skip
_OCR_SAM = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32, "image_size": 64,
            "patch_size": 16, "output_channels": 16, "downsample_channels": [16, 32]}  # fmt: skip
WRAPPED_CASES["deepseek_ocr2"] = (
    "deepseek_ocr2",
    {
        "text_config": _OCR_TEXT,
        "vision_config": {"sam_config": _OCR_SAM, "encoder_config": _VISION | {"num_key_value_heads": 2}},
    },
)
WRAPPED_CASES["unlimited_ocr"] = (
    "unlimited_ocr", {"text_config": _OCR_TEXT, "vision_config": {"sam_config": _OCR_SAM, "encoder_config": _VISION}}
)  # fmt: skip
WRAPPED_CASES["step3p7"] = (
    "step3p7",
    {
        "text_config": _SPARSE
        | {
            "num_hidden_layers": 4, "n_routed_experts": 8, "share_expert_dim": 48, "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "num_sliding_attention_heads": 6, "moe_router_scaling_factor": 3.0, "pad_token_id": 0,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "swiglu_limits": [0.0, 0.0, 0.05, 0.0],
        },
        "vision_config": {"width": 16, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14},
        "image_token_id": 99,
    },
)  # fmt: skip
WRAPPED_CASES["minimax_m3_vl"] = (
    "minimax_m3_vl",
    {
        "text_config": _MINIMAX_M3,
        "vision_config": _VISION,
        "projector_hidden_size": 32,
        "image_token_index": 99,
        "video_token_index": 98,
    },
)
WRAPPED_CASES["dots3_note"] = (
    "dots3_note",
    {
        "text_config": _DOTS3 | {"n_group": 1},
        "vision_config": {
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 4, "moe_intermediate_size": 16, "pyramid_num_routed": [-1, 4], "adapter_in_dim": 24,
            "adapter_out_dim": HIDDEN},
        "audio_config": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "feature_size": 16, "downsample_hidden_size": 8, "adapter_input_size": 16, "adapter_out_dim": HIDDEN,
            "whisper_config": {"d_model": 16, "encoder_attention_heads": 2, "encoder_layers": 1,
                               "encoder_ffn_dim": 32, "num_mel_bins": 16}},
        "image_token_id": 97, "video_token_id": 98, "audio_token_id": 99,
    },
)  # fmt: skip
WRAPPED_CASES["nemotron_h_omni"] = (
    "nemotron_h_omni",
    {
        "text_config": MOE_CASES["nemotron_h"][1] | {"model_type": "nemotron_h"},
        "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16,
                          "video_temporal_patch_size": 2},
        "projector_hidden_size": 32,
        "vision_hidden_size": 16,
        "image_token_id": 99,
    },
)  # fmt: skip
WRAPPED_CASES["internvl-gpt_oss"] = (
    "internvl",
    WRAPPED_CASES["internvl"][1] | {"text_config": MOE_CASES["gpt_oss"][1] | {"model_type": "gpt_oss"}},
)
WRAPPED_CASES["mistral3"] = (
    "mistral3", _llava("mixtral", MOE_CASES["mixtral"][1], **_PIXTRAL) | {"spatial_merge_size": 2},
)  # fmt: skip
MOE_CASES |= WRAPPED_CASES


def row_of(case: str) -> Family:
    """The family row of an MoE case."""
    kind, config = MOE_CASES[case]
    if kind not in tables().wrapped:
        return tables().families[kind]
    rows = tables().wrapped[kind]
    return rows[config["text_config"].get("model_type", next(iter(rows)))]


def auto_class(model_type: str) -> Any:
    """The Auto class that makes models of this type."""
    return AutoModelForImageTextToText if model_type in tables().wrapped else AutoModelForCausalLM


# (case, release of transformers) whose own class cannot run, and why; nothing of ours can be compared with it
BROKEN = {("llama4-vision", (5, 24)): "transformers 5.24 asks the outputs of Llama 4's language model for images"}
_ROUTERS = "the router of the class gives the logits of the chosen experts alone"
BROKEN |= {
    (case, (5, 20)): _ROUTERS for case in ("granitemoe", "granitemoeshared", "granitemoehybrid", "aria_text", "aria")
}


def skip_where_stock_is_broken(case: str) -> None:
    """Skip a test of a case that the installed transformers itself cannot run."""
    if reason := BROKEN.get((case, release(transformers.__version__))):
        pytest.skip(reason)


def run_imports(record: Format) -> None:
    """Import what a user of the format imports; skip the test where the installed transformers is too old for that."""
    if record.imports and release(transformers.__version__) < OLDEST_PACKED:
        pytest.skip(f"packed experts need transformers {'.'.join(map(str, OLDEST_PACKED))}")
    exec(record.imports)


def skip_where_unknown(*model_types: str) -> None:
    """Skip a test of a family that the installed transformers has no class for."""
    for model_type in model_types:
        if model_type not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {model_type}")


def save_stock(path: Path, model_type: str, config: dict[str, Any], *, dtype: torch.dtype, seed: int = 0) -> Path:
    """Save a random stock model with save_pretrained; biases and norms are random too, unlike a fresh model's."""
    inside = config.get("text_config", {}).get("model_type")
    skip_where_unknown(model_type, *([inside] if inside else []))
    torch.manual_seed(seed)
    made = AutoConfig.for_model(model_type, **config)
    model = auto_class(model_type).from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # dbrx's attention lies in a module of that name; scales are around 1 as norms are
            norm = "norm" in ".".join(name.split(".")[-2:]) or name.endswith("scale")
            parameter.copy_(torch.randn_like(parameter) * (0.1 if norm else 0.08) + norm)
    model.to(dtype).save_pretrained(path, max_shard_size="200KB")
    if variants := _variants(model_type):
        name_as_on_the_hub(path, variants)
    return path


def _variants(model_type: str) -> Mapping[str, str]:
    rows = tables().wrapped.get(model_type) or {model_type: tables().families.get(model_type)}
    row = next(iter(rows.values()))
    return row.tensors.variants if row is not None else {}


def name_as_on_the_hub(path: Path, names: Mapping[str, str]) -> None:
    """Give the tensors of a checkpoint the hub's names; `names` maps the beginnings of others to the hub's."""
    for file in path.glob("*.safetensors"):
        save_file({usual_name(name, names): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    if (index := path / "model.safetensors.index.json").exists():
        stated = json.loads(index.read_text())
        stated["weight_map"] = {usual_name(name, names): file for name, file in stated["weight_map"].items()}
        index.write_text(json.dumps(stated))


def load(path: Path, *, dtype: torch.dtype = torch.float32, experts: str = "eager") -> Any:
    """The stock model, loaded strictly: a tensor that is missing, unexpected or of the wrong shape fails the test."""
    kind = json.loads((path / "config.json").read_text())["model_type"]
    model, info = auto_class(kind).from_pretrained(
        path, dtype=dtype, output_loading_info=True, experts_implementation=experts, trust_remote_code=False
    )
    wrong = {key: value for key, value in info.items() if value and key != "error_msgs"}
    assert not wrong, wrong
    return model.eval()


@torch.no_grad()
def logits(model: Any, *, length: int = 24, batch: int = 2) -> torch.Tensor:
    """Logits of seeded random tokens, [batch, length, vocabulary]; longer than every sliding window of the cases."""
    tokens = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))
    return model(input_ids=tokens).logits


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in units of the spread of `a`."""
    return float((a - b).abs().max() / a.std())


@contextmanager
def dropped(model, opened, keep):
    """Inside the block the stock model's own routers give the dropped experts the lowest logit and no correction.

    The router's matrix is known by its tensor, so the masking needs to know no family's router class.
    """
    lowest, gone, changed = -1e30, {}, []
    for layer, kept in keep.items():
        out = [e for e in range(opened.num_experts) if e not in kept]
        for key in ("router.weight", "router.correction", "router.correction_row"):
            if key not in opened.family.tensors.names:
                continue
            tensor = _in_memory(model, opened.family.name(key, layer=int(layer)))
            if key == "router.weight":
                gone[tensor.data_ptr()] = out
            else:
                changed.append((tensor, tensor.clone()))
                tensor.data[..., out] = lowest
    stock = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        out = stock(x, weight, bias)
        if weight.data_ptr() in gone:
            out[..., gone[weight.data_ptr()]] = lowest
        return out

    torch.nn.functional.linear = linear
    try:
        yield model
    finally:
        torch.nn.functional.linear = stock
        for tensor, before in changed:
            tensor.data.copy_(before)


def _in_memory(model, name):
    """The stock model's tensor of that name on disk, under the name that transformers gives it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    state = dict(model.state_dict(keep_vars=True))
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    return state[rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]]
