"""Which dense family becomes which MoE family, exactly: a row a pair, and the pairs that cannot be.

Everything that two families' own rows say (tensor names, fused and packed tensors, rotary order, norm offsets, rope and
sliding windows) is derived from them; a pair adds config keys and names the folds that it takes.
"""

from __future__ import annotations

from typing import Any

from moeconv.errors import InputError, closest, escape
from moeconv.families.moe import MOE
from moeconv.families.spec import Family, Pair

_ZERO_128 = "zero shared expert of 128 neurons: the family cannot be without one"
_ZERO_FULL = "zero shared expert as wide as a routed one: the family cannot be without one"
_SILU = ("only_silu",)

# Routers by families, every key said: weights of identical experts must sum to 1.
_QWEN: dict[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1}
_QWEN2_MOE = _QWEN | {"shared_expert_intermediate_size": 128}
_SIGMOID: dict[str, Any] = {
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
_GLM4 = _SIGMOID | {"num_nextn_predict_layers": 0}
_HY_V3: dict[str, Any] = {"router_scaling_factor": 1.0, "num_shared_experts": 1, "enable_moe_fp32_combine": True}
_NO_SHARED: dict[str, Any] = {"shared_intermediate_size": 0}
_HYBRID: dict[str, Any] = {"shared_intermediate_size": 128, "position_embedding_type": "rope"}
_ERNIE: dict[str, Any] = {"moe_num_shared_experts": 0, "use_bias": False, "moe_norm_min": 1e-12}
_COHERE: dict[str, Any] = {
    "expert_selection_fn": "softmax", "num_shared_experts": 0, "shared_expert_combination_strategy": "sum",
    "norm_topk_prob": True, "prefix_dense_intermediate_size": None,
    "prefix_dense_sliding_window_pattern": 4,  # 1 would make dense layers rotate whatever their kind
}  # fmt: skip
_GPT_OSS: dict[str, Any] = {"swiglu_alpha": 1.0, "swiglu_limit": 1e30}
_PHIMOE: dict[str, Any] = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0, "lm_head_bias": False}
_MULTIPLIERS = dict.fromkeys(
    ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
)  # config keys that granite_multipliers uses up
_MINICPM = dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base", "head_dim"))


