"""The layout of packed weights in memory and on disk, and the tensors of a checkpoint that belong to each, from the
headers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from moeconv.errors import InputError, escape
from moeconv.plan.kernels.states import BNB_BLOCK, NESTED_BLOCK

# An object of transformers, or a module whose class changes: neither has types that would help.
Stock: TypeAlias = Any

Headers = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> safetensors dtype and shape

METHOD = "moeconv"
STATE = "quant_state.bitsandbytes__"
AGAIN = "Quantize the source checkpoint again, or load a complete copy of this one."


@dataclass(frozen=True)
class Layout:
    """How one parameter is packed: fused experts [experts, parts * out, in], where a part is a projection (gate and up
    are two), or the weight [out, in] of a linear layer (`experts` is 0). With `stacked`, all experts are in one tensor
    on disk too; its tensors there are those of the module, and `state` is the number of bytes of their quant_state."""

    scheme: str  # nf4, fp4 or int8
    experts: int
    parts: int
    out: int
    columns: int
    block_size: int = BNB_BLOCK
    nested: bool = False  # double quantization: the scales of the 4-bit codes are 8-bit codes
    sources: tuple[str, ...] = ()  # names on disk before renaming, one pattern per part; * is the expert
    dtype: str = "bfloat16"  # of the weight that was packed, from its quant_state
    stacked: bool = False
    state: int = 0  # bytes of the quant_state of all experts

    @property
    def count(self) -> int:
        """The number of weights in one projection of one expert."""
        return self.out * self.columns

    @property
    def blocks(self) -> int:
        """The number of scales of one projection of one expert."""
        return -(-self.count // self.block_size)

    @property
    def nested_blocks(self) -> int:
        """The number of scales of these scales."""
        return -(-self.blocks // NESTED_BLOCK)

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{suffix of the attribute of the module: (shape, dtype)}; "" is the packed parameter."""
        lead, parts = ((self.experts,) if self.experts else ()), self.parts
        if self.scheme == "int8":
            return {
                "": ((*lead, parts * self.out, self.columns), torch.int8),
                "_scb": ((*lead, parts * self.out), torch.float32),
            }
        plain = {
            "": ((*lead, parts * ((self.count + 1) // 2), 1), torch.uint8),
            "_absmax": ((*lead, parts * self.blocks), torch.uint8 if self.nested else torch.float32),
            "_quant_map": ((16,), torch.float32),
        }
        if self.stacked:
            plain["_quant_state"] = ((self.state,), torch.uint8)
        if not self.nested:
            return plain
        return plain | {
            "_nested_absmax": ((*lead, parts * self.nested_blocks), torch.float32),
            "_nested_quant_map": ((256,), torch.float32),
            "_nested_offset": ((*lead, parts), torch.float32),
        }

    @property
    def files(self) -> dict[str, tuple[str, tuple[int, ...] | None]]:
        """{suffix of a tensor on disk, after the name of the projection: (safetensors dtype, shape)}; the shape is None
        if any is allowed."""
        if self.scheme == "int8":
            return {".weight": ("I8", (self.out, self.columns)), ".SCB": ("F32", (self.out,))}
        plain: dict[str, tuple[str, tuple[int, ...] | None]] = {
            ".weight": ("U8", ((self.count + 1) // 2, 1)),
            ".weight.absmax": ("U8" if self.nested else "F32", (self.blocks,)),
            ".weight.quant_map": ("F32", (16,)),
            f".weight.{STATE}{self.scheme}": ("U8", None),
        }
        if not self.nested:
            return plain
        return plain | {
            ".weight.nested_absmax": ("F32", (self.nested_blocks,)),
            ".weight.nested_quant_map": ("F32", (256,)),
        }


def companion(weight: str, suffix: str) -> str:
    """The name of a companion of a weight: `...gate_proj.SCB` for `...gate_proj.weight` and `.SCB`. Also for
    patterns."""
    return weight.removesuffix(".weight") + suffix


def stored_tensors(files: Sequence[str] | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor name: (safetensors dtype, shape)} of these files, from their headers. Raises InputError for other
    files."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise InputError(
            "packed experts can only be loaded from safetensors files", hint="Load the directory of the checkpoint."
        )
    stored = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                view = opened.get_slice(name)
                stored[name] = (view.get_dtype(), tuple(view.get_shape()))
    return stored


def find_layouts(model: PreTrainedModel, stored: Headers, *, block_size: int) -> dict[str, Layout]:
    """{parameter name: layout} for all experts and linear layers that are packed in `stored`. The conversion mapping of
    transformers determines which tensors make up which parameter, and the dtypes of the tensors determine the scheme,
    so that schemes may differ between layers.

    Raises InputError for packed tensors that are neither, and for those that are incomplete or have a wrong shape.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()

    def target_of(name: str) -> tuple[str, str | None]:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)

    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # parameter -> source -> names
    layouts: dict[str, Layout] = {}
    for name in _packed_names(stored):
        target, source = target_of(name)
        if _is_stacked(name, stored):
            layouts[target] = _stacked_layout(model, target, parameters, name, stored, block_size=block_size)
        elif source is None and _is_linear(model, target):
            layouts[target] = _linear_layout(parameters[target], name, stored, block_size=block_size)
        elif source is None or target not in parameters:
            raise InputError(
                f"{escape(name)} is stored packed, but {type(model).__name__} has no experts and no linear layer "
                "of that name",
                hint="Only these can be kept packed: quantize with --scope experts.",
            )
        else:
            found[target][source].append(name)
    if not found and not layouts:
        raise InputError(
            "according to config.json the experts are packed, but no tensor of the checkpoint is packed", hint=AGAIN
        )
    by_source = {source: converter for converter in converters for source in converter.source_patterns}
    for target, names in found.items():
        converter = by_source[next(iter(names))]
        layouts[target] = _layout(target, parameters[target], converter, names, stored, block_size=block_size)
    _check_other_layers({t: layout for t, layout in layouts.items() if layout.experts}, parameters, stored, target_of)
    return layouts


def _packed_names(stored: Headers) -> Iterator[str]:
    """The names of the tensors that are the codes of a packed weight."""
    for name, (dtype, _) in stored.items():
        if dtype in ("U8", "I8") and (name.endswith(".weight") or _is_stacked(name, stored)):
            yield name


def _is_stacked(name: str, stored: Headers) -> bool:
    """Whether a tensor has the codes of all experts of a layer."""
    return not {name + ".quant_state", name + ".scb"}.isdisjoint(stored)


def _layout(
    target: str,
    parameter: Tensor,
    converter: WeightConverter,
    names: Mapping[str, Sequence[str]],
    stored: Headers,
    *,
    block_size: int,
) -> Layout:
    """The layout of one fused parameter. Raises InputError unless all its tensors exist with the right dtype and
    shape."""
    kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
    parts = len(converter.source_patterns)
    plain = kinds[: len(converter.operations)] in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    plain = plain and target.endswith(converter.target_patterns[0])
    if not plain or parameter.ndim != 3 or parameter.shape[1] % parts:
        raise InputError(
            f"{escape(target)}: the experts of this family are not stacked as rows per expert, so they cannot be "
            f"kept packed",
            hint="Quantize with --format compressed-tensors for this family.",
        )
    experts, rows, columns = parameter.shape
    first = next(iter(names.values()))[0]
    scheme, nested = _scheme(first, stored)
    layout = Layout(
        scheme, experts, parts, rows // parts, columns, block_size, nested, tuple(converter.source_patterns)
    )
    for source in converter.source_patterns:
        if len(names.get(source, ())) != experts:
            raise InputError(
                f"{escape(target)}: only {len(names.get(source, ()))} of its {experts} experts have a packed {source}",
                hint=AGAIN,
            )
        for name in names[source]:
            _check_files(name, layout, stored)
    return layout


def _stacked_layout(
    model: nn.Module,
    target: str,
    parameters: Mapping[str, Tensor],
    name: str,
    stored: Headers,
    *,
    block_size: int,
) -> Layout:
    """The layout of a parameter whose experts are in one packed tensor on disk. Raises InputError unless all its
    tensors exist with the right dtype and shape."""
    parameter = parameters.get(target)
    if parameter is None or parameter.ndim != 3:
        raise InputError(
            f"{escape(name)} is stored packed, but {type(model).__name__} has no experts of that name", hint=AGAIN
        )
    state = stored.get(f"{name}.quant_state", ("", (0,)))[1]
    layout = Layout(
        _stacked_scheme(name, stored), parameter.shape[0], 1, parameter.shape[1], parameter.shape[2], block_size,
        f"{name}.nested_absmax" in stored, stacked=True, state=state[0],
    )  # fmt: skip
    kinds = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32"}
    for suffix, (shape, dtype) in layout.tensors.items():
        part = name + suffix.replace("_", ".", 1)
        if stored.get(part) != (kinds[dtype], shape):
            raise InputError(
                f"{escape(part)} is {escape(stored.get(part, 'missing'))}, expected {kinds[dtype]} {list(shape)}",
                hint=AGAIN,
            )
    return layout


def _stacked_scheme(name: str, stored: Headers) -> str:
    """The scheme of stacked experts. fp4 is decoded as nf4: they differ only in their quant_map, which is a tensor."""
    return "int8" if stored[name][0] == "I8" else "nf4"


def _is_linear(model: nn.Module, target: str) -> bool:
    """Whether a parameter is the weight of an ordinary linear layer."""
    path, _, name = target.rpartition(".")
    try:
        return name == "weight" and type(model.get_submodule(path)) is nn.Linear
    except AttributeError:
        return False


def _linear_layout(parameter: Tensor, name: str, stored: Headers, *, block_size: int) -> Layout:
    scheme, nested = _scheme(name, stored)
    out, columns = parameter.shape
    layout = Layout(scheme, 0, 1, out, columns, block_size, nested)
    _check_files(name, layout, stored)
    return layout


def _check_files(name: str, layout: Layout, stored: Headers) -> None:
    """Raises InputError unless all tensors of one packed weight exist with the dtype and shape of its layout."""
    for suffix, (dtype, shape) in layout.files.items():
        wanted = companion(name, suffix)
        if wanted not in stored:
            raise InputError(f"{escape(wanted)} is missing from the checkpoint", hint=AGAIN)
        if stored[wanted][0] != dtype or (shape is not None and stored[wanted][1] != shape):
            raise InputError(
                f"{escape(wanted)} is {stored[wanted][0]} {list(stored[wanted][1])}, expected {dtype} {shape}",
                hint=AGAIN,
            )


def _scheme(name: str, stored: Headers) -> tuple[str, bool]:
    """(scheme, whether the scales are quantized too) of a packed weight."""
    if stored[name][0] == "I8":
        return "int8", False
    for scheme in ("nf4", "fp4"):
        if f"{name}.{STATE}{scheme}" in stored:
            return scheme, f"{name}.nested_absmax" in stored
    raise InputError(f"{escape(name)}.{STATE}nf4 (or fp4) is missing from the checkpoint", hint=AGAIN)


def _check_other_layers(
    layouts: Mapping[str, Layout],
    parameters: Mapping[str, Tensor],
    stored: Headers,
    target_of: Callable[[str], tuple[str, str | None]],
) -> None:
    """Raises InputError for experts that are stored neither packed nor unpacked: transformers would only warn, and load
    random numbers."""
    kinds = {re.sub(r"\d+", "0", target) for target in layouts}
    rest = {name for name in parameters if re.sub(r"\d+", "0", name) in kinds} - set(layouts)
    if rest:
        rest -= {target_of(name)[0] for name in stored}
    if rest:
        raise InputError(
            f"{escape(sorted(rest)[0])}: the experts of this parameter are missing from the checkpoint", hint=AGAIN
        )
