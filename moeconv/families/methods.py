"""How weights are stored according to quantization_config, as the library that wrote it reads it.

METHODS has one row per quant_method. If config.json leaves a setting out, the default of the library applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from moeconv.errors import InputError, Unsupported, escape
from moeconv.families.autoawq import awq_encodings, awq_form
from moeconv.families.autogptq import gptq_encodings, gptq_form
from moeconv.families.encodings import Encoding
from moeconv.families.foreign import GIVE
from moeconv.families.foreign import unread as _unread
from moeconv.families.modelopt import modelopt_encodings
from moeconv.families.module_groups import groups_of
from moeconv.types import Config

# from a module's names and whether it is an embedding to the forms that its weight may have
Forms = Callable[[Iterable[str], bool], tuple[Encoding, ...]]
_BLOCK = [128, 128]  # of transformers' FineGrainedFP8Config


def encodings(quantization: Config) -> tuple[Encoding, ...]:
    """The forms that a packed weight may have, the most likely first. Raises Unsupported for a method or form that
    moeconv does not read, InputError for invalid settings."""
    method = quantization_method(quantization)
    if method not in METHODS:
        raise Unsupported(
            f"the weights are quantized by {escape(method)} (config.json: quantization_config.quant_method), which "
            "moeconv does not read",
            hint=GIVE,
        )
    return METHODS[method](quantization)


def forms_of(quantization: Config) -> Forms:
    """A function from a module's names (as stored, as in memory) and whether it is an embedding to the forms that its
    weight may have, the likeliest first; none for a weight that stays plain. Raises as `encodings` does."""
    method = quantization_method(quantization)
    if method in _BY_MODULE:
        return _BY_MODULE[method](quantization)
    everywhere = encodings(quantization)
    return lambda _modules, _embedding: everywhere


def _of_module(form: Callable[[str, str], Encoding | None]) -> Forms:
    def forms(modules: Iterable[str], _embedding: bool) -> tuple[Encoding, ...]:
        names = tuple(modules)
        found = form(names[0], names[-1])
        return () if found is None else (found,)

    return forms


def _compressed_forms(quantization: Config) -> Forms:
    by_group, groups = _by_group(quantization), groups_of(quantization)

    def forms(modules: Iterable[str], embedding: bool) -> tuple[Encoding, ...]:
        keys = (groups.group_of(module, embedding=embedding) for module in modules)
        return tuple(dict.fromkeys(by_group[key] for key in keys if key is not None))

    return forms


def quantization_method(quantization: Config) -> str:
    """quant_method. mlx-lm states none, and old files of bitsandbytes only its switches load_in_4bit and
    load_in_8bit."""
    stated = quantization.get("quant_method")
    if stated is None and {"group_size", "bits"} <= quantization.keys():
        return "mlx"
    switched = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    return str(stated) if stated is not None or not switched else "bitsandbytes"


def _fp8(quantization: Config) -> tuple[Encoding, ...]:
    block = quantization.get("weight_block_size", _BLOCK)
    static = quantization.get("activation_scheme") == "static"
    if block is None:
        return (Encoding("float8-blocks", 8, static=static, scale="scale_inv"),)
    return (Encoding("float8-blocks", 8, _block(block, "weight_block_size"), static=static, scale="scale_inv"),)


def _block(value: object, key: str) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)):
        raise InputError(
            f"config.json: quantization_config.{key} must be two whole numbers above 0, found {escape(value)[:80]}",
            hint="Correct config.json, or download it again.",
        )
    return value[0], value[1]


def _bitsandbytes(quantization: Config) -> tuple[Encoding, ...]:
    storage = quantization.get("bnb_4bit_quant_storage") or "uint8"
    if storage != "uint8":
        raise Unsupported(
            f"the 4-bit codes are stored as {escape(storage)} (bnb_4bit_quant_storage), which moeconv does not read",
            hint="Save the model with bnb_4bit_quant_storage uint8, or give the unquantized checkpoint.",
        )
    ours = quantization.get("moeconv")
    block = ours.get("block_size") if isinstance(ours, dict) else None
    sizes = [block] if type(block) is int and block > 0 else [64, 128]  # 128 on AMD's older GPUs
    nested = bool(quantization.get("bnb_4bit_use_double_quant"))
    kind = "fp4" if quantization.get("bnb_4bit_quant_type") == "fp4" else "nf4"
    four = [
        Encoding("bitsandbytes4", 4, nested=n, block=b, quant_type=kind) for n in (nested, not nested) for b in sizes
    ]
    eight = [Encoding("bitsandbytes8", 8)]
    return tuple([*four, *eight] if quantization.get("load_in_4bit") else [*eight, *four])


def _compressed(quantization: Config) -> tuple[Encoding, ...]:
    return tuple(dict.fromkeys(_by_group(quantization).values()))


def _by_group(quantization: Config) -> dict[str, Encoding]:
    """The form of each config group, by its key."""
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise InputError(
            "config.json: quantization_config.config_groups must be an object of objects",
            hint="Correct config.json, or download it again.",
        )
    sparsity = quantization.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise _unread(f"the weights are sparse ({escape(sparsity.get('format'))})")
    whole = quantization.get("format")
    return {key: _group(group, group.get("format") or whole) for key, group in groups.items()}


def _group(group: Config, layout: object) -> Encoding:
    """The form of one group of compressed-tensors."""
    weights, activations = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise _unread("compressed-tensors with a group whose weights are not quantized")
    static = isinstance(activations, dict) and activations.get("dynamic") in (False, "local")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    for name, (kinds, widths) in _COMPRESSED.items():
        if name == layout and kind in kinds and bits in widths:
            break
    else:
        raise _unread(f"compressed-tensors {escape(layout)} of {escape(bits)}-bit {escape(kind)}")
    if weights.get("actorder") in ("group", True):
        raise _unread("compressed-tensors with groups in the order of activations (actorder group)")
    form = "float8" if kind == "float" and name == "naive-quantized" else _FORMS[name]
    return Encoding(form, bits, _grid(weights), zero_points=weights.get("symmetric") is False, static=static)


# the layouts of compressed-tensors: types and widths of their numbers; _FORMS has their rows in encodings.PARTS
_COMPRESSED: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "pack-quantized": (("int",), (2, 3, 4, 8)),
    "int-quantized": (("int",), (8,)),
    "float-quantized": (("float",), (8,)),
    "naive-quantized": (("int", "float"), (8,)),
    "nvfp4-pack-quantized": (("float",), (4,)),
    "mxfp4-pack-quantized": (("float",), (4,)),
    "mxfp8-quantized": (("float",), (8,)),
}
_FORMS = {
    "pack-quantized": "packed-int",
    "int-quantized": "int8",
    "naive-quantized": "int8",
    "float-quantized": "float8",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4-rows",
    "mxfp8-quantized": "mxfp8-rows",
}


def _grid(weights: Config) -> tuple[int | None, int | None]:
    """(rows, columns) of weights that share a scale."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:  # the library then derives it
        strategy = "tensor" if size is None else "group" if type(size) is int and size > 0 else "channel"
    if strategy == "tensor":
        return None, None
    if strategy == "channel":
        return 1, None
    if strategy == "block":
        return _block(weights.get("block_structure"), "block_structure")
    if strategy in ("group", "tensor_group") and type(size) is int and size > 0:
        return 1, size
    raise _unread(f"compressed-tensors with strategy {escape(strategy)} and group_size {escape(size)}")


