"""The row of a model's family; and the refusal of a model that llama.cpp would compute differently."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.spec import BESIDE, Family
from moeconv.quantize.gguf.llama_cpp import rows
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp
from moeconv.quantize.gguf.llama_cpp.rope import rope_of
from moeconv.quantize.gguf.llama_cpp.tensors import template


def _all_rows() -> dict[str, LlamaCpp]:
    """model_type -> row, of every file in rows/."""
    found: dict[str, LlamaCpp] = {}
    for module in iter_modules(rows.__path__, f"{rows.__name__}."):
        found |= import_module(module.name).ROWS
    return found


LLAMA_CPP: dict[str, LlamaCpp] = _all_rows()


# families that llama.cpp runs, but not as transformers does -> why
_UNLIKE = {"phimoe": "its router (sparsemixer) weights the experts differently from llama.cpp's phimoe"}


def supported(family: Family) -> bool:
    """Whether there is a row for a family, or for the language model of a multimodal one."""
    return _kind(family) in LLAMA_CPP


def _kind(family: Family) -> str:
    return family.multimodal.text or family.model_type


def find_row(model: Model) -> LlamaCpp:
    """The row of a model's family.

    Raises InputError for a family without a row, and for a config with which llama.cpp would compute something else."""
    family = model.family
    row = LLAMA_CPP.get(_kind(family))
    if row is None:
        raise InputError(
            f"--format gguf does not support {family.model_type}"
            + (f": {_UNLIKE[family.model_type]}" if family.model_type in _UNLIKE else ""),
            hint=f"It supports {', '.join(sorted(LLAMA_CPP))}. `moeconv formats` lists other formats.",
        )
    if (reason := _reason(model, row)) is not None:
        raise InputError(f"llama.cpp's {row.arch} cannot compute {reason}", hint="Choose another --format.")
    return row


def _reason(model: Model, row: LlamaCpp) -> str | None:
    """What llama.cpp cannot compute; None for a model that it can."""
    defaults = model.family.config.defaults
    for key, allowed in row.needs.items():
        if key in defaults and model.value(key) not in allowed:
            return f"{key} = {escape(model.value(key))}"
    activation = model.value("hidden_act")
    if "hidden_act" in defaults and activation not in row.activations:
        return f"hidden_act = {escape(activation)}"
    heads = model.value("num_attention_heads")
    if not row.grouped_query and (model.value("num_key_value_heads") or heads) != heads:
        return "fewer heads of keys and values than of queries"
    if model.sliding.kind not in row.sliding:
        return {"all": "sliding-window attention in all layers"}.get(model.sliding.kind, "sliding-window attention")
    if (kind := rope_of(model)["rope_type"]) not in row.rope:
        return f"rotary embeddings of type {escape(kind)}"
    reasons = (check(model) for check in row.checks)
    return next(filter(None, reasons), None) or _unknown_tensor(model, row) or _dense_layers(model, row)


def _unknown_tensor(model: Model, row: LlamaCpp) -> str | None:
    packed = model.family.tensors.packed
    for name, role in model.roles.items():
        if role.layer in model.prediction_layers or role.key in row.changes or role.group in BESIDE:
            continue
        layout = packed.get(role.key) if role.expert is None else None
        separate = layout is not None and (len(layout.parts) == 1 or template(row, role.key) is None)
        keys = [f"expert.{part}" for part in layout.parts] if layout and separate else [role.key]
        if any(template(row, key) is None and key not in row.changes for key in keys):
            return f"{role.key} ({escape(name)})"
    return None


def _dense_layers(model: Model, row: LlamaCpp) -> str | None:
    if not model.moe_layers or row.dense_layers == "any":
        return None
    first = model.num_layers - len(model.moe_layers)
    if model.moe_layers != tuple(range(first, model.num_layers)) or (first and row.dense_layers == "none"):
        return f"dense layers between layers with experts ({len(model.moe_layers)} of {model.num_layers})"
    return None
