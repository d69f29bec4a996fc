"""Shanghai AI Laboratory: InternLM2, InternLM3 and InternVL."""

from __future__ import annotations

from moeconv.families.blocks import (
    ATTENTION_BIAS,
    BLOCK,
    DENSE_FFN,
    FEED_FORWARD,
    FFN_BIAS,
    FUSED_QKV,
    FUSED_QKV_BIAS,
    LAYER,
    NO_BIAS,
    dense_row,
)
from moeconv.families.expert_blocks import W_NAMES
from moeconv.families.records import WORD, ConfigKeys, Tensors
from moeconv.families.rows.gpt_oss import GPT_OSS
from moeconv.families.rows.llama import LLAMA
from moeconv.families.rows.mistral import MIXTRAL
from moeconv.families.rows.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from moeconv.families.spec import Pair
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

# the class is code in the checkpoints: Llama's block with other names, and one tensor for queries, keys and values
_WQKV = LAYER + "attention.wqkv."
INTERNLM2 = dense_row(
    "internlm2",
    "InternLM2ForCausalLM",
    config=ConfigKeys(
        {"bias": True, "attn_implementation": None, "pretraining_tp": 1},
        neutral={"bias": (False,), "attn_implementation": ("eager", "sdpa", "flash_attention_2"),
                 "pretraining_tp": (1, None)},
        kinds={"attn_implementation": WORD},
    ),
    tensors=Tensors(
        {
            "embedding.tokens": "model.tok_embeddings.weight",
            "embedding.lm_head": "output.weight",
            "norm.final": "model.norm.weight",
            "norm.attention": LAYER + "attention_norm.weight",
            "norm.ffn": LAYER + "ffn_norm.weight",
            "attention.qkv": _WQKV + "weight",
            "attention.qkv_bias": _WQKV + "bias",
            "attention.o": LAYER + "attention.wo.weight",
            "attention.o_bias": LAYER + "attention.wo.bias",
        }
        | {f"ffn.{part}": FEED_FORWARD + f"{name}.weight" for part, name in W_NAMES.items()},
        fused=FUSED_QKV | FUSED_QKV_BIAS,
        grouped=frozenset(FUSED_QKV | FUSED_QKV_BIAS),
    ),
    runs_as=Pair("internlm2", "llama", rename={"bias": "attention_bias"}),
)  # fmt: skip

VENDOR = Vendor(
    dense=(INTERNLM2, INTERNLM3),
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
