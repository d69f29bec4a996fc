"""Moonshot AI: Kimi-K2 and Kimi-K2.5."""

from __future__ import annotations

from moeconv.families.rows.deepseek import DEEPSEEK_V3
from moeconv.families.vendor import Vendor, Wrapper

VENDOR = Vendor(
    wrappers=(
        Wrapper(
            "kimi_k25",
            "Kimi_K25ForConditionalGeneration",
            (DEEPSEEK_V3,),
            {"vision_tower.": "vision", "mm_projector.": "vision"},
            prefix="language_model.model.",
            head="language_model.lm_head.",
            tied=True,
            # save_pretrained writes these: it takes the text's layers for blocks of the vision tower
            variants={
                "language_model.model.blocks.": "language_model.model.layers.",
                "model.mm_projector.": "mm_projector.",
            },
            in_memory={
                "language_model.model.": "model.language_model.",
                "language_model.lm_head": "lm_head",
                "vision_tower.encoder.blocks.": "model.vision_tower.layers.",
                ".mlp.fc1": ".mlp.fc2",
                ".mlp.fc0": ".mlp.fc1",
                ".wqkv": (".attn.q_proj", ".attn.k_proj", ".attn.v_proj"),
                ".wo": ".attn.proj",
                "mm_projector.proj.0": "model.mm_projector.in_proj",
                "mm_projector.proj.2": "model.mm_projector.out_proj",
            },
            runs=frozenset({"vllm", "sglang"}),
        ),
    ),
    # its class is remote code, a copy of DeepSeek-V3's; the class of kimi_k25 replaces the name in the same way
    aliases={"kimi_k2": "deepseek_v3"},
)
