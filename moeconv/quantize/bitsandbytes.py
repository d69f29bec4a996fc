"""bitsandbytes: native tensors of NF4, FP4 and row-wise INT8, which transformers 5 loads with `import moeconv.hf`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moeconv.checkpoint.reader import TensorRef
from moeconv.plan.build import TORCH_NAMES
from moeconv.plan.kernels.states import BNB_BLOCK, NESTED_BLOCK, quant_state
from moeconv.plan.plan import Item
from moeconv.quantize.spec import Format, Scheme, codes


def _make_bnb(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    numel = math.prod(ref.shape)
    if scheme.bits == 8:
        rows = [(".weight", "", "I8", ref.shape), (".SCB", "SCB", "F32", (ref.shape[0],))]
        return codes(ref, "pack_bnb8", rows, role)
    blocks = -(-numel // BNB_BLOCK)
    state = quant_state(
        ref.shape, dtype=TORCH_NAMES[ref.dtype], quant_type=scheme.name, nested_offset=0.0 if scheme.nested else None
    )
    key = f"quant_state.bitsandbytes__{scheme.name}"
    parts = [
        (".weight", "", "U8", ((numel + 1) // 2, 1)),
        (".weight.absmax", "absmax", "U8" if scheme.nested else "F32", (blocks,)),
        (".weight.quant_map", "quant_map", "F32", (16,)),
        (f".weight.{key}", key, "U8", (len(state),)),
    ]
    if scheme.nested:
        parts[2:2] = [
            (".weight.nested_absmax", "nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
            (".weight.nested_quant_map", "nested_quant_map", "F32", (256,)),
        ]
    return codes(ref, "pack_bnb4", parts, role, quant_type=scheme.name, block_size=BNB_BLOCK, nested=scheme.nested)


def _bnb_config(scheme: Scheme, ignore: Sequence[str], dtype: str, scope: str) -> dict[str, Any]:
    four = scheme.bits == 4
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": scheme.name if four else "fp4",
        "bnb_4bit_use_double_quant": scheme.nested,
        "bnb_4bit_compute_dtype": dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 0.0,
        "llm_int8_skip_modules": list(ignore),
        "moeconv": {"format": "bitsandbytes", "scheme": scheme.name, "block_size": BNB_BLOCK, "scope": scope},
    }


_LOADS = {"transformers": "ok", "vllm": "unknown", "sglang": "ok", "llama.cpp": "no"}
_NOTES = {
    "transformers": "after `import moeconv.hf`, or with --self-contained and trust_remote_code=True",
    "vllm": "only by its bitsandbytes plugin on a GPU; not run",
    "sglang": "read in its source, not run",
}

BITSANDBYTES = Format(
    "bitsandbytes",
    ("nf4", "fp4", "int8"),
    grouped=False,
    make=_make_bnb,
    config=_bnb_config,
    loads={"nf4": _LOADS, "fp4": _LOADS, "int8": _LOADS | {"vllm": "no", "sglang": "unknown"}},
    mixed=_LOADS | {"vllm": "no", "sglang": "unknown"},
    notes=_NOTES,
    remote_code=True,
    nests=("nf4", "fp4"),
)
