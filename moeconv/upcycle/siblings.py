"""Several fine-tuned siblings of one base, whose FFNs become the experts (Branch-Train-MiX, arXiv 2403.07816).

Everything outside the FFNs comes from the source. A sibling must therefore have the same architecture, with the same
value of every number that a layer computes with, under whichever keys its config has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.hub import resolve
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.meaning import OUTSIDE_THE_LAYERS, meaning
from moeconv.families.model import Model, open_model
from moeconv.plan.flow import ByteSource
from moeconv.upcycle.adapter import Adapter, is_adapter, open_adapter

Sibling: TypeAlias = Model | Adapter

_HINT = "Siblings must be fine-tunes of one base, whose layers compute with the same numbers."


def open_siblings(model: Model, paths: Sequence[str], *, ffn_only: bool = False) -> list[Sibling]:
    """The siblings behind the values of --experts-from: checkpoints, or LoRA adapters of `model`.

    Raises InputError for what is damaged, and for an adapter that does not fit the model."""
    found: list[Sibling] = []
    for path in map(resolve, paths):
        adapted = is_adapter(Path(path))
        found.append(open_adapter(Path(path), model, ffn_only=ffn_only) if adapted else open_model(path))
    if ffn_only and not any(isinstance(sibling, Adapter) for sibling in found):
        raise UsageError("--ffn-only is for LoRA adapters in --experts-from", hint="Leave it out.")
    return found


def checkpoints(siblings: Sequence[Sibling]) -> list[Model]:
    """The siblings that are checkpoints of their own."""
    return [sibling for sibling in siblings if isinstance(sibling, Model)]


def place_of(sibling: Sibling) -> Path:
    """The directory of a sibling."""
    return sibling.path if isinstance(sibling, Adapter) else Path(sibling.checkpoint.path)


def bytes_of(sibling: Sibling) -> ByteSource:
    """What the plan reads of a sibling."""
    return sibling.file if isinstance(sibling, Adapter) else sibling.checkpoint


def check_siblings(model: Model, siblings: Sequence[Sibling]) -> list[str]:
    """Warnings about siblings whose FFNs can be experts of `model`. Raises UsageError for a single sibling, InputError
    for a sibling that does not fit."""
    if len(siblings) < 2:
        raise UsageError(
            "--experts-from names only one checkpoint, and experts from siblings need at least two",
            hint="Repeat --experts-from. To make SOURCE's own FFN an expert, name SOURCE too.",
        )
    warnings: list[str] = []
    for sibling in checkpoints(siblings):
        warnings += _check_config(model, sibling)
        _check_tensors(model, sibling)
    warnings += [text for sibling in siblings for text in sibling.warnings]
    names = [str(place_of(sibling).resolve()) for sibling in siblings]
    if len(set(names)) < len(names):
        warnings.append("--experts-from names a checkpoint more than once, so that some experts are identical")
    if theirs := {sibling.dtype for sibling in checkpoints(siblings)} - {model.dtype}:
        warnings.append(f"siblings in {', '.join(sorted(theirs))} are converted to the dtype of SOURCE ({model.dtype})")
    return warnings


def _check_config(model: Model, sibling: Model) -> list[str]:
    """Warnings about different settings outside the layers. Raises InputError for a different setting inside."""
    where = escape(sibling.checkpoint.path)
    if _parts(model) != _parts(sibling):
        raise InputError(
            f"{where} is {sibling.family.model_type} and SOURCE is {model.family.model_type}, whose layers differ",
            hint=_HINT,
        )
    if sibling.quantization:
        raise InputError(f"{where} is quantized", hint="Give the unquantized checkpoint.")
    ours, theirs = meaning(model), meaning(sibling)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            its, mine = escape(theirs.get(key)), escape(ours.get(key))
            raise InputError(f"{where} has {escape(key)} = {its}, SOURCE has {mine}", hint=_HINT)
    other = [
        f"{key} = {escape(sibling.value(key))} (SOURCE: {escape(model.value(key))})"
        for key in OUTSIDE_THE_LAYERS
        if sibling.value(key) != model.value(key)
        and key in model.family.config.defaults
        and key in sibling.family.config.defaults
    ]
    return (
        [f"{where} has {', '.join(other)}: the result has SOURCE's value, since siblings give only their FFNs"]
        if other
        else []
    )


def _parts(model: Model) -> frozenset[str]:
    """The kinds of tensors in the layers. They are equal where two families have the same architecture."""
    return frozenset(role.key for role in model.roles.values() if role.layer is not None)


def _check_tensors(model: Model, sibling: Model) -> None:
    """Raises InputError where the FFNs do not have the same tensors, of the same shapes and of float dtypes."""
    ours = {(r.key, r.layer): n for n, r in model.roles.items() if r.group == "ffn"}
    theirs = {(r.key, r.layer): n for n, r in sibling.roles.items() if r.group == "ffn"}
    where = escape(sibling.checkpoint.path)
    if odd := sorted((set(ours) ^ set(theirs)), key=str):
        key, layer = odd[0]
        lacks = where if odd[0] in ours else "SOURCE"
        raise InputError(
            f"{lacks} has no {key} in layer {layer}, and {'SOURCE' if odd[0] in ours else where} has it", hint=_HINT
        )
    for which, name in ours.items():
        ref, its = model.checkpoint.tensors[name], sibling.checkpoint.tensors[theirs[which]]
        if its.shape != ref.shape:
            raise InputError(
                f"{where}: tensor {escape(its.name)!r} has shape {list(its.shape)}, in SOURCE {list(ref.shape)}",
                hint=_HINT,
            )
        if its.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{where}: tensor {escape(its.name)!r} is {its.dtype}, which is not a float dtype",
                hint="Give the unquantized checkpoint.",
            )
