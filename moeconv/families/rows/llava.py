"""LLaVA and the models with its layout, whose class makes any language model of transformers that config.json names."""

from __future__ import annotations

from moeconv.families.rows.lfm2 import LFM2_DENSE, LFM2_MOE
from moeconv.families.rows.llama import LLAMA
from moeconv.families.rows.mistral import MISTRAL, MIXTRAL
from moeconv.families.rows.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from moeconv.families.vendor import LLAVA_NAMES, TOWER_AND_PROJECTOR, Vendor, Wrapper

_TEXTS = (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE)
_NEXT = {**TOWER_AND_PROJECTOR, "image_newline": "vision"}
_TWO_TOWERS = {"image_tower.": "vision", "video_tower.": "vision", "multi_modal_projector.": "vision"}

VENDOR = Vendor(
    wrappers=(
        *(
            Wrapper(name, architecture, _TEXTS, beside, becomes=name, **LLAVA_NAMES)
            for name, architecture, beside in (
                ("llava", "LlavaForConditionalGeneration", TOWER_AND_PROJECTOR),
                ("vipllava", "VipLlavaForConditionalGeneration", TOWER_AND_PROJECTOR),
                ("llava_next", "LlavaNextForConditionalGeneration", _NEXT),
                ("llava_next_video", "LlavaNextVideoForConditionalGeneration", _NEXT),
                ("llava_onevision", "LlavaOnevisionForConditionalGeneration", _NEXT),
                ("video_llava", "VideoLlavaForConditionalGeneration", _TWO_TOWERS),
            )
        ),
        Wrapper(
            "lfm2_vl",
            "Lfm2VlForConditionalGeneration",
            (LFM2_DENSE, LFM2_MOE),
            {"model.vision_tower.": "vision", "model.multi_modal_projector.": "vision"},
            becomes="lfm2_vl",
            tied=True,
        ),
        *(
            Wrapper(
                name,
                architecture,
                (LLAMA, MIXTRAL),
                {"model.vision_model.": "vision", "model.connector.": "vision"},
                prefix="model.text_model.",
                becomes=name,
            )
            for name, architecture in (
                ("idefics3", "Idefics3ForConditionalGeneration"),
                ("smolvlm", "SmolVLMForConditionalGeneration"),
            )
        ),
    ),
    aliases={"lfm2-vl": "lfm2_vl"},  # as transformers 4 saves it
)
