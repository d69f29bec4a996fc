"""FP8 in the published layout of DeepSeek-V3 (arXiv 2412.19437, section 3.3): one float32 scale per 128 x 128
block, which transformers, vLLM and SGLang read by quant_method fp8."""

from __future__ import annotations

from collections.abc import Sequence

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.plan.plan import Item
from moeconv.quantize.compressed.eightbit import BLOCK, BLOCKS, check_blocks
from moeconv.quantize.layout.planner import served_form
from moeconv.quantize.spec import Format, Scheme, SchemeInfo, codes
from moeconv.types import JsonObject


def _make(ref: TensorRef, _: Scheme, role: str) -> Item:
    scales = (".weight_scale_inv", "weight_scale", "F32", tuple(size // BLOCK for size in ref.shape))
    parts = [(".weight", "weight", "F8_E4M3", ref.shape), scales]
    return codes(ref, "pack_float8_blocks", parts, role, block=BLOCK, wide=True)


def _config(_scheme: Scheme, ignore: Sequence[str], _dtype: str, _scope: str) -> JsonObject:
    return {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(ignore),
    }  # fmt: skip


DEEPSEEK = Format(
    "fp8",
    (
        SchemeInfo(
            "fp8-block",
            8,
            "F8_E4M3",
            {"transformers": "dequantized", "vllm": "unknown", "sglang": "unknown", "llama.cpp": "no"},
            limit=0.12,
            measured={"transformers": {}},
            groups=(BLOCK,),
            hardware=("ada", "h100", "b200"),
            error=0.0264,
        ),
    ),
    notes={
        "transformers": "expands to 16 bits in memory without a GPU; has FP8 kernels for GPUs, not run",
        "vllm": "according to its source, not run; its CPU backend has no kernel for it",
        "sglang": "according to its source, not run",
    },
    kernels=(BLOCKS,),
    make=_make,
    config=_config,
    form=served_form,
    check=check_blocks,
)
