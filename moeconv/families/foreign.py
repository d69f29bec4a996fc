"""Quantizations that moeconv does not read: how each is recognised, by config.json or by the names of tensors.

There is one row per method. Methods that moeconv reads are in methods.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moeconv.errors import Unsupported
from moeconv.types import Config, JsonObject

GIVE = (
    "Give the unquantized checkpoint from which it was made, or one in compressed-tensors INT4, INT8, FP8 or NVFP4, "
    "bitsandbytes, FP8 blocks, MXFP4, GPTQ, AWQ or ModelOpt."
)
_UNREAD = "which moeconv does not read"
_NO_SETTINGS = "and config.json has no quantization_config that states how"
_STATE = "Copy the settings into quantization_config of config.json: old exports have them in a file of their own."


def unread(what: str) -> Unsupported:
    """The error for a packing that is not read; `what` says which one it is."""
    return Unsupported(f"{what}: moeconv does not read this packing", hint=GIVE)


@dataclass(frozen=True, slots=True)
class Foreign:
    """A method of quantization. `methods` are its values of quant_method. `endings` are the endings of its tensors'
    names, all of which occur. `key` is the key of config.json that has its settings, and `bits` lists the names of the
    setting for the width. A method whose quant_method is also that of a supported one is recognised by `endings`, and
    by `without`: endings that do not occur. `why` and `hint` end the message and say what to do."""

    name: str
    methods: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    key: str = "quantization_config"
    bits: tuple[str, ...] = ("bits",)
    without: tuple[str, ...] = ()
    why: str = _UNREAD
    hint: str = GIVE


# in the order in which endings are compared: rows with more endings come first
FOREIGN: tuple[Foreign, ...] = (
    # these are read where config.json has their settings
    Foreign("GPTQ", (), (".qweight", ".qzeros", ".scales", ".g_idx"), why=_NO_SETTINGS, hint=_STATE),
    Foreign("AWQ", (), (".qweight", ".qzeros", ".scales"), why=_NO_SETTINGS, hint=_STATE),
    Foreign("ModelOpt", (), (".weight_scale", ".weight_scale_2"), why=_NO_SETTINGS, hint=_STATE),
    Foreign("AutoRound", ("auto-round", "auto_round", "intel/auto-round")),
    Foreign("MLX", (), (".scales", ".biases"), key="quantization"),
    Foreign("HQQ", ("hqq",), (".W_q",), bits=("nbits", "bits")),
    Foreign("AQLM", ("aqlm",), (".codebooks", ".codes"), bits=("nbits_per_codebook",)),
    Foreign("VPTQ", ("vptq",), (".centroids.weight",)),
    Foreign("EXL3", ("exl3",), (".trellis",)),
    Foreign("EXL2", ("exl2",), (".q_weight", ".q_scale")),
    Foreign("Quark", ("quark",)),
    Foreign("Quanto", ("quanto",), (".weight._data", ".weight._scale"), bits=("weights",)),
    Foreign("EETQ", ("eetq",), (".weight_scales",)),
    Foreign("torchao", ("torchao",), bits=("quant_type",)),
    Foreign("BitNet", ("bitnet",)),
    Foreign("SpQR", ("spqr",)),
    Foreign("HIGGS", ("higgs",)),
    Foreign(
        "AutoFP8", ("fp8",), (".weight_scale",), without=(".weight_scale_inv",)
    ),  # transformers' own has the latter
    Foreign("FP-Quant", ("fp_quant",), (".qweight", ".scales", ".forward_hadamard_matrix")),
)


def recognise(config: Config, names: Iterable[str]) -> tuple[Foreign, JsonObject] | None:
    """(method, its settings in config.json) of a checkpoint that one of these methods quantized, else None. config.json
    has precedence over the names of tensors."""
    settings = config.get("quantization_config")
    stated = settings.get("quant_method") if isinstance(settings, dict) else None
    ends = {"." + name.rpartition(".")[2] for name in names} | {
        "." + ".".join(name.rsplit(".", 2)[1:]) for name in names
    }
    if isinstance(stated, str):
        named = (way for way in FOREIGN if stated.lower() in way.methods)
        found = next((way for way in named if not way.without or _shown(way, ends)), None)
        return None if found is None else (found, dict(settings or {}))
    for way in FOREIGN:
        if way.endings and not way.without and _shown(way, ends):
            own = config.get(way.key)
            return way, dict(own) if isinstance(own, dict) else {}
    return None


def _shown(way: Foreign, ends: set[str]) -> bool:
    """Whether the endings of the tensors' names are those of a method."""
    return ends.issuperset(way.endings) and ends.isdisjoint(way.without)


def bits_of(way: Foreign, settings: Config) -> int | None:
    """Bits per weight, if the settings state a number."""
    return next((settings[key] for key in way.bits if type(settings.get(key)) is int), None)
