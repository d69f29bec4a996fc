"""rednote: dots.llm1 and dots3-note."""

from __future__ import annotations

from typing import Any

from moeconv.errors import InputError
from moeconv.families import placement, sliding
from moeconv.families.blocks import (
    BLOCK,
    DENSE_FFN,
    INDEXER,
    INDEXER_CONFIG,
    LAYER,
    MLA_CONFIG,
    MLA_LOW_RANK,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    WITHOUT_QKVO,
)
from moeconv.families.expert_blocks import (
    CORRECTION,
    EVERY_ENGINE,
    GROUPED,
    MLP_EXPERTS,
    MLP_ROUTER,
    MTP,
    NO_AUX_LOSS,
    ONE_SHARED_EXPERT,
    SHARED_EXPERTS,
    SIGMOID,
    ZERO_SHARED_FULL,
    moe_row,
)
from moeconv.families.per_layer import one_per_layer
from moeconv.families.placement import Get, Placement
from moeconv.families.records import (
    OBJECT,
    SWITCH,
    WHOLE,
    Attention,
    ConfigKeys,
    Elsewhere,
    Experts,
    Layers,
    Prediction,
    Tensors,
)
from moeconv.families.shapes import LATENT, Place, Size
from moeconv.families.sliding import Pattern, Sliding
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.types import Config
from moeconv.units import counted

DOTS1 = moe_row(
    "dots1",
    "Dots1ForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 32,
            "head_dim": None,
            "attention_bias": False,
            "sliding_window": 4096,
            "max_window_layers": 62,
            "layer_types": None,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 0,
            **SIGMOID,
            "norm_topk_prob": False,
            "n_shared_experts": None,
        }
    ),
    tensors=Tensors(
        BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
        float32=frozenset({"router.correction"}),
    ),
    attention=Attention(sliding=sliding.FROM_MAX_WINDOW),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.FIRST_K,
        routing=GROUPED,
    ),
    elsewhere=Elsewhere(keys=NO_AUX_LOSS | {"moe_layer_freq": 1}, runs=EVERY_ENGINE),
)

_FULL, _INDEXED, _SLIDING = "full_attention", "indexed_attention", "sliding_attention"


def _kinds(get: Get, layers: int) -> list[str]:
    """The kind of attention of each layer, as the class of dots3-note derives it.

    Older files call layers with an indexer full_attention, and state in use_dsa that they have one. Raises InputError
    for a list of another length or with other words.
    """
    words, stated = get("layer_types"), get("use_dsa")
    indexed = stated if stated is not None else None if get("per_layer_config") is not None else True
    if words is None:
        full = _FULL if indexed is False else _INDEXED
        slide = get("use_sliding_window") is not False
        words = [_SLIDING if slide and i > 1 and i % 4 != 1 else full for i in range(layers)]
    words = one_per_layer(words, layers, "layer_types", allowed=(_INDEXED, _FULL, _SLIDING))
    if indexed is None:
        return words
    old, new = (_FULL, _INDEXED) if indexed else (_INDEXED, _FULL)
    return [new if word == old else word for word in words]


def _windows(config: Config, layers: int) -> Pattern:
    slides = tuple(kind == _SLIDING for kind in _kinds(config.get, layers))
    window = config.get("sliding_window") or config.get("sliding_window_size") or 512
    return Pattern(slides, window if any(slides) else None)


def _of_layer(key: str) -> Size:
    """A size of the attention, which layers with a window have values of their own for."""

    def find(get: Get, place: Place) -> Any:
        each = get("per_layer_config")
        if isinstance(each, dict):
            beyond = place.slides and place.layer is not None and place.layer >= get("num_hidden_layers")
            own = next(reversed(each.values()), None) if beyond else each.get(str(place.layer))
            return own.get(key, get(key)) if isinstance(own, dict) else get(key)
        return get(f"swa_{key}" if place.slides else key)

    return find


def _moe_layers(get: Get, layers: int) -> tuple[int, ...]:
    """The layers with experts: a word per layer, or those after the first dense ones that moe_layer_freq chooses."""
    if get("mlp_layer_types") is not None:
        return placement.WORDS.read(get, layers)
    chosen, after = get("moe_layer_freq"), placement.FIRST_K.read(get, layers)
    if type(chosen) is int and chosen > 0:
        return tuple(i for i in after if i % chosen == 0)
    if not isinstance(chosen, list) or len(chosen) != layers:
        raise InputError(
            f"config.json: moe_layer_freq must be a positive whole number or a list of {counted(layers, 'entry')}",
            hint="Correct config.json, or download it again.",
        )
    return tuple(i for i in after if chosen[i])


_SIZES = {"heads": "num_attention_heads", "q_rank": "q_lora_rank", "kv_rank": "kv_lora_rank",
          "nope": "qk_nope_head_dim", "rope": "qk_rope_head_dim", "v_latent": "v_head_dim"}  # fmt: skip
