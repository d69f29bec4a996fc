"""The settings of config.json that switch tensors on, as they follow from the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.errors import Unsupported
from moeconv.families.expert_blocks import QKVO_BIAS
from moeconv.families.model import Model
from moeconv.families.spec import Family

_QKV_BIAS, _O_BIAS = QKVO_BIAS[:3], QKVO_BIAS[3:]
_FFN_BIAS = ("ffn.gate_bias", "ffn.up_bias", "ffn.down_bias")
# config key -> the tensors that it adds, where the family has both
_BIASES: Mapping[str, tuple[str, ...]] = {
    "attention_bias": QKVO_BIAS,
    "attention_out_bias": _O_BIAS,
    "qkv_bias": _QKV_BIAS,
    "use_qkv_bias": _QKV_BIAS,
    "use_bias": QKVO_BIAS + _FFN_BIAS,
    "mlp_bias": _FFN_BIAS,
}


def flags(family: Family) -> dict[str, tuple[str, ...]]:
    """Config key of the family that is true or false -> keys of the tensors that it adds."""
    defaults = family.config.defaults
    found = {key: adds for key, adds in _BIASES.items() if key in defaults}
    if "attention_out_bias" in found and "attention_bias" in found:
        found["attention_bias"] = _QKV_BIAS
    switched = {key: adds for key, adds in family.tensors.switched.items() if isinstance(defaults.get(key), bool)}
    have = {key: tuple(each for each in adds if family.has(each)) for key, adds in (found | switched).items()}
    return {key: adds for key, adds in have.items() if adds}


def check_flags(model: Model) -> None:
    """Raises Unsupported for tensors that the config switches off, and for missing ones that it switches on."""
    layers: dict[str, set[int | None]] = {}
    for role in model.roles.values():
        layers.setdefault(role.key, set()).add(role.layer)
    for flag, adds in flags(model.family).items():
        for key in adds:
            has, wanted = layers.get(key, set()), layers.get(key.removesuffix("_bias"), set())
            if not model.value(flag) and has:
                raise _refused(model, f"{flag} is false, but the file has {key}")
            if model.value(flag) and key.endswith("_bias") and has != wanted:
                raise _refused(model, f"{flag} is true, but some layers of the file have no {key}")


def _refused(model: Model, reason: str) -> Unsupported:
    return Unsupported(f"as {model.family.model_type}: {reason}", hint="Use the original model.")
