"""Families and conversions that moeconv cannot support, each with the reason that the error message states."""

from __future__ import annotations

_QK_NORM = "qwen3_moe normalises queries and keys, which cannot be made an identity"
_NO_QK_NORM = "it has no norms for queries and keys"
_LAYER_NORM = "phimoe's LayerNorm subtracts the mean, the source's RMSNorm does not"
_SANDWICH = "no MoE family has its norms before and after both blocks without also changing its attention"
# (source, target) of conversions that are known to be impossible -> the reason in the error message
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

# dense family that no Mixture-of-Experts family of transformers can express -> what the latter lack
WITHOUT_TARGET: dict[str, str] = {
    **dict.fromkeys(("glm4", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), _SANDWICH),
    "exaone4": "no MoE family has post-norms and per-head query and key norms together",
    **dict.fromkeys(("gemma2", "vaultgemma"), "it caps attention scores (softcap), which no MoE family does"),
    "nanochat": "its FFN has no gate and it caps its logits (softcap), which no MoE family combines",
    **dict.fromkeys(
        ("starcoder2", "gpt2", "gpt_neox", "gpt_bigcode", "opt", "bloom", "falcon", "phi", "gptj", "mpt"),
        "it has LayerNorms and an FFN without a gate, which no MoE family has together",
    ),
    "apertus": "its activation has trained parameters, which no MoE family has",
    "bitnet": "its norms inside attention and FFN have no place in an MoE family",
    "diffllama": "differential attention is in no MoE family",
}
# model_type of a multimodal Mixture-of-Experts that moeconv does not accept -> why
_TALKER = (
    "its talker is a second Mixture-of-Experts that reads what the thinker computes, so text cannot measure its experts"
)
UNSUPPORTED = {
    "ernie4_5_vl_moe": "its text experts and vision experts share one count in config.json and one numbering on disk, "
    "and text cannot measure the vision experts",
    "qwen3_omni_moe": _TALKER,
    "qwen3_omni_moe_thinker": _TALKER,
}
