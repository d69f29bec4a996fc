"""Multimodal models with a Mixture-of-Experts inside: a row each says where the language model lies and what is beside
it. The rows that steps see are made here, from a wrapper and the row of the language model in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moeconv.families.dense import QK_NORM
from moeconv.families.moe import (
    ARIA_TEXT,
    GEMMA4_TEXT,
    GLM4_MOE,
    GPT_OSS,
    MLP_EXPERTS,
    QWEN3_5_MOE,
    QWEN3_MOE,
    STACKED,
    STACKED_NAMES,
)
from moeconv.families.moe_sources import LLAMA4
from moeconv.families.sliding import NEVER
from moeconv.families.spec import Family, Layout, Routing

_TRANSPOSED = Layout(STACKED_NAMES, {key: replace(way, transposed=True) for key, way in STACKED.packed.items()})


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A multimodal family. `texts` are the rows of the language models that it is known to hold; `prefix` and `head`
    stand in its names where theirs begin with "model." and "lm_head."; `beside` as in Family; `root` is the key of
    their config; `in_memory` as in Family, of modules that transformers calls otherwise."""

    model_type: str
    architecture: str
    texts: tuple[Family, ...]
    beside: Mapping[str, str]
    prefix: str = "model.language_model."
    head: str = "lm_head."
    root: str = "text_config"
    tied: bool = False  # whether the head is the embedding where neither config says it
    in_memory: Mapping[str, str] = field(default_factory=dict)

    def row(self, text: Family) -> Family:
        """The row of this wrapper around that language model."""
        return replace(
            text,
            model_type=self.model_type,
            architecture=self.architecture,
            root=self.root,
            prefix=self.prefix,
            base_prefix="model." if self.prefix.startswith("model.") else "",
            beside=self.beside,
            config={**text.config, "tie_word_embeddings": self.tied},
            tensors=self._names(text.tensors),
            mtp=self._names(text.mtp),
            dropped=tuple(self._name(name) for name in text.dropped),
            in_memory={**self.in_memory, **text.in_memory},
            layouts=tuple(Layout(self._names(way.tensors), way.packed) for way in text.layouts),
        )

    def _names(self, names: Mapping[str, str]) -> dict[str, str]:
        return {key: self._name(name) for key, name in names.items()}

    def _name(self, name: str) -> str:
        for old, new in (("model.", self.prefix), ("lm_head.", self.head)):
            if name.startswith(old):
                return new + name.removeprefix(old)
        raise ValueError(name)


# router weights are renormalised whatever the config says; saved untransposed by transformers 5, transposed on the hub
QWEN3_VL_MOE_TEXT = replace(
    QWEN3_MOE,
    model_type="qwen3_vl_moe_text",
    tensors={k: v for k, v in QWEN3_MOE.tensors.items() if k not in MLP_EXPERTS} | STACKED_NAMES,
    config={k: v for k, v in QWEN3_MOE.config.items()
            if k not in ("norm_topk_prob", "use_sliding_window", "sliding_window")}
    | {"num_key_value_heads": 16, "max_position_embeddings": 128000, "rope_theta": 500000.0,
       "moe_intermediate_size": 1408},
    packed=STACKED.packed,
    layouts=(STACKED, _TRANSPOSED),
    sliding=NEVER,
    routing=Routing("softmax", "always"),
)  # fmt: skip
GLM4V_MOE_TEXT = replace(
    GLM4_MOE,
    model_type="glm4v_moe_text",
    tensors={k: v for k, v in GLM4_MOE.tensors.items() if k not in QK_NORM},
    config={k: v for k, v in GLM4_MOE.config.items() if k not in ("num_nextn_predict_layers", "use_qk_norm")}
    | {"attention_bias": True, "max_position_embeddings": 65536},
    mtp={},
)
_LLAVA = {"vision_tower.": "vision", "multi_modal_projector.": "vision"}

WRAPPERS = (
    Wrapper(
        "llama4",
        "Llama4ForConditionalGeneration",
        (LLAMA4,),
        {"vision_model.": "vision", "multi_modal_projector.": "vision"},
        prefix="language_model.model.",
        head="language_model.lm_head.",
    ),
    Wrapper("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", (QWEN3_VL_MOE_TEXT,), {"model.visual.": "vision"}),
    Wrapper("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", (QWEN3_5_MOE,), {"model.visual.": "vision"}),
    Wrapper("glm4v_moe", "Glm4vMoeForConditionalGeneration", (GLM4V_MOE_TEXT,), {"model.visual.": "vision"}),
    Wrapper(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        (GEMMA4_TEXT,),
        {
            "model.vision_tower.": "vision",
            "model.embed_vision.": "vision",
            "model.audio_tower.": "audio",
            "model.embed_audio.": "audio",
        },
        tied=True,
    ),
    Wrapper(
        "aria",
        "AriaForConditionalGeneration",
        (ARIA_TEXT,),
        _LLAVA,
        prefix="language_model.model.",
        head="language_model.lm_head.",
    ),
    Wrapper(
        "internvl",
        "InternVLForConditionalGeneration",
        (QWEN3_MOE, GPT_OSS),
        _LLAVA,
        prefix="language_model.model.",
        head="language_model.lm_head.",
        tied=True,
        in_memory={"language_model.model.": "model.language_model.", **{name: f"model.{name}" for name in _LLAVA}},
    ),
)
# model_type of the wrapper -> model_type of the language model -> the row
WRAPPED: dict[str, dict[str, Family]] = {
    wrapper.model_type: {text.model_type: wrapper.row(text) for text in wrapper.texts} for wrapper in WRAPPERS
}
# model_type of a multimodal Mixture-of-Experts that cannot be taken -> why
_TALKER = (
    "its talker is a Mixture-of-Experts of its own that reads what the thinker computes, and no text shows what it does"
)
UNTAKEN = {
    "ernie4_5_vl_moe": "its text and its vision experts have one count in config.json and one numbering on disk, and "
    "no text shows what the latter do",
    "qwen3_omni_moe": _TALKER,
    "qwen3_omni_moe_thinker": _TALKER,
}
