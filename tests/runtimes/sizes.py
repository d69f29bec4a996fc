"""Small configs of every Mixture-of-Experts family, and of a dense source for each upcycle, in sizes that runtimes have
kernels for: heads of 32, widths of whole blocks, latent attention as published.

Windows are shorter than the prompts and settings are unlike the classes' defaults, so that a key that a runtime does
not find is seen in what it computes.
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "initializer_range": 0.08, "rms_norm_eps": 1e-5,
}  # fmt: skip
_MOE = COMMON | {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
# families whose experts are as wide as intermediate_size says
_ONE_WIDTH = {
    "mixtral", "olmoe", "minimax_m2", "granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa", "phimoe",
    "cohere2_moe", "flex_olmo", "hunyuan_v1_moe", "gpt_oss", "jamba", "llama4_text", "aria_text",
}  # fmt: skip
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
# the sizes that vLLM's latent attention has a kernel for
_MLA = {"num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128}  # fmt: skip
_HEAD = {"head_dim": 32}
_SIGMOID = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
            "norm_topk_prob": True, "routed_scaling_factor": 1.5}  # fmt: skip
_GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
_MULTIPLIED = {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.6,
               "attention_multiplier": 0.3}  # fmt: skip
_LOCAL = {"num_local_experts": 8}
_EXPERTS = {"num_experts": 8}
_WINDOW = {"sliding_window": 16}
_MIXED = _WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_CONV = {"conv_L_cache": 3, "layer_types": ["conv", "full_attention", "conv"]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2, "mamba_chunk_size": 16}
_GEMMA4 = _WINDOW | {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"], "head_dim": 32, "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip

# model_type -> config of a model that prune takes experts from
MOE: dict[str, dict[str, Any]] = {
    kind: {k: v for k, v in (_MOE | config).items() if kind not in _ONE_WIDTH or k != "moe_intermediate_size"}
    for kind, config in {
        "mixtral": _LOCAL | _ROPE,
        "qwen2_moe": _EXPERTS | _ROPE | {"norm_topk_prob": False, "shared_expert_intermediate_size": 160},
        "qwen3_moe": _EXPERTS | _HEAD | _ROPE | {"norm_topk_prob": True},
        "olmoe": _EXPERTS | _ROPE | {"norm_topk_prob": False, "num_key_value_heads": 4},
        "dots1": _SIGMOID | _HEAD | _ROPE | {"num_key_value_heads": 4},
        "glm4_moe": _SIGMOID | _HEAD | {"num_nextn_predict_layers": 0, "attention_bias": True, "use_qk_norm": True},
        "solar_open": _SIGMOID | _HEAD | {"first_k_dense_replace": 0},
        "deepseek_v3": _SIGMOID | _GROUPS | _MLA,
        "deepseek_v2": _MLA | {"n_routed_experts": 8, "first_k_dense_replace": 1, "routed_scaling_factor": 2.0},
        "glm4_moe_lite": {k: v for k, v in _SIGMOID.items() if k != "first_k_dense_replace"} | _MLA,
        "ernie4_5_moe": _HEAD | _ROPE | {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
        "minimax_m2": _HEAD | _LOCAL,
        "hy_v3": _HEAD | _EXPERTS,
        "exaone_moe": _HEAD | _EXPERTS | _WINDOW | _GROUPS | {"first_k_dense_replace": 1},
        "afmoe": _HEAD | _EXPERTS | _WINDOW | {"num_dense_layers": 1, "num_shared_experts": 1, "route_scale": 1.5,
                                               "global_attn_every_n_layers": 2},
        "granitemoe": _LOCAL | _MULTIPLIED | _ROPE,
        "granitemoeshared": _LOCAL | _MULTIPLIED | {"shared_intermediate_size": 96},
        "granitemoehybrid": _LOCAL | _MULTIPLIED | _MAMBA | {
            "shared_intermediate_size": 96, "position_embedding_type": "rope",
            "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        "granitemoe_swa": _LOCAL | _MULTIPLIED | _MIXED | {"shared_intermediate_size": 96},
        "phimoe": _LOCAL | _ROPE | {"attention_bias": True, "lm_head_bias": True},
        "lfm2_moe": _EXPERTS | _CONV | {"num_dense_layers": 1},
        "cohere2_moe": _HEAD | _EXPERTS | _MIXED | {"tie_word_embeddings": True, "expert_selection_fn": "sigmoid"},
        "flex_olmo": _EXPERTS | _ROPE | {"norm_topk_prob": True},
        "hunyuan_v1_moe": _HEAD | _EXPERTS | {"moe_topk": 2},
        "mellum": _HEAD | _EXPERTS | _MIXED,
        "gpt_oss": _HEAD | _LOCAL | _MIXED | {"intermediate_size": 96},
        "qwen3_next": _HEAD | _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 96},
        "qwen3_5_moe_text": _HEAD | _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 96},
        "nemotron_h": _HEAD | {
            "n_routed_experts": 8, "moe_shared_expert_intermediate_size": 96, "mamba_num_heads": 8,
            "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16, "routed_scaling_factor": 1.5,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"]},
        "jamba": _EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_d_conv": 4,
                             "mamba_expand": 2, "mamba_dt_rank": 8, "use_mamba_kernels": False},
        "llama4_text": _HEAD | _LOCAL | {"intermediate_size": 96, "intermediate_size_mlp": 256, "moe_layers": [1, 2],
                                         "num_experts_per_tok": 1, "attention_chunk_size": 16},
        "laguna": _HEAD | _EXPERTS | {"shared_expert_intermediate_size": 96},
        "mimo_v2_flash": _HEAD | _WINDOW | {"n_routed_experts": 8, "v_head_dim": 32},
        "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "intermediate_size": 96, "moe_num_shared_experts": 1},
        "gemma4_text": _GEMMA4 | {"num_experts": 8, "top_k_experts": 2, "enable_moe_block": True},
    }.items()
}  # fmt: skip
MOE["dbrx"] = {
    "vocab_size": 2048, "d_model": 128, "n_heads": 4, "n_layers": 3, "max_seq_len": 256,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 500.0},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2},
}  # fmt: skip

# target -> (dense model_type, its config): the source that upcycles to the target by the fewest folds
UPCYCLED: dict[str, tuple[str, dict[str, Any]]] = {
    target: (source, COMMON | config)
    for target, (source, config) in {
        "mixtral": ("llama", _ROPE), "qwen2_moe": ("qwen2", _ROPE), "qwen3_moe": ("qwen3", _HEAD | _ROPE),
        "dots1": ("qwen3", _HEAD | {"num_key_value_heads": 4}), "mellum": ("qwen3", _HEAD), "hy_v3": ("qwen3", _HEAD),
        "glm4_moe": ("glm", _HEAD), "solar_open": ("llama", {}), "granitemoe": ("granite", _MULTIPLIED),
        "granitemoeshared": ("granite", _MULTIPLIED), "granitemoe_swa": ("granite_swa", _MULTIPLIED | _MIXED),
        "granitemoehybrid": ("bamba", _MAMBA | {"attn_layer_indices": [1]}), "aria_text": ("llama", {}),
        "gpt_oss": ("llama", {}), "dbrx": ("olmo", {"clip_qkv": 1.0}), "ernie4_5_moe": ("ernie4_5", _HEAD | _ROPE),
        "cohere2_moe": ("cohere2", _HEAD | _MIXED | {"tie_word_embeddings": True}),
        "hunyuan_v1_moe": ("hunyuan_v1_dense", _HEAD), "flex_olmo": ("olmo2", _ROPE), "lfm2_moe": ("lfm2", _CONV),
        "qwen3_5_moe_text": ("qwen3_5_text", _HEAD | _LINEAR),
        "nemotron_h": ("nemotron_h", _HEAD | {
            "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]}),
        "gemma4_text": ("gemma4_text", _GEMMA4), "deepseek_v3": ("youtu", _MLA | {"tie_word_embeddings": False}),
        "phimoe": ("stablelm", {"use_qkv_bias": True, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    }.items()
}  # fmt: skip
