"""The layouts of NVIDIA's Model Optimizer: what quantization_config says about the weights, or hf_quant_config.json of
older exports."""

from __future__ import annotations

from moeconv.errors import InputError, escape
from moeconv.families.encodings import Encoding
from moeconv.families.foreign import unread
from moeconv.types import Config

_GROUP = 16
_FLOAT8 = Encoding("float8", 8)
_BLOCKS = Encoding("float8", 8, (128, 128))


def modelopt_encodings(quantization: Config) -> tuple[Encoding, ...]:
    """The forms that a weight may have: that of `quant_algo`, or with MIXED_PRECISION those of all `quantized_layers`.
    Modules that stay plain are known by their tensors. Raises InputError for invalid settings, Unsupported for another
    algorithm."""
    algorithm = _algorithm(quantization)
    if algorithm != "MIXED_PRECISION":
        return (_encoding(algorithm, quantization),)
    layers = quantization.get("quantized_layers")
    if not isinstance(layers, dict) or not layers or not all(isinstance(layer, dict) for layer in layers.values()):
        raise InputError(
            "config.json: quantization_config.quantized_layers must be an object of objects",
            hint="Correct config.json, or download it again.",
        )
    return tuple(dict.fromkeys(_encoding(_algorithm(layer), {**quantization, **layer}) for layer in layers.values()))


def _algorithm(settings: Config) -> str:
    return str(settings.get("quant_algo")).upper()


def _encoding(algorithm: str, settings: Config) -> Encoding:
    if algorithm == "FP8":
        return _FLOAT8
    if algorithm == "FP8_PB_WO":
        return _BLOCKS
    size = settings.get("group_size", _GROUP)
    if algorithm in ("NVFP4", "W4A16_NVFP4") and type(size) is int and size > 0:
        return Encoding("nvfp4-modelopt", 4, (1, size))
    raise unread(f"ModelOpt {escape(algorithm)[:80]} in groups of {escape(size)[:80]} (quant_algo)")
