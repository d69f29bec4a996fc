"""StepFun: Step-3.7-Flash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeconv.errors import InputError
from moeconv.families import placement, sliding
from moeconv.families.blocks import BLOCK, DENSE_FFN, LAYER, PARTS, QK_NORM
from moeconv.families.expert_blocks import MTP, moe_row, served_below
from moeconv.families.placement import Get, Placement
from moeconv.families.records import (
    LIST,
    OBJECT,
    WHOLE,
    Attention,
    ConfigKeys,
    Elsewhere,
    ExpertLayout,
    Experts,
    Packed,
    Routing,
    Tensors,
)
from moeconv.families.shapes import Place
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.types import Config

_FIRST = 3  # layers before the first one with experts, where config.json lists none


def _moe_layers(get: Get, layers: int) -> tuple[int, ...]:
    """The layers with experts: a word per layer, or their numbers in text, as StepFun's files have them."""
    stated = get("moe_layers_enum")
    if get("mlp_layer_types") is not None:
        words = get("mlp_layer_types")[:layers]
        return placement.WORDS.read(lambda key: words if key == "mlp_layer_types" else get(key), layers)
    if isinstance(stated, str):
        stated = [int(number) for number in stated.split(",") if number.strip().isdigit()]
    if stated is not None and not (isinstance(stated, list) and all(type(number) is int for number in stated)):
        raise InputError(
            "config.json: moe_layers_enum must be numbers of layers, with commas between them", hint="Correct it."
        )
    chosen = set(range(_FIRST, layers)) if stated is None else set(stated)
    return tuple(i for i in range(layers) if i in chosen)


def _written(moe: Sequence[int], layers: int, get: Get) -> Config | None:
    return placement.WORDS.write(moe, layers, get)


def _heads(get: Get, place: Place) -> Any:
    """The number of query heads, which layers with a sliding window may have more of."""
    kinds = get("layer_types") or []
    slides = place.layer is not None and place.layer < len(kinds) and kinds[place.layer] == "sliding_attention"
    return get("num_sliding_attention_heads" if slides else "num_attention_heads")


def _wide(get: Get) -> Any:
    """The heads of layers with a window, where only StepFun's older setting states them."""
    return (get("attention_other_setting") or {}).get("num_attention_heads", get("num_attention_heads"))


_MOE = LAYER + "moe."
_STACKED = {f"expert.{part}": _MOE + f"{part}_proj.weight" for part in PARTS}
_PACKED = {f"expert.{part}": Packed((part,)) for part in PARTS}
STEP3P5 = moe_row(
    "step3p5",
    "Step3p7ForConditionalGeneration",
    config=ConfigKeys(
        {
            "num_key_value_heads": None,
            "num_attention_groups": None,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128000,
            "sliding_window": None,
            "layer_types": None,
            "attention_bias": False,
            "mlp_bias": False,
            "num_sliding_attention_heads": None,
            "attention_other_setting": None,
            "moe_intermediate_size": 1280,
            "share_expert_dim": 1280,
            "moe_router_scaling_factor": 1.0,
            "mlp_layer_types": None,
            "moe_layers_enum": None,
            "swiglu_limits": None,
            "swiglu_limits_shared": None,
            "num_nextn_predict_layers": 0,
            "output_router_logits": False,
        },
        kinds={
            "num_attention_groups": WHOLE, "num_key_value_heads": WHOLE, "num_sliding_attention_heads": WHOLE,
            "attention_other_setting": OBJECT,
            "swiglu_limits": LIST, "swiglu_limits_shared": LIST,
        },
        derived={
            "num_key_value_heads": lambda get: get("num_attention_groups") or 8, "num_sliding_attention_heads": _wide,
        },
        only={
            "attention_bias": ((False,), "its biases have no place in this row"),
            "mlp_bias": ((False,), "its biases have no place in this row"),
        },
    ),
    tensors=Tensors(
        BLOCK
        | QK_NORM
        | {
            "attention.gate": LAYER + "self_attn.g_proj.weight",
            "router.weight": _MOE + "gate.weight",
            "router.correction": _MOE + "router_bias",
            **{f"shared.{part}": LAYER + f"share_expert.{part}_proj.weight" for part in PARTS},
        }
        | _STACKED
        | DENSE_FFN,
        packed=_PACKED,
        layouts=(ExpertLayout(_STACKED, _PACKED),),
        served=served_below(_MOE),
        float32=frozenset({"router.correction"}),
        shapes={"attention.gate": "heads, hidden"},
        sizes={"heads": _heads},
        norm_offset=1.0,
    ),
    attention=Attention(sliding=sliding.NEVER, rope="per_type"),
    experts=Experts(
        count=("n_routed_experts", "moe_num_experts", "num_experts"),
        top_k=("num_experts_per_tok", "moe_top_k"),
        width="moe_intermediate_size",
        shared_width=("share_expert_dim",),
        placement=Placement(_moe_layers, _written, "any layer"),
        routing=Routing("sigmoid", "always", float32=False),
        factor="moe_router_scaling_factor",
    ),
    prediction=MTP,
    elsewhere=Elsewhere(runs=frozenset({"vllm"})),
)  # fmt: skip

VENDOR = Vendor(
    wrappers=(
        Wrapper(
            "step3p7",
            "Step3p7ForConditionalGeneration",
            (STEP3P5,),
            {"vision_model.": "vision", "vit_large_projector.": "vision"},
            prefix="model.",
            flat=True,
            in_memory={
                "model.layers.": "model.language_model.layers.",
                "vision_model.transformer.resblocks.": "model.vision_model.layers.",
                "vision_model.vit_": "model.vision_model.",
                "vit_large_projector": "model.multi_modal_projector",
                ".mlp.c_fc": ".mlp.fc1",
                ".mlp.c_proj": ".mlp.fc2",
                ".attn.out_proj": ".self_attn.out_proj",
                ".attn.in_proj": (".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj"),
            },
            runs=frozenset({"vllm"}),
        ),
    ),
)
