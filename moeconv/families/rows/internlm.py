"""Shanghai AI Laboratory: InternLM3 and InternVL."""

from __future__ import annotations

from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, FFN_BIAS, NO_BIAS, dense_row
from moeconv.families.records import ConfigKeys, Tensors
from moeconv.families.rows.gpt_oss import GPT_OSS
from moeconv.families.rows.llama import LLAMA
from moeconv.families.rows.mistral import MIXTRAL
from moeconv.families.rows.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from moeconv.families.vendor import LLAVA_NAMES, TOWER_AND_PROJECTOR, Vendor, Wrapper

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

VENDOR = Vendor(
    dense=(INTERNLM3,),
    wrappers=(
        Wrapper(
            "internvl",
            "InternVLForConditionalGeneration",
            (LLAMA, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT_OSS),
            TOWER_AND_PROJECTOR,
            becomes="internvl",
            tied=True,
            runs=frozenset({"vllm"}),
            **LLAVA_NAMES,
        ),
    ),
)