# the sizes of layers with a window, where no per_layer_config states them
_WINDOWED = {"num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1024, "kv_lora_rank": 1024,
             "head_dim": 256, "qk_nope_head_dim": 192, "v_head_dim": 128, "qk_rope_head_dim": None}  # fmt: skip
DOTS3_NOTE = moe_row(
    "dots3_note_text",
    "Dots3NoteForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | INDEXER_CONFIG
        | {f"swa_{key}": value for key, value in _WINDOWED.items()}
        | {
            "num_key_value_heads": 128,
            "head_dim": 256,
            "q_lora_rank": 1024,
            "max_position_embeddings": 524288,
            "rms_norm_eps": 1e-5,
            "rope_theta": 8e7,
            "rope_parameters": {
                _INDEXED: {"rope_type": "default", "rope_theta": 8e7, "partial_rotary_factor": 0.25},
                _SLIDING: {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.25},
            },
            "sliding_window": None,
            "sliding_window_size": 512,
            "use_sliding_window": True,
            "use_dsa": None,
            "layer_types": None,
            "per_layer_config": None,
            "mlp_layer_types": None,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 1536,
            "shared_experts_intermediate_size": None,
            "moe_shared_expert_intermediate_size": 1536,
            "mlp_bias": False,
            "num_nextn_predict_layers": 1,
            **SIGMOID,
        },
        kinds={
            "use_dsa": SWITCH, "per_layer_config": OBJECT, "swa_qk_rope_head_dim": WHOLE,
            "shared_experts_intermediate_size": WHOLE,
        },
        derived={
            "sliding_window": lambda get: get("sliding_window_size"),
            "moe_layer_freq": lambda _get: 1,
            "shared_experts_intermediate_size": lambda get: get("moe_shared_expert_intermediate_size"),
            "swa_qk_rope_head_dim": lambda get: get("swa_head_dim") - get("swa_qk_nope_head_dim"),
        },
        only={"attention_bias": ((False,), "its biases have no place in this row")},
    ),
    tensors=Tensors(
        WITHOUT_QKVO
        | MLA_LOW_RANK
        | {
            "attention.k_rope_norm": LAYER + "self_attn.k_rope_only_layernorm.weight",
            "attention.gate": LAYER + "self_attn.g_proj.weight",
        }
        | INDEXER
        | MLP_ROUTER
        | CORRECTION
        | MLP_EXPERTS
        | SHARED_EXPERTS
        | DENSE_FFN,
        float32=frozenset({"router.weight", "router.correction"}),
        shapes=LATENT | {"attention.k_rope_norm": "rope", "attention.gate": "heads, hidden"},
        sizes={name: _of_layer(key) for name, key in _SIZES.items()},
    ),
    attention=Attention(sliding=Sliding(_windows, lambda _pattern: None), rope="own"),
    layers=Layers(kinds=_kinds, where={"indexer": frozenset({_INDEXED})}),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("shared_experts_intermediate_size", "n_shared_experts"),
        placement=Placement(_moe_layers, placement.WORDS.write, placement.WORDS.can),
        routing=GROUPED,
    ),
    prediction=Prediction({**MTP.names, "mtp.embedding": "model.mtp.embed_tokens.weight"}, slides=True),
)  # fmt: skip

VENDOR = Vendor(
    moe=(DOTS1, DOTS3_NOTE),
    pairs=(Pair("qwen3", "dots1", with_shared=True, note=ZERO_SHARED_FULL, config=ONE_SHARED_EXPERT),),
    wrappers=(
        Wrapper(
            "dots3_note",
            "Dots3NoteForConditionalGeneration",
            (DOTS3_NOTE,),
            {"vision_encoder.": "vision", "audio_encoder.": "audio"},
            prefix="model.",
            flat=True,
            in_memory={
                "model.layers.": "model.language_model.layers.",
                "vision_encoder.adapter.": "model.vision_tower.merger.",
                "vision_encoder.": "model.vision_tower.",
                ".mlp.fc1": ".mlp.gate_proj",
                ".mlp.fc2": ".mlp.down_proj",
                ".mlp.fc3": ".mlp.up_proj",
                ".fc1": ".mlp.gate_up_proj",
                ".fc2": ".mlp.down_proj",
                "audio_encoder.audio_adapter.proj.1": "model.audio_tower.adapter.fc1",
                "audio_encoder.audio_adapter.proj.3": "model.audio_tower.adapter.fc2",
                "audio_encoder.dots_encoder.speech_encoder.": "model.audio_tower.",
                ".conv2d1": ".conv_stem.convs.0",
                ".conv2d2": ".conv_stem.convs.1",
                ".conv2d3": ".conv_stem.convs.2",
                ".conv_out": ".conv_stem.conv_out",
                ".out_proj": ".o_proj",
            },
            # where it reads them, it finds no plain kernels to join for the experts of the vision tower (5.24)
            not_loaded=frozenset({"compressed-tensors"}),
            runs=frozenset({"vllm"}),
        ),
    ),
)
