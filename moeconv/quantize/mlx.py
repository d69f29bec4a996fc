"""MLX: the codes of `mx.quantize` in the layout of mlx-lm, which stacks the experts of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, escape
from moeconv.families.mlx_lm import floats_only, switch_form, why_not
from moeconv.plan.plan import Item
from moeconv.quantize.spec import Format, Kernel, Part, Scheme, SchemeInfo, codes, stacked_codes
from moeconv.types import JsonObject

_KERNEL = "pack_mlx"
_AFFINE = "affine"


def _mode(scheme: Scheme) -> str:
    """MLX's name for the mode: the same for integers of all widths, and the name of the scheme otherwise."""
    return _AFFINE if scheme.name.startswith(_AFFINE) else scheme.name


def _parts(ref: TensorRef, scheme: Scheme) -> list[Part]:
    """The tensors of one matrix."""
    out, width = ref.shape[-2:]
    group = scheme.group or width
    affine = _mode(scheme) == _AFFINE
    grid = (out, width // group)
    made = [
        (".weight", "weight", "U32", (out, width * scheme.bits // 32)),
        (".scales", "scales", ref.dtype if affine else "U8", grid),
    ]
    return [*made, *([(".biases", "biases", ref.dtype, grid)] if affine else [])]


def _params(scheme: Scheme) -> dict[str, object]:
    return {"mode": _mode(scheme), "bits": scheme.bits, "group_size": scheme.group}


def _make(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    return codes(ref, _KERNEL, _parts(ref, scheme), role, **_params(scheme))


def _stack(ref: TensorRef, scheme: Scheme, role: str, experts: int) -> list[Item]:
    """A tensor [E, out, in] of all experts."""
    stem = ref.name.removesuffix(".weight")
    return stacked_codes(ref, stem, _KERNEL, _parts(ref, scheme), role, experts, _params(scheme))


def _config(scheme: Scheme, _ignore: Sequence[str], _dtype: str, _scope: str) -> JsonObject:
    """As mlx-lm writes it; it finds the quantized modules by their scales."""
    return {"group_size": scheme.group, "bits": scheme.bits, "mode": _mode(scheme)}


def _check(ref: TensorRef, scheme: Scheme) -> None:
    if ref.shape[-1] * scheme.bits % 32:
        raise InputError(
            f"tensor {escape(ref.name)!r}: its {ref.shape[-1]} columns of {scheme.bits} bits do not fill 32-bit words",
            hint="Use another scheme.",
        )


_LOADS = MappingProxyType({"transformers": "no", "vllm": "no", "sglang": "unknown", "llama.cpp": "no", "mlx": "ok"})
_GROUPS = (128, 64, 32)
_RUN: Mapping[str, Mapping[str, str]] = {"mlx": {}}


def _affine(bits: int, limit: float, errors: tuple[float, float, float]) -> SchemeInfo:
    """Errors of groups of 32, 64 and 128."""
    by_group: dict[int | None, float] = {size: error**2 for size, error in zip(reversed(_GROUPS), errors, strict=True)}
    return SchemeInfo(
        f"{_AFFINE}{bits}",
        bits,
        "U32",
        _LOADS,
        limit,
        groups=_GROUPS,
        errors=by_group,
        measured=_RUN,
        usual=64,
        error=errors[2],
        hardware=("mac",),
    )


def _float(name: str, bits: int, group: int, error: float) -> SchemeInfo:
    return SchemeInfo(
        name, bits, "U32", _LOADS, 4 * error, groups=(group,), measured=_RUN, error=error, hardware=("mac",)
    )


MLX = Format(
    "mlx",
    (
        _affine(4, 0.4, (0.0811, 0.0911, 0.1002)),
        _affine(2, 1.0, (0.3621, 0.3945, 0.4239)),
        _affine(3, 0.8, (0.1713, 0.1905, 0.2074)),
        _affine(5, 0.2, (0.0396, 0.0445, 0.0490)),
        _affine(6, 0.1, (0.0201, 0.0226, 0.0249)),
        _affine(8, 0.05, (0.0078, 0.0087, 0.0093)),
        _float("mxfp4", 4, 32, 0.1154),
        _float("nvfp4", 4, 16, 0.0951),
        _float("mxfp8", 8, 32, 0.0266),
    ),
    notes={"mlx": "run on a CPU; not run on the GPU of a Mac"},
    kernels=(Kernel(_KERNEL),),
    make=_make,
    config=_config,
    stack=_stack,
    form=switch_form,
    why_not=why_not,
    prediction=False,
    config_keys=("quantization",),
    leaves=floats_only,
)
