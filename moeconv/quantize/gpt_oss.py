"""MXFP4 in the published layout of gpt-oss: blocks of 32 codes and their exponents, all experts of a layer in
one tensor, [E, out, in / 32, 16] and [E, out, in / 32], which runtimes read by quant_method mxfp4."""

from __future__ import annotations

from collections.abc import Sequence

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, escape
from moeconv.families.spec import Family
from moeconv.plan.plan import Item
from moeconv.quantize.spec import AsStored, Format, Kernel, Part, Scheme, SchemeInfo, codes, stacked_codes
from moeconv.types import JsonObject

_KERNEL = "pack_mxfp4_blocks"
_BLOCK = 32
# classes of transformers that load the layout: only they read tensors of these names
_CLASSES = frozenset({"GptOssForCausalLM"})
# what is not in MXFP4, as the published checkpoints list it
_PLAIN = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def _takes(family: Family) -> bool:
    return family.architecture in _CLASSES


def _form(family: Family) -> Family | None:
    return family.own_form if _takes(family) else None


def _why_not(family: Family) -> str:
    return f"it is the layout of gpt-oss, in which no class of transformers reads a {family.model_type}"


def _parts(shape: tuple[int, ...]) -> list[Part]:
    """The tensors of one matrix [in, out]."""
    width, out = shape
    grid = (out, width // _BLOCK)
    return [("_blocks", "blocks", "U8", (*grid, _BLOCK // 2)), ("_scales", "exponents", "U8", grid)]


def _make(ref: TensorRef, _: Scheme, role: str) -> Item:
    return codes(ref, _KERNEL, _parts(ref.shape), role)


def _stack(ref: TensorRef, _: Scheme, role: str, experts: int) -> list[Item]:
    """A tensor [E, in, out] of all experts."""
    return stacked_codes(ref, ref.name, _KERNEL, _parts(ref.shape[1:]), role, experts, {})


def _config(_scheme: Scheme, _ignore: Sequence[str], _dtype: str, _scope: str) -> JsonObject:
    return {"quant_method": "mxfp4", "modules_to_not_convert": list(_PLAIN)}


def _check(ref: TensorRef, _: Scheme) -> None:
    if len(ref.shape) != 3:
        raise InputError(
            f"tensor {escape(ref.name)!r} is not an expert's, but the layout of gpt-oss has MXFP4 only for experts",
            hint="Use --scope experts.",
        )
    if ref.shape[1] % _BLOCK:
        raise InputError(
            f"tensor {escape(ref.name)!r}: blocks of {_BLOCK} do not divide its {ref.shape[1]} inputs",
            hint="Use another format, such as bitsandbytes.",
        )


GPT_OSS = Format(
    "mxfp4",
    (
        SchemeInfo(
            "mxfp4",
            4,
            "U8",
            {"transformers": "dequantized", "vllm": "unknown", "sglang": "unknown", "llama.cpp": "unknown"},
            limit=0.46,
            measured={"transformers": {}, "vllm": {"gpt_oss": "refused"}},
            hardware=("ampere", "ada", "h100", "b200"),
            error=0.1154,
        ),
    ),
    notes={
        "transformers": "expands to 16 bits in memory without a GPU; has MXFP4 kernels for GPUs, not run",
        "vllm": "its CPU backend has no kernel for it; not run on a GPU",
        "sglang": "the layout of the published checkpoints; not run",
        "llama.cpp": "its converter reads the layout of the published checkpoints; not run",
        "mlx": "mlx-lm reads the layout of the published checkpoints; not run",
    },
    kernels=(Kernel(_KERNEL, encodes={"mxfp4": AsStored(("blocks", "exponents"))}),),
    make=_make,
    config=_config,
    stack=_stack,
    form=_form,
    why_not=_why_not,
    takes=_takes,
    check=_check,
)