_MLX_GROUPS = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
_MLX_BITS = (2, 3, 4, 5, 6, 8)


def _mlx(quantization: Config) -> tuple[Encoding, ...]:
    """mlx-lm: settings for all modules, and other ones by the name of a module."""
    modules = [value for value in quantization.values() if isinstance(value, dict)]
    return tuple(dict.fromkeys(map(_mlx_module, (quantization, *modules))))


def _mlx_module(settings: Config) -> Encoding:
    mode, bits, size = settings.get("mode"), settings.get("bits"), settings.get("group_size")
    mode = "affine" if mode is None else mode
    known = bits in _MLX_BITS and size in (32, 64, 128) if mode == "affine" else _MLX_GROUPS.get(mode) == (bits, size)
    if not known or type(bits) is not int or settings.get("global_scale"):
        raise _unread(f"MLX {escape(mode)} with {escape(bits)} bits in groups of {escape(size)}")
    return Encoding(f"mlx-{mode}", bits, (1, size), scale="scales")


METHODS: Mapping[str, Callable[[Config], tuple[Encoding, ...]]] = {
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "mlx": _mlx,
    "fbgemm_fp8": lambda _quantization: (Encoding("float8", 8, (1, None)),),
    "mxfp4": lambda _quantization: (Encoding("mxfp4", 4),),
    "gptq": gptq_encodings,
    "awq": awq_encodings,
    "modelopt": modelopt_encodings,
    "modelopt_fp4": modelopt_encodings,
}
# methods whose settings list modules with other settings -> the forms of a module
_BY_MODULE: Mapping[str, Callable[[Config], Forms]] = {
    "compressed-tensors": _compressed_forms,
    "gptq": lambda quantization: _of_module(gptq_form(quantization)),
    "awq": lambda quantization: _of_module(awq_form(quantization)),
}
