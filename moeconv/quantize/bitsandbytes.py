"""bitsandbytes: native tensors of NF4, FP4 and row-wise INT8, which transformers 5 loads with `import moeconv.hf`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import UsageError
from moeconv.plan.build import TORCH_NAMES
from moeconv.plan.kernels.states import BNB_BLOCK, NESTED_BLOCK, quant_state
from moeconv.plan.plan import Item
from moeconv.quantize.spec import BY_DATA, GPUS, MIXED, Format, Kernel, Scheme, SchemeInfo, codes, stacked_codes
from moeconv.types import JsonObject


def _make_bnb(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    numel = math.prod(ref.shape)
    if scheme.bits == 8:
        made = [(".weight", "", "I8", ref.shape), (".SCB", "SCB", "F32", (ref.shape[0],))]
        return codes(ref, "pack_bnb8", made, role)
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


def _stack_bnb(ref: TensorRef, scheme: Scheme, role: str, experts: int) -> list[Item]:
    """A tensor [E, rows, columns] of all experts.

    Blocks (or rows, for INT8) follow the order of a matrix on disk, so that decoding is one reshape. The first axis of
    the parts is the expert, except of the parts that all experts share. The names of the parts begin with the full name
    of the tensor, so that a runtime that renames it renames the parts too."""
    numel, shape = math.prod(ref.shape[1:]), ref.shape[1:]
    if scheme.bits == 8:
        each = [("", "", "I8", shape), (".scb", "SCB", "F32", shape[:1])]
        return stacked_codes(ref, ref.name, "pack_bnb8", each, role, experts, {})
    blocks = -(-numel // BNB_BLOCK)
    each = [
        ("", "", "U8", ((numel + 1) // 2, 1)),
        (".absmax", "absmax", "U8" if scheme.nested else "F32", (blocks,)),
    ]
    state = quant_state(shape, dtype=TORCH_NAMES[ref.dtype], quant_type=scheme.name)
    shared = [
        (".quant_map", "quant_map", "F32", (16,)),
        (".quant_state", "quant_state", "U8", (len(state),)),
    ]
    if scheme.nested:
        each += [
            (".nested_absmax", "nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
            (".nested_offset", "nested_offset", "F32", (1,)),
        ]
        shared += [(".nested_quant_map", "nested_quant_map", "F32", (256,))]
    params = {"quant_type": scheme.name, "block_size": BNB_BLOCK, "nested": scheme.nested}
    return stacked_codes(ref, ref.name, "pack_bnb4_slice", each, role, experts, params, shared=shared)


def _bnb_config(scheme: Scheme, ignore: Sequence[str], dtype: str, scope: str) -> JsonObject:
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


def _by_layer(parts: Mapping[Scheme, JsonObject], schemes: Mapping[int, Scheme]) -> JsonObject:
    """The config of the scheme with the fewest bits, with the scheme of every layer for the loader of moeconv."""
    config = parts[min(dict.fromkeys(schemes.values()), key=lambda s: s.bits)]
    by_layer = {str(layer): s.name for layer, s in schemes.items()}
    return config | {"moeconv": config["moeconv"] | {"scheme": MIXED, "scheme_by_layer": by_layer}}


def _check_blocks(item: Item, method: str) -> None:
    """Raises UsageError where data cannot choose the scales: that needs blocks that do not cross rows."""
    if method in BY_DATA and item.params["nested"]:
        raise UsageError(
            f"--method {method} chooses the scales, but --double-quant would round them again",
            hint="Leave one of the two out.",
        )
    width, block = item.inputs[0].shape[1], item.params["block_size"]
    if method in BY_DATA and width % block:
        raise UsageError(
            f"--method {method} needs rows of whole blocks, but blocks of {block} do not divide the width {width}",
            hint="Use --method rtn, or --format compressed-tensors.",
        )


_LOADS = {"transformers": "ok", "vllm": "unknown", "sglang": "ok", "llama.cpp": "no"}
_RUN: dict[str, dict[str, str]] = {"transformers": {}}
_NO_FIT = {"mse": "its scale is the block's largest magnitude"}

BITSANDBYTES = Format(
    "bitsandbytes",
    (
        SchemeInfo("nf4", 4, "U8", _LOADS, limit=0.4, errors={None: 0.0927**2}, nests=True, measured=_RUN),
        SchemeInfo("fp4", 4, "U8", _LOADS, limit=0.4, nests=True, measured=_RUN),
        SchemeInfo(
            "int8",
            8,
            "I8",
            _LOADS | {"vllm": "no", "sglang": "unknown"},
            limit=0.05,
            errors={None: 0.0078**2},
            measured=_RUN,
        ),
    ),
    notes={
        "transformers": "after `import moeconv.hf`, or with --self-contained and trust_remote_code=True",
        "vllm": "only with its bitsandbytes plugin on a GPU, not run; not with all experts of a layer in one tensor",
        "sglang": "according to its source, not run; not with all experts of a layer in one tensor",
    },
    kernels=(
        Kernel("pack_bnb4", grid="moeconv.quantize.gptq.grids:FOUR_BIT", check=_check_blocks, without=_NO_FIT),
        Kernel("pack_bnb8", grid="moeconv.quantize.gptq.grids:ROWWISE", without=_NO_FIT),
        Kernel("pack_bnb4_slice", without=_NO_FIT),
    ),
    make=_make_bnb,
    config=_bnb_config,
    stack=_stack_bnb,
    mixes=("nf4", "int8"),
    mixed=_LOADS | {"vllm": "no", "sglang": "unknown"},
    mixed_measured=_RUN,
    merge=_by_layer,
    hardware=(*GPUS, "cpu"),
    imports="import moeconv.hf  # registers the loader of packed experts",
    remote_code="moeconv.hf.quantizer",
)
