"""A LoRA adapter of SOURCE as a sibling: its FFNs are those of SOURCE plus the adapter's low-rank products.

The layout is that of the `peft` library: adapter_config.json beside adapter_model.safetensors, with two factors per
module, A [r, in] and B [out, r]. The module's weight becomes W + s B A, where s is lora_alpha / r, or
lora_alpha / sqrt(r) with use_rslora (arXiv 2106.09685 and 2312.03732).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.hub import ADAPTER_NAME
from moeconv.checkpoint.safetensors_file import SafetensorsFile, TensorRef
from moeconv.checkpoint.strictjson import canonical_json, read_json_object
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.types import JsonObject
from moeconv.units import counted

CONFIG_NAME, FILE_NAME = "adapter_config.json", ADAPTER_NAME
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# key of adapter_config.json -> the values with which the weight is W + s B A
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    # the other initialisations also change the weights of the base
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "use_rslora": (True, False, None),
}
# keys that state where the factors come from, how they were trained, or which modules have them; any other key that is
# set may change what an adapter computes
_HARMLESS = frozenset({
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "r", "lora_alpha", "rank_pattern",
    "alpha_pattern", "lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
})  # fmt: skip
_UNSET: tuple[object, ...] = (None, False, [], {})
_LIMIT = 2**31  # of ranks and of lora_alpha


@dataclass(frozen=True, slots=True)
class LowRank:
    """The factors of one module, `a` [r, in] and `b` [out, r], and the factor `by` of their product."""

    a: TensorRef
    b: TensorRef
    by: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter whose modules were found in SOURCE. `factors` are by the key and the layer of the stored tensor that
    they change."""

    path: Path
    file: SafetensorsFile
    factors: Mapping[tuple[str, int | None], LowRank]
    identity: str
    warnings: list[str] = field(default_factory=list)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and not a model. Raises InputError if it holds both."""
    if not (path / CONFIG_NAME).is_file():
        return False
    weights = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
    if (path / "config.json").is_file() and any(file.name != FILE_NAME for file in weights):
        raise InputError(
            f"{escape(path)} holds a model and an adapter ({CONFIG_NAME}), so that it is not clear which is meant",
            hint="Put the adapter into a directory of its own, or delete its files if the model is meant.",
        )
    return True


def open_adapter(path: Path, model: Model, *, ffn_only: bool = False) -> Adapter:
    """The adapter in a directory. With `ffn_only`, its factors for other modules than FFNs are left out, with a
    warning.

    Raises InputError for an adapter that is damaged, is not plain LoRA, does not fit `model`, or changes more than its
    FFNs.
    """
    where, config = escape(path), read_json_object(path / CONFIG_NAME, what=CONFIG_NAME)
    for key in (*_PLAIN, *sorted(config.keys() - _PLAIN.keys() - _HARMLESS)):
        value = config.get(key)
        if not any(value is plain or (type(value) is type(plain) and value == plain)
                   for plain in _PLAIN.get(key, _UNSET)):  # fmt: skip
            raise InputError(
                f"{where}: {CONFIG_NAME} has {escape(key)} = {escape(value)}, which makes an adapter more than a "
                "low-rank product per weight",
                hint="Merge it into the base with peft (merge_and_unload), save that model, and name its directory.",
            )
    if not (path / FILE_NAME).is_file():
        raise InputError(f"{where} has no {FILE_NAME}", hint="Save the adapter with safe_serialization=True.")
    file = SafetensorsFile(path / FILE_NAME, label=FILE_NAME)
    factors: dict[tuple[str, int | None], LowRank] = {}
    outside: list[str] = []
    for module, pair in _pairs(file, where).items():
        role = model.roles.get(f"{module}.weight")
        if role is None:
            raise InputError(
                f"{where} changes {escape(module)!r}, which SOURCE does not have",
                hint="Give the adapter's own base as SOURCE.",
            )
        if role.group != "ffn":
            outside.append(module)
            continue
        weight = model.checkpoint.tensors[f"{module}.weight"]
        factors[role.key, role.layer] = _checked(config, module, pair, weight, where)
    if outside and not ffn_only:
        raise InputError(
            f"{where} changes {counted(len(outside), 'module')} outside the FFNs (such as {escape(outside[0])}), which "
            "all experts of the result share",
            hint="Pass --ffn-only to take only its FFNs.",
        )
    if not factors:
        raise InputError(f"{where} changes no FFN", hint="Train an adapter with the FFN's matrices as targets.")
    left = f"{where}: its factors for {counted(len(outside), 'module')} outside the FFNs are left out"
    identity = hashlib.sha256(canonical_json(config) + file.sha256().encode()).hexdigest()
    return Adapter(path, file, factors, identity, [left] if outside else [])


def _pairs(file: SafetensorsFile, where: str) -> dict[str, dict[str, TensorRef]]:
    """The factors "A" and "B" of every module."""
    pairs: dict[str, dict[str, TensorRef]] = {}
    for name, ref in file.tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise InputError(
                f"{where}: tensor {escape(name)!r} is not a factor of a LoRA adapter",
                hint="Merge the adapter into the base with peft, and name that model's directory.",
            )
        pairs.setdefault(match[1], {})[match[2]] = ref
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise InputError(f"{where}: {escape(module)} has only one of its two factors", hint="The file is damaged.")
    return pairs


def _checked(config: JsonObject, module: str, pair: Mapping[str, TensorRef], weight: TensorRef, where: str) -> LowRank:
    a, b = pair["A"], pair["B"]
    rank, alpha = _setting(config, "rank_pattern", "r", module), _setting(config, "alpha_pattern", "lora_alpha", module)
    if rank is None or alpha is None or rank < 1 or not rank.is_integer():
        raise InputError(
            f"{where}: {CONFIG_NAME} needs numbers below {_LIMIT} for r (whole, at least 1) and lora_alpha",
            hint="The file is damaged.",
        )
    want = (int(rank), weight.shape[-1]), (weight.shape[0], int(rank))
    if (a.shape, b.shape) != want or not {a.dtype, b.dtype} <= set(FLOAT_DTYPES):
        raise InputError(
            f"{where}: the factors of {escape(module)} are {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}, "
            f"where SOURCE and r = {int(rank)} need {list(want[0])} and {list(want[1])} floats",
            hint="Give the adapter's own base as SOURCE.",
        )
    return LowRank(a, b, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _setting(config: JsonObject, patterns: str, usual: str, module: str) -> float | None:
    """The number that applies to a module. As in peft, the first pattern that matches the end of its name counts."""
    for pattern, value in _rules(patterns, config.get(patterns)):
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return _number(config.get(usual))


def _number(value: object) -> float | None:
    """The value as a float; None if it is not a finite number below the limit."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LIMIT:
        return None
    return float(value)


def _rules(key: str, value: object) -> Iterator[tuple[str, float]]:
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{CONFIG_NAME}: {key} must be an object of patterns", hint="The file is damaged.")
    for pattern, stated in (value or {}).items():
        number = _number(stated)
        if number is None:
            raise InputError(
                f"{CONFIG_NAME}: {escape(pattern)} in {key} has no number below {_LIMIT}", hint="The file is damaged."
            )
        try:
            re.compile(pattern)
        except re.error:
            raise InputError(
                f"{CONFIG_NAME}: {escape(pattern)} is not a valid pattern", hint="The file is damaged."
            ) from None
        yield pattern, number
