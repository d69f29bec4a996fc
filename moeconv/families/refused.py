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
        (
            "starcoder2",
            "gpt2",
            "gpt-sw3",
            "gpt_neo",
            "gpt_neox",
            "gpt_neox_japanese",
            "gpt_bigcode",
            "opt",
            "bloom",
            "falcon",
            "phi",
            "phi-msft",
            "gptj",
            "mpt",
            "biogpt",
            "codegen",
            "ctrl",
            "openai-gpt",
            "persimmon",
            "xglm",
        ),
        "it has LayerNorms and an FFN without a gate, which no MoE family has together",
    ),
    **dict.fromkeys(
        ("apertus", "apertus1p5", "apertus1p5_text"), "its activation has trained parameters, which no MoE family has"
    ),
    "falcon_h1": "its layers run attention and a state-space block side by side, which no MoE family does",
    "lfm3": "its norms after both blocks and the gate of its attention have no place in lfm2_moe, the family beside it",
    "olmo_hybrid": "it mixes attention with norms after each block and linear attention with norms before, which no "
    "MoE family does",
    "cpmant": "its attention scores have a trained bias of the distance, which no MoE family has",
    "dory": "it normalises the residual stream after every block, which no MoE family does",
    "modernbert-decoder": "it normalises its embeddings and its first attention has no norm, unlike any MoE family",
    "cohere_compass_text": "its full layers rotate by other parameters than its sliding ones, unlike cohere2_moe",
    **dict.fromkeys(("muse_glimmer", "muse_glimmer_text"), _SANDWICH),
    **dict.fromkeys(("glm4v", "glm46v", "glm_ocr", "glmga"), f"its language model is a GLM-4: {_SANDWICH}"),
    "aya_vision": "its class leaves out the factor of its language model's logits, so that the language model inside "
    "and alone do not compute the same",
    "shieldgemma2": f"its language model is a Gemma 3: {_SANDWICH}",
    "exaone4_5": "its language model is EXAONE 4: no MoE family has post-norms and per-head query and key norms",
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo"),
        "its language model is an OPT, whose LayerNorms and FFN without a gate no MoE family has together",
    ),
    "fuyu": "its language model is a Persimmon, whose LayerNorms and FFN without a gate no MoE family has together",
    "bitnet": "its norms inside attention and FFN have no place in an MoE family",
    "diffllama": "differential attention is in no MoE family",
}
_ENCODER_DECODER = "it is an encoder-decoder model, but moeconv supports only decoders"
_BERT = "it is an encoder with a head for causal text, with LayerNorms and an FFN without a gate"
_RECURRENT = "its layers are recurrent, with states that no MoE family has"
_DRAFT = "it drafts tokens from the hidden states of another model, so that no text measures it alone"
_TALKER = (
    "its talker is a second Mixture-of-Experts that reads what the thinker computes, so text cannot measure its experts"
)
_BLOCKS = "its layers read the outputs of all blocks before them, so that it cannot be run layer by layer"
_CROSS = "its language model has cross-attention to images or proteins between its layers, which no MoE family has"
_NOT_TEXT = "what it reads or writes is not text alone"
# reason -> model_types of transformers that moeconv does not accept for that reason
_REASONS: dict[str, tuple[str, ...]] = {
    # Mixtures-of-Experts
    "its text experts and vision experts share one count in config.json and one numbering on disk, and text cannot "
    "measure the vision experts": ("ernie4_5_vl_moe",),
    _TALKER: ("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    "its attention has experts too, and config.json has one count and one top-k for both": ("jetmoe",),
    "its router chooses among the experts and one that skips the layer, and passes a state on to the next router":
        ("zaya",),
    "its experts are single neurons that two halves of a key select, so that their number is a square": ("doge",),
    "it is an encoder-decoder Mixture-of-Experts, but moeconv supports only decoders":
        ("nllb-moe", "switch_transformers"),
    "it classifies tokens with attention in both directions, and is no language model": ("openai_privacy_filter",),
    "it denoises blocks of tokens, and the loss of a text says nothing about that": ("diffusion_gemma",),
    "its first layers choose experts by the id of the token, from a table that no rule can fill anew, and config.json "
    "has one count for all layers, so that none can be removed":
        ("deepseek_v4",),
    "its layers mix residual streams and pool the keys of an indexer, and no row describes the tensors of both":
        ("glm5_next", "glm5_next_text"),
    "it normalises the output of each expert, so that what an expert adds does not follow from its weights alone":
        ("muse_spark", "muse_spark_text"),
    "its routers also choose experts without weights, which pass their input on, so that they have more rows than the "
    "layers have experts":
        ("longcat_flash",),
    "its router scores the shared experts together with the routed ones, in one matrix":
        ("inkling_mm_model", "inkling_text"),
    _BLOCKS: ("inkling2", "inkling2_text"),
    f"it runs its layers in loops, and {_BLOCKS.removeprefix('its ')}": ("inkling2_loop", "inkling2_loop_text"),
    "its experts are of a network that finds the joints of people in images": ("vitpose_backbone",),
    # dense language models
    _ENCODER_DECODER: (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "florence2", "marian", "mbart", "mvp", "pegasus",
        "plbart", "prophetnet", "t5gemma2", "udop", "vision-encoder-decoder",
    ),
    _BERT: (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl",
        "xmod",
    ),
    _RECURRENT: ("falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"),
    "all its attention layers share one block of weights, so that an FFN is not of one layer": ("zamba", "zamba2"),
    "it runs its layers in loops, so that an expert would be of several layers": ("hrm_text",),
    "it reads bytes in patches, with attention between two levels": ("blt",),
    "its layers are reversible, and its attention sorts tokens by hashes": ("reformer",),
    "its attention runs two streams with relative positions": ("xlnet",),
    _DRAFT: ("gemma4_assistant", "gemma4_unified_assistant"),
    # models of images, audio and actions
    _CROSS: ("evolla", "idefics", "mllama"),
    _NOT_TEXT: (
        "blip", "chameleon", "cosmos3_edge", "cosmos3_omni", "emu3", "git", "janus", "kosmos-2",
        "kosmos-2.5", "moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "pi0", "pix2struct",
        "pp_formulanet", "qwen2_5_omni_thinker", "trocr", "whisper",
    ),
}  # fmt: skip
# model_type that moeconv does not accept -> why
UNSUPPORTED: dict[str, str] = {name: reason for reason, names in _REASONS.items() for name in names}
# multimodal models of transformers around dense language models, whose tensors no row describes
_INSIDE = (
    "cohere2_vision", "cohere_compass", "deepseek_vl", "deepseek_vl_hybrid", "fast_vlm", "got_ocr2",
    "granite4_vision", "granite_docling", "hunyuan_vl", "hyperclovax_vision_v2", "idefics2",
    "lfm3_vl", "lighton_ocr", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "molmo2", "ovis2",
    "paddleocr_vl", "paligemma", "perception_lm", "phi4_multimodal", "pp_chart2table", "qianfan_ocr",
    "video_llama_3",
)  # fmt: skip
WITHOUT_ROW: dict[str, str] = dict.fromkeys(
    _INSIDE, "it is a multimodal model around a dense language model, and no row states which of its tensors those are"
)


def refusals() -> dict[str, str]:
    """Every model_type that is refused by name -> why."""
    return {**WITHOUT_TARGET, **UNSUPPORTED, **WITHOUT_ROW}