PAIRS: tuple[Pair, ...] = (
    # -- mixtral: no biases, no query or key norms, one window for all layers
    Pair("llama", "mixtral", default=True),
    Pair("mistral", "mixtral", default=True),
    Pair("phi3", "mixtral", default=True, note="fused tensors are split; partial rotary through longrope factors"),
    Pair(
        "gemma",
        "mixtral",
        default=True,
        note="norms plus 1, embeddings times sqrt(hidden_size)",
        rename={"hidden_activation": None},
        folds=("embedding_root", "legacy_gelu"),
    ),
    Pair("helium", "mixtral", default=True, note="rotary order"),
    Pair("arcee", "mixtral", default=True, note="gate = up, relu: relu(x)^2 = relu(x) * x", folds=("squared_relu",)),
    Pair(
        "ministral3",
        "mixtral",
        default=True,
        note="up to original_max_position_embeddings",
        folds=("below_long_context",),
    ),
    Pair("internlm3", "mixtral", default=True),
    Pair("iquestcoder", "mixtral", default=True),
    Pair("glm", "mixtral", note="without biases; rotary order, partial rotary through longrope factors"),
    Pair("ernie4_5", "mixtral", note="rotary order"),
    Pair(
        "granite",
        "mixtral",
        note="multipliers folded into weights",
        rename=_MULTIPLIERS,
        folds=("granite_multipliers",),
    ),
    Pair(
        "olmo",
        "mixtral",
        default=True,
        note="LayerNorm as RMSNorm of a centred residual stream; the head is untied",
        folds=("centred_residual",),
    ),
    # -- qwen2_moe: query, key and value biases, sliding layers by name
    Pair("llama", "qwen2_moe", note=_ZERO_128, config=_QWEN2_MOE | {"qkv_bias": False}),
    Pair("qwen2", "qwen2_moe", default=True, note=_ZERO_128, config=_QWEN2_MOE | {"qkv_bias": True}),
    Pair(
        "seed_oss", "qwen2_moe", default=True, note=_ZERO_128, config=_QWEN2_MOE, rename={"attention_bias": "qkv_bias"}
    ),
    Pair("ministral", "qwen2_moe", default=True, note=_ZERO_128, config=_QWEN2_MOE | {"qkv_bias": False}),
    Pair("cwm", "qwen2_moe", default=True, note=_ZERO_128, config=_QWEN2_MOE | {"qkv_bias": False}),
    # -- qwen3 and its neighbours: query and key norms
    Pair("qwen3", "qwen3_moe", default=True, config=_QWEN),
    Pair("qwen3", "dots1", with_shared=True, note=_ZERO_FULL, config=_SIGMOID),
    Pair("qwen3", "mellum", config={"norm_topk_prob": True, "num_nextn_predict_layers": 0}),
    Pair("qwen3", "hy_v3", note=_ZERO_FULL, config=_HY_V3),
    # -- glm4_moe and solar_open: sigmoid routers with a correction bias
    Pair(
        "llama",
        "glm4_moe",
        with_shared=True,
        note=_ZERO_FULL,
        config=_GLM4 | {"use_qk_norm": False, "attention_bias": False},
    ),
    Pair("qwen2", "glm4_moe", note=_ZERO_FULL, config=_GLM4 | {"use_qk_norm": False, "attention_bias": True}),
    Pair("qwen3", "glm4_moe", note=_ZERO_FULL, config=_GLM4 | {"use_qk_norm": True}),
    Pair("seed_oss", "glm4_moe", note=_ZERO_FULL, config=_GLM4 | {"use_qk_norm": False}),
    Pair("glm", "glm4_moe", default=True, note=f"rotary order; {_ZERO_FULL}", config=_GLM4 | {"use_qk_norm": False}),
    Pair("phi3", "glm4_moe", note=_ZERO_FULL, config=_GLM4 | {"use_qk_norm": False, "attention_bias": False}),
    Pair("llama", "solar_open", note=_ZERO_FULL, config=_SIGMOID | {"attention_bias": False}),
    Pair("qwen2", "solar_open", note=_ZERO_FULL, config=_SIGMOID | {"attention_bias": True}),
    # -- granite: multipliers, packed experts
    Pair("granite", "granitemoe", default=True),
    Pair("granite", "granitemoeshared", config=_NO_SHARED),
    Pair("granite", "granitemoehybrid", note=_ZERO_128, config=_HYBRID, folds=("attention_kinds",)),
    Pair(
        "granitemoehybrid",
        "granitemoehybrid",
        default=True,
        note=f"state-space layers included; {_ZERO_128}",
        config={"shared_intermediate_size": 128},
        rename=dict.fromkeys(("shared_intermediate_size", "num_local_experts", "num_experts_per_tok")),
    ),
    Pair(
        "bamba",
        "granitemoehybrid",
        default=True,
        note=f"state-space layers included; partial rotary through longrope factors; {_ZERO_128}",
        config=_HYBRID,
        # what only generation and training look at, and what layer_types says
        rename=dict.fromkeys(("attn_layer_indices", "num_logits_to_keep", "z_loss_coefficient")),
        folds=("neutral_multipliers",),
    ),
    Pair("granite_swa", "granitemoe_swa", default=True, config=_NO_SHARED),
    Pair("hyperclovax", "granitemoe", default=True, note="without post norms", folds=("logits_times",)),
    Pair("llama", "granitemoe", folds=("neutral_multipliers",)),
    Pair("llama", "granitemoeshared", config=_NO_SHARED, folds=("neutral_multipliers",)),
    Pair("llama", "granitemoehybrid", note=_ZERO_128, config=_HYBRID, folds=("neutral_multipliers", "attention_kinds")),
    Pair("ministral", "granitemoe_swa", note="attention sinks off", config=_NO_SHARED, folds=("neutral_multipliers",)),
    Pair(
        "smollm3",
        "granitemoe_swa",
        default=True,
        note="layers without rotary embeddings, attention sinks off",
        config=_NO_SHARED,
        folds=("neutral_multipliers",),
    ),
    # -- experts with layouts of their own
    Pair("llama", "aria_text", note=_ZERO_FULL, config={"moe_num_shared_experts": 1}, folds=_SILU),
    Pair(
        "llama",
        "gpt_oss",
        note="the only family with expert biases; attention sinks off",
        config=_GPT_OSS,
        rename={"mlp_bias": None},
        folds=("expert_biases",),
    ),
    Pair(
        "qwen2",
        "gpt_oss",
        note="attention sinks off",
        config=_GPT_OSS | {"attention_bias": True},
        folds=("expert_biases",),
    ),
    # -- siblings
    Pair(
        "olmo",
        "dbrx",
        note="with clip_qkv; the head is untied",
        config={"moe_normalize_expert_weights": 1.0, "moe_jitter_eps": None},
        rename={"rms_norm_eps": None},
        folds=("untied_head", "unit_norms", "dbrx_words"),
    ),
    Pair("llama", "ernie4_5_moe", note="rotary order", config=_ERNIE),
    Pair("ernie4_5", "ernie4_5_moe", default=True, config=_ERNIE),
    Pair("cohere2", "cohere2_moe", default=True, config=_COHERE),
    Pair(
        "cohere",
        "cohere2_moe",
        default=True,
        note="every layer slides, with a window as long as the context",
        config=_COHERE,
        folds=("all_layers_slide",),
    ),
    Pair("hunyuan_v1_dense", "hunyuan_v1_moe", default=True, note=_ZERO_FULL),
    Pair("olmo2", "flex_olmo", default=True, config={"norm_topk_prob": True}),
    Pair("olmo3", "flex_olmo", default=True, note="without sliding layers", config={"norm_topk_prob": True}),
    Pair(
        "lfm2",
        "lfm2_moe",
        default=True,
        config={"norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True},
        rename=dict.fromkeys(
            ("block_ff_dim", "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim",
             "full_attn_idxs", "tie_embedding")
        ),
        tolerance=1e-3,
    ),
    Pair(
        "qwen3_5_text",
        "qwen3_5_moe_text",
        default=True,
        note=_ZERO_128,
        config={"shared_expert_intermediate_size": 128},
        rename={"intermediate_size": None},
    ),
    Pair(
        "nemotron_h",
        "nemotron_h",
        default=True,
        note=f"layers of kind mlp become moe; {_ZERO_128}",
        config=_SIGMOID
        | {"moe_shared_expert_intermediate_size": 128, "moe_latent_size": None, "num_nextn_predict_layers": 0},
        rename={"hybrid_override_pattern": None},
    ),
    Pair(
        "gemma4_text",
        "gemma4_text",
        default=True,
        note="zero dense branch of 128 neurons, or the whole FFN in it (--shared-experts full)",
        config={"intermediate_size": 128},
        folds=("second_branch",),
        tolerance=1e-3,
        unless="its FFNs give outputs whose variance is not well above rms_norm_eps, as those of tiny random models",
    ),
    # -- latent attention
    Pair(
        "youtu", "deepseek_v3", default=True, note=_ZERO_FULL, config=_SIGMOID | {"num_nextn_predict_layers": 0},
        rename={"head_dim": None},
    ),
    Pair(
        "minicpm3",
        "deepseek_v3",
        default=True,
        note=f"multipliers folded into weights, rotary order; {_ZERO_FULL}",
        config=_SIGMOID | {"num_nextn_predict_layers": 0},
        rename=_MINICPM,
        folds=("minicpm_multipliers", "pairs_to_interleaved_mla"),
    ),
    # -- LayerNorm
    Pair(
        "stablelm",
        "phimoe",
        default=True,
        note="top-2 only; partial rotary through longrope factors",
        config=_PHIMOE,
        rename={"layer_norm_eps": "rms_norm_eps", "use_qkv_bias": "attention_bias"},
    ),
    Pair(
        "jais2",
        "phimoe",
        default=True,
        note="top-2 only; gate = up, relu",
        config=_PHIMOE,
        rename={"layer_norm_eps": "rms_norm_eps"},
        folds=("squared_relu",),
    ),
    Pair(
        "nemotron",
        "phimoe",
        default=True,
        note="top-2 only; gate = up, relu; norms plus 1; partial rotary through longrope factors",
        config=_PHIMOE,
        rename={"norm_eps": "rms_norm_eps"},
        folds=("squared_relu",),
    ),
)  # fmt: skip

_QK_NORM = "qwen3_moe normalises queries and keys, which cannot be made an identity"
_NO_QK_NORM = "it has no norms for queries and keys"
_LAYER_NORM = "phimoe's LayerNorm subtracts the mean, the source's RMSNorm does not"
_SANDWICH = "no MoE family has its norms before and after both blocks"
# Known impossible conversions, with the reason that a user should read.
IMPOSSIBLE: dict[tuple[str, str], str] = {
    ("qwen2", "mixtral"): "mixtral has no slot for the query, key and value biases of qwen2",
    ("seed_oss", "mixtral"): "mixtral has no slot for the query, key and value biases of seed_oss",
    ("llama", "qwen3_moe"): _QK_NORM,
    ("mistral", "qwen3_moe"): _QK_NORM,
    ("qwen2", "qwen3_moe"): _QK_NORM,
    ("qwen3", "mixtral"): "mixtral does not normalise queries and keys",
    ("qwen3", "qwen2_moe"): "qwen2_moe does not normalise queries and keys",
    ("llama", "phimoe"): _LAYER_NORM,
    ("mistral", "phimoe"): _LAYER_NORM,
    ("qwen2", "phimoe"): _LAYER_NORM,
    ("qwen3", "phimoe"): _LAYER_NORM,
    ("qwen3", "granitemoe"): _NO_QK_NORM,
}

# Dense families that nothing stock can host, with the difference.
HOMELESS: dict[str, str] = {
    **dict.fromkeys(("glm4", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), _SANDWICH),
    "exaone4": "no MoE family has post-norms and per-head query and key norms together",
    **dict.fromkeys(
        ("gemma2", "vaultgemma", "nanochat"), "its attention or logits pass a softcap, which no MoE family has"
    ),
    **dict.fromkeys(
        ("starcoder2", "gpt2", "gpt_neox", "gpt_bigcode", "opt", "bloom", "falcon", "phi", "gptj", "mpt"),
        "its FFN is ungated and has biases, which no MoE family has",
    ),
    "apertus": "its activation has trained parameters, which no MoE family has",
    "bitnet": "its norms inside attention and FFN have no place in an MoE family",
    "diffllama": "differential attention is in no MoE family",
}


def find_pair(source: Family, to: str | None, *, shared: bool = False) -> Pair:
    """The row for `source` and the target named `to`; None is the default target, with `shared` one that has a shared
    expert. Raises InputError."""
    if source.kind != "dense":
        raise InputError(
            f"{source.model_type} is already a Mixture-of-Experts family",
            hint="upcycle takes a dense checkpoint; see `moeconv families`.",
        )
    mine = [p for p in PAIRS if p.source == source.model_type]
    rows = [p for p in mine if (p.default if to is None else p.target == to)]
    if to is None and shared and rows and not MOE[rows[0].target].shared_width:
        able = [p for p in mine if MOE[p.target].shared_width]
        rows = [p for p in able if p.with_shared] or able or rows
    if rows:
        return rows[0]
    can = ", ".join(p.target for p in mine) or "nothing yet"
    if to is not None and to not in MOE:
        named = {word: row.model_type for row in MOE.values() for word in (row.model_type, row.architecture)}
        close = closest(to, named)
        meant = f"Did you mean {named[close]}? " if close else ""
        raise InputError(
            f"--to {escape(to)}: no such Mixture-of-Experts family",
            hint=f"{meant}{source.model_type} can become: {can}.",
        )
    why = IMPOSSIBLE.get((source.model_type, to or ""), f"no exact mapping from {source.model_type} to it is known")
    raise InputError(f"cannot write {source.model_type} as {escape(to)}: {why}", hint=f"It can become: {can}.")


def promise(source: str, target: str) -> tuple[float, str]:
    """(of the logits' spread in float32, what the pair's arithmetic allows, 0 where no row says it; of which weights it
    is not exact)."""
    found = ((p.tolerance, p.unless) for p in PAIRS if (p.source, p.target) == (source, target))
    return next(found, (0.0, ""))
