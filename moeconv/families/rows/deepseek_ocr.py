"""Readers of documents: DeepSeek-OCR 2 and Baidu's Unlimited-OCR, which contain DeepSeek-V2 with plain attention."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families import placement
from moeconv.families.blocks import BLOCK, DENSE_FFN, FFN_BIAS, MLA_CONFIG, O_BIAS, QKV_BIAS
from moeconv.families.expert_blocks import MLP_EXPERTS, MLP_ROUTER, SHARED_EXPERTS
from moeconv.families.records import WHOLE, ConfigKeys, Elsewhere, Tensors
from moeconv.families.rows.deepseek import DEEPSEEK_V2
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.types import JsonObject

_CONFIG: JsonObject = {
    key: value
    for key, value in DEEPSEEK_V2.config.defaults.items()
    if key not in ("first_k_dense_replace", "norm_topk_prob") and (key not in MLA_CONFIG or key == "attention_bias")
} | {"mlp_layer_types": None}
DEEPSEEK_OCR2_TEXT = replace(
    DEEPSEEK_V2,
    model_type="deepseek_ocr2_text",
    config=ConfigKeys(_CONFIG, kinds={"n_group": WHOLE, "topk_group": WHOLE}),
    tensors=Tensors(
        BLOCK | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN | FFN_BIAS,
        optional=frozenset({"embedding.lm_head", *QKV_BIAS, *O_BIAS, *FFN_BIAS}),
        dropped=DEEPSEEK_V2.tensors.dropped,
    ),
    experts=replace(DEEPSEEK_V2.experts, placement=placement.WORDS),
    elsewhere=Elsewhere(),
)
# generated tokens attend to the prompt and to a window; in one pass over a text, every token attends to all before it
UNLIMITED_OCR_TEXT = replace(
    DEEPSEEK_OCR2_TEXT,
    model_type="unlimited_ocr_text",
    config=ConfigKeys(
        _CONFIG
        | {
            "num_key_value_heads": 10,
            "max_position_embeddings": 32768,
            "moe_intermediate_size": 896,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    experts=replace(DEEPSEEK_V2.experts, placement=placement.WORDS_OR_FIRST_K),
)

_IN_MEMORY: dict[str, str | tuple[str, ...]] = {
    "model.sam_model.blocks.": "model.vision_tower.sam_encoder.layers.",
    "model.projector.layers": "model.multi_modal_projector",
}
_LANGUAGE_MODEL = {"model.layers.": "model.language_model.layers."}
_BESIDE = {f"model.{name}": "vision" for name in ("sam_model.", "projector.", "view_seperator")}

VENDOR = Vendor(
    wrappers=(
        Wrapper(
            "deepseek_ocr2",
            "DeepseekOcr2ForConditionalGeneration",
            (DEEPSEEK_OCR2_TEXT,),
            _BESIDE | {"model.qwen2_model.": "vision"},
            prefix="model.",
            in_memory=_IN_MEMORY
            | {"model.qwen2_model.model.model.": "model.vision_tower.vision_encoder.", **_LANGUAGE_MODEL},
        ),
        Wrapper(
            "unlimited_ocr",
            "UnlimitedOcrForConditionalGeneration",
            (UNLIMITED_OCR_TEXT,),
            _BESIDE | {"model.vision_model.": "vision", "model.image_newline": "vision"},
            prefix="model.",
            in_memory=_IN_MEMORY
            | {
                "model.vision_model.transformer.": "model.vision_tower.vision_encoder.encoder.",
                ".qkv_proj": (".q_proj", ".k_proj", ".v_proj"),
                **_LANGUAGE_MODEL,
            },
            # transformers splits the fused projections of the vision tower, but not while it reads packed weights
            not_loaded=frozenset({"compressed-tensors"}),
        ),
    ),
)
