"""Shanghai AI Laboratory: InternLM3 and InternVL."""

from __future__ import annotations

from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, FFN_BIAS, NO_BIAS, dense_row
from moeconv.families.records import ConfigKeys, Tensors
from moeconv.families.rows.gpt_oss import GPT_OSS
from moeconv.families.rows.qwen import QWEN3_MOE
from moeconv.families.vendor import Vendor, Wrapper

INTERNLM3 = dense_row(
    "internlm3",
    "InternLM3ForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "mlp_bias": False,
            "qkv_bias": False,
            "bias": False,
        },
        neutral=NO_BIAS | {"qkv_bias": (False,), "bias": (False,)},
    ),
    tensors=Tensors(BLOCK | ATTENTION_BIAS | DENSE_FFN | FFN_BIAS),
)

_VISION = {"vision_tower.": "vision", "multi_modal_projector.": "vision"}

VENDOR = Vendor(
    dense=(INTERNLM3,),
    wrappers=(
        Wrapper(
            "internvl",
            "InternVLForConditionalGeneration",
            (QWEN3_MOE, GPT_OSS),
            _VISION,
            prefix="language_model.model.",
            head="language_model.lm_head.",
            tied=True,
            runs=frozenset({"vllm"}),
            in_memory={"language_model.model.": "model.language_model.", **{name: f"model.{name}" for name in _VISION}},
        ),
    ),
)
