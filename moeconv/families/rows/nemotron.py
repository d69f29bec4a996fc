"""NVIDIA: Nemotron, and Nemotron-H with a block of one kind in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.families import placement
from moeconv.families.blocks import (
    ATTENTION_BIAS,
    BLOCK,
    HYBRID_WHERE,
    LAYER,
    MAMBA,
    NO_BIAS,
    NORM_BIAS,
    UNGATED_FFN,
    dense_row,
)
from moeconv.families.expert_blocks import GROUPED, ONE_SHARED_EXPERT, ZERO_SHARED_128, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import (
    LIST,
    WHOLE,
    WORD,
    Attention,
    ConfigKeys,
    Elsewhere,
    Experts,
    Layers,
    Prediction,
    Tensors,
)
from moeconv.families.shapes import Size, config_key
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.types import JsonObject

NEMOTRON_H_SIZES: Mapping[str, Size] = {
    "mamba_heads": config_key("mamba_num_heads"),
    "mamba_inner": lambda get, _place: get("mamba_num_heads") * get("mamba_head_dim"),
    "mamba_groups": config_key("n_groups"),
    "mamba_state": config_key("ssm_state_size"),
    "mamba_kernel": config_key("conv_kernel"),
    "latent": lambda get, _place: get("moe_latent_size") or get("hidden_size"),
}
NEMOTRON = dense_row(
    "nemotron",
    "NemotronForCausalLM",
    config=ConfigKeys(
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
        neutral=NO_BIAS,
    ),
    tensors=Tensors(BLOCK | NORM_BIAS | ATTENTION_BIAS | UNGATED_FFN, norm_offset=1.0),
    attention=Attention(partial=0.5),
)
_NEMOTRON = "backbone.layers.{L}."
_MIXER = _NEMOTRON + "mixer."
NEMOTRON_H_BLOCK = {
    "embedding.tokens": "backbone.embeddings.weight",
    "embedding.lm_head": "lm_head.weight",
    "norm.final": "backbone.norm_f.weight",
    "norm.ffn": _NEMOTRON + "norm.weight",
    **{f"attention.{p}": _MIXER + f"{p}_proj.weight" for p in "qkvo"},
    **{key: name.replace(LAYER + "mamba.", _MIXER) for key, name in MAMBA.items()},
    **{f"ffn.{p}": _MIXER + f"{p}_proj.weight" for p in ("up", "down")},
    **{f"ffn.{p}_bias": _MIXER + f"{p}_proj.bias" for p in ("up", "down")},
}
# layers of one block each; the config keys of a Mixture-of-Experts are there even if no layer has one
NEMOTRON_H_CONFIG: JsonObject = {
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
NEMOTRON_H_WHERE = HYBRID_WHERE | {"ffn": frozenset({"mlp"}), "latent": frozenset({"moe"})}
# where experts compute in a smaller space, one matrix per layer leads there and one leads back
_LATENT = {"latent.down": _MIXER + "fc1_latent_proj.weight", "latent.up": _MIXER + "fc2_latent_proj.weight"}
_LATENT_SHAPES = {
    "latent.down": "latent, hidden", "latent.up": "hidden, latent", "expert.up": "expert, latent",
    "expert.down": "latent, expert",
}  # fmt: skip
# one prediction step is a block of attention and a block of experts; "mtp." replaces "backbone."
_NEMOTRON_MTP = Prediction(
    {
        "mtp.norm_embedding": _NEMOTRON + "enorm.weight",
        "mtp.norm_hidden": _NEMOTRON + "hnorm.weight",
        "mtp.project": _NEMOTRON + "eh_proj.weight",
        "mtp.norm": _NEMOTRON + "final_layernorm.weight",
    },
    prefix="mtp.",
    otherwise="a prediction step is two blocks, one of attention and one of experts",
)
_KINDS_BY_LETTER = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def nemotron_h_kinds(get: Get, _layers: int) -> list[str]:
    """The kinds of the layers, from the list of them or from the older string with one letter per layer."""
    kinds, pattern = get("layer_types"), get("hybrid_override_pattern")
    return (
        [_KINDS_BY_LETTER.get(word, word) for word in pattern] if kinds is None and isinstance(pattern, str) else kinds
    )


def nemotron_h_layers(get: Get) -> Any:
    """The number of blocks in the pattern; num_hidden_layers if there is no pattern."""
    kinds = nemotron_h_kinds(get, 0)
    return len(kinds) if isinstance(kinds, list) else get("num_hidden_layers")


_NEMOTRON_H = ConfigKeys(
    NEMOTRON_H_CONFIG | {"hybrid_override_pattern": None},
    kinds={"hybrid_override_pattern": WORD, "mtp_layers_block_type": LIST, "moe_latent_size": WHOLE},
    words=NEMOTRON_H_WORDS,
)
NEMOTRON_H = dense_row(
    "nemotron_h",
    "NemotronHForCausalLM",
    config=_NEMOTRON_H,
    tensors=Tensors(NEMOTRON_H_BLOCK, base_prefix="backbone.", sizes=NEMOTRON_H_SIZES),
    attention=Attention(rope="none"),
    layers=Layers(kinds=nemotron_h_kinds, count=nemotron_h_layers, where=NEMOTRON_H_WHERE),
    is_dense=lambda get: "moe" not in (nemotron_h_kinds(get, 0) or ["moe"]),
)
NEMOTRON_H_MOE = moe_row(
    "nemotron_h",
    "NemotronHForCausalLM",
    config=_NEMOTRON_H,
    tensors=Tensors(
        NEMOTRON_H_BLOCK
        | {"router.weight": _MIXER + "gate.weight", "router.correction": _MIXER + "gate.e_score_correction_bias"}
        | {f"expert.{p}": _MIXER + "experts.{E}." + f"{p}_proj.weight" for p in ("up", "down")}
        | {f"shared.{p}": _MIXER + f"shared_experts.{p}_proj.weight" for p in ("up", "down")}
        | _LATENT,
        optional=frozenset(_LATENT),
        switched={"moe_latent_size": tuple(_LATENT)},
        prefix="backbone.",
        base_prefix="backbone.",
        in_memory={"backbone.": "model."},
        shapes=_LATENT_SHAPES,
        sizes=NEMOTRON_H_SIZES,
    ),
    attention=Attention(rope="none"),
    layers=Layers(kinds=nemotron_h_kinds, count=nemotron_h_layers, where=NEMOTRON_H_WHERE),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_shared_expert_intermediate_size",),
        placement=placement.of_kinds(nemotron_h_kinds),
        routing=GROUPED,
    ),
    prediction=_NEMOTRON_MTP,
    elsewhere=Elsewhere(runs=frozenset({"vllm", "llama.cpp"})),
)

_LANGUAGE_MODEL = "language_model."
NEMOTRON_H_OMNI = Wrapper(
    "nemotron_h_omni",
    "NemotronH_Omni_Reasoning_V3",
    (NEMOTRON_H_MOE,),
    {"vision_model.": "vision", "mlp1.": "vision", "vision_projector.": "vision", "sound_encoder.": "audio",
     "sound_projection.": "audio"},
    may_lack=frozenset({"vision_projector."}),
    prefix=_LANGUAGE_MODEL + "backbone.",
    head=_LANGUAGE_MODEL + "lm_head.",
    prediction=_LANGUAGE_MODEL,
    old_root="llm_config",
    in_memory={
        "language_model.backbone.": "language_model.model.",
        "mlp1.0": "multi_modal_projector.layer_norm", "mlp1.1": "multi_modal_projector.linear_1",
        "mlp1.3": "multi_modal_projector.linear_2", "vision_projector.vision_final_": "vision_final_",
        "vision_model.radio_model.model.patch_generator.embedder": "vision_model.embeddings.patch_projection",
        "vision_model.radio_model.model.patch_generator.video_": "vision_model.embeddings.video_",
        "vision_model.embeddings.video_embedder": "vision_model.embeddings.video_patch_projection",
        "vision_model.radio_model.model.blocks.": "vision_model.encoder.layer.",
        ".attn.qkv": (".attention.q_proj", ".attention.k_proj", ".attention.v_proj"),
        ".attn.proj": ".attention.o_proj",
        "sound_encoder.encoder.": "audio_tower.", "sound_projection.norm": "embed_audio.layer_norm",
        "sound_projection.linear": "embed_audio.linear_",
    },
    runs=frozenset({"vllm"}),
)  # fmt: skip

VENDOR = Vendor(
    wrappers=(NEMOTRON_H_OMNI,),
    dense=(NEMOTRON, NEMOTRON_H),
    moe=(NEMOTRON_H_MOE,),
    pairs=(
        Pair(
            "nemotron_h",
            "nemotron_h",
            default=True,
            note=f"layers of kind mlp become moe; {ZERO_SHARED_128}",
            config=ONE_SHARED_EXPERT
            | {"moe_shared_expert_intermediate_size": 128, "moe_latent_size": None, "num_nextn_predict_layers": 0},
            rename={"hybrid_override_pattern": None},
        ),
    ),
)
