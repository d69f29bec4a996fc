"""bitsandbytes: native tensors of NF4, FP4 and row-wise INT8, which transformers 5 loads with `import moeconv.hf`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from moeconv.checkpoint.reader import TensorRef
from moeconv.plan.build import TORCH_NAMES
from moeconv.plan.plan import Item
from moeconv.quantize.spec import Format, Scheme, codes

BNB_BLOCK = 64


def quant_state(shape: Sequence[int], *, dtype: str, quant_type: str) -> str:
    """The JSON that bitsandbytes' QuantState.as_dict(packed=True) stores beside 4-bit codes, byte for byte."""
    fields = {"quant_type": quant_type, "blocksize": BNB_BLOCK, "dtype": TORCH_NAMES[dtype], "shape": list(shape)}
    return json.dumps(fields)


def _make_bnb(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    numel = math.prod(ref.shape)
    if scheme.bits == 8:
        rows = [(".weight", "", "I8", ref.shape), (".SCB", "SCB", "F32", (ref.shape[0],))]
        return codes(ref, "pack_bnb8", rows, role)
    state = quant_state(ref.shape, dtype=ref.dtype, quant_type=scheme.name)
    key = f"quant_state.bitsandbytes__{scheme.name}"
    parts = [
        (".weight", "", "U8", ((numel + 1) // 2, 1)),
        (".weight.absmax", "absmax", "F32", (-(-numel // BNB_BLOCK),)),
        (".weight.quant_map", "quant_map", "F32", (16,)),
        (f".weight.{key}", key, "U8", (len(state),)),
    ]
    return codes(ref, "pack_bnb4", parts, role, quant_type=scheme.name, block_size=BNB_BLOCK)


def _bnb_config(scheme: Scheme, ignore: Sequence[str], dtype: str) -> dict[str, Any]:
    four = scheme.bits == 4
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": scheme.name if four else "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 0.0,
        "llm_int8_skip_modules": list(ignore),
        "moeconv": {"format": "bitsandbytes", "scheme": scheme.name, "block_size": BNB_BLOCK, "scope": "experts"},
    }


_LOADS = {"transformers": "ok", "vllm": "unknown", "sglang": "unknown", "llama.cpp": "no"}

BITSANDBYTES = Format(
    "bitsandbytes",
    ("nf4", "fp4", "int8"),
    grouped=False,
    make=_make_bnb,
    config=_bnb_config,
    loads={"nf4": _LOADS, "fp4": _LOADS, "int8": _LOADS | {"vllm": "no"}},
)
