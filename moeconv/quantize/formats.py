"""The quantization formats, an object each: what a weight becomes on disk, what config.json says, who loads it.

Formats are data over the pack kernels; sizes are pure arithmetic, so a dry run states them to the byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeconv.checkpoint.reader import TensorRef
from moeconv.errors import InputError, UsageError, escape
from moeconv.options import parse_index
from moeconv.plan.build import TORCH_NAMES, whole
from moeconv.plan.plan import Item, TensorSpec

GROUP_SIZES = (128, 64, 32)
BNB_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Scheme:
    """A number format. `group` is weights per scale, None for one scale a row."""

    name: str
    bits: int
    group: int | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """A layout on disk. `make(ref, scheme, role)` plans one weight; `config(scheme, ...)` is quantization_config."""

    name: str
    schemes: tuple[str, ...]  # the first of a width is what --bits means
    grouped: bool
    make: Callable[[TensorRef, Scheme, str], Item]
    config: Callable[[Scheme, Sequence[str], str], dict[str, Any]]
    loads: Mapping[str, Mapping[str, str]]  # scheme -> runtime -> ok | dequantized | no | unknown


BITS = {"int4": 4, "int8": 8, "nf4": 4, "fp4": 4}


def _stem(ref: TensorRef) -> str:
    return ref.name.removesuffix(".weight")


def _codes(
    ref: TensorRef, kernel: str, parts: Sequence[tuple[str, str, str, tuple[int, ...]]], role: str, **params: Any
) -> Item:
    """An item of one weight: `parts` are (suffix, name that the kernel gives it, dtype, shape); the first has codes."""
    numel = math.prod(ref.shape)
    specs = tuple(
        TensorSpec(_stem(ref) + suffix, dtype, shape, role, numel if i == 0 else 0)
        for i, (suffix, _, dtype, shape) in enumerate(parts)
    )
    return Item(specs, kernel, (whole(ref),), {"parts": [p[1] for p in parts], **params}, role.partition(".")[0])


# -- compressed-tensors, pack-quantized, symmetric ---------------------------------------------------------------------


def _make_packed(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    out, width = ref.shape
    scale = "BF16" if ref.dtype not in ("F16", "F32") else ref.dtype
    parts = [
        (".weight_packed", "weight_packed", "I32", (out, width * scheme.bits // 32)),
        (".weight_scale", "weight_scale", scale, (out, width // (scheme.group or width))),
        (".weight_shape", "weight_shape", "I64", (2,)),
    ]
    return _codes(ref, "pack_int", parts, role, bits=scheme.bits, group_size=scheme.group)


def _packed_config(scheme: Scheme, ignore: Sequence[str], dtype: str) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group, "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
        "observer_kwargs": {},
    }  # fmt: skip
    # targets [Linear] with ignore, not regular expressions: SGLang builds names with gate, up and down hard-coded
    group = {
        "targets": ["Linear"], "format": "pack-quantized", "weights": weights, "input_activations": None,
        "output_activations": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


# -- bitsandbytes, native per-expert tensors ---------------------------------------------------------------------------


def quant_state(shape: Sequence[int], *, dtype: str, quant_type: str) -> str:
    """The JSON that bitsandbytes' QuantState.as_dict(packed=True) stores beside 4-bit codes, byte for byte."""
    fields = {"quant_type": quant_type, "blocksize": BNB_BLOCK, "dtype": TORCH_NAMES[dtype], "shape": list(shape)}
    return json.dumps(fields)


def _make_bnb(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    numel = math.prod(ref.shape)
    if scheme.bits == 8:
        rows = [(".weight", "", "I8", ref.shape), (".SCB", "SCB", "F32", (ref.shape[0],))]
        return _codes(ref, "pack_bnb8", rows, role)
    state = quant_state(ref.shape, dtype=ref.dtype, quant_type=scheme.name)
    key = f"quant_state.bitsandbytes__{scheme.name}"
    parts = [
        (".weight", "", "U8", ((numel + 1) // 2, 1)),
        (".weight.absmax", "absmax", "F32", (-(-numel // BNB_BLOCK),)),
        (".weight.quant_map", "quant_map", "F32", (16,)),
        (f".weight.{key}", key, "U8", (len(state),)),
    ]
    return _codes(ref, "pack_bnb4", parts, role, quant_type=scheme.name, block_size=BNB_BLOCK)


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


_PACKED_LOADS = {"transformers": "dequantized", "vllm": "ok", "sglang": "ok", "llama.cpp": "no"}
_BNB_LOADS = {"transformers": "ok", "vllm": "unknown", "sglang": "unknown", "llama.cpp": "no"}

FORMATS: dict[str, Format] = {
    "compressed-tensors": Format(
        "compressed-tensors",
        ("int4", "int8"),
        grouped=True,
        make=_make_packed,
        config=_packed_config,
        loads={"int4": _PACKED_LOADS, "int8": _PACKED_LOADS | {"vllm": "unknown"}},
    ),
    "bitsandbytes": Format(
        "bitsandbytes",
        ("nf4", "fp4", "int8"),
        grouped=False,
        make=_make_bnb,
        config=_bnb_config,
        loads={"nf4": _BNB_LOADS, "fp4": _BNB_LOADS, "int8": _BNB_LOADS | {"vllm": "no"}},
    ),
}


def choose_scheme(format: Format, *, scheme: str | None, bits: int | None) -> str:
    """The scheme's name from --scheme or --bits. Raises UsageError when they contradict or the format lacks it."""
    if bits is not None and bits not in (4, 8):
        raise UsageError(f"--bits {bits}: only 4 and 8 are known")
    if scheme is None:
        return next(s for s in format.schemes if BITS[s] == (bits or 4))
    if bits is not None and BITS.get(scheme) != bits:
        raise UsageError(f"--bits {bits} contradicts --scheme {escape(scheme)}", hint="Give one of them.")
    if scheme not in format.schemes:
        fits = [f.name for f in FORMATS.values() if scheme in f.schemes]
        raise UsageError(
            f"--format {format.name} has no scheme {escape(scheme)}",
            hint=f"Use --format {fits[0]}." if fits else f"It has: {', '.join(format.schemes)}.",
        )
    return scheme


def choose_group(text: str, widths: Sequence[int]) -> int | None:
    """--group-size for weights of these input widths: auto takes the largest of 128, 64, 32 that divides them all.

    Raises UsageError for a word that is no size, InputError where a width is not divisible.
    """
    if text == "channel":
        return None
    if text == "auto":
        for size in GROUP_SIZES:
            if all(width % size == 0 for width in widths):
                return size
        raise InputError(
            f"no group size of {', '.join(map(str, GROUP_SIZES))} divides the widths {sorted(set(widths))}",
            hint="Use --scheme int8 --group-size channel, or --format bitsandbytes.",
        )
    given = parse_index(text)
    if given is None or given not in GROUP_SIZES:
        raise UsageError(f"--group-size {escape(text)}: not auto, channel, {', '.join(map(str, GROUP_SIZES))}")
    bad = sorted({width for width in widths if width % given})
    if bad:
        raise InputError(f"--group-size {given} does not divide width {bad[0]}", hint="Try --group-size auto.")
    return given
