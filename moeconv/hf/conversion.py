"""Converts tensors on disk to packed ones in memory when transformers loads a model, and back when it saves one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform
from transformers.integrations.accelerate import load_offloaded_parameter

from moeconv.errors import InputError, escape
from moeconv.hf.layout import AGAIN, STATE, Layout, Stock, companion
from moeconv.hf.modules import PackedExperts, PackedLinear, buffers_of
from moeconv.plan.kernels.pack.fourbit import read_quant_state
from moeconv.plan.kernels.states import quant_state
from moeconv.types import JsonObject

# suffix on disk -> suffix of the attribute of the module, for tensors that are fused like the weights
_FUSED = {".weight": "", ".weight.absmax": "_absmax", ".weight.nested_absmax": "_nested_absmax", ".SCB": "_scb"}
_MAPS = {".weight.quant_map": "_quant_map", ".weight.nested_quant_map": "_nested_quant_map"}


class FusePacked(ConversionOps):
    """Applies a family's own fusing operations to the packed weights, and to each of their companions in turn.

    A linear layer is not fused, and has no operations."""

    supports_many_to_many = True

    def __init__(self, sources: Sequence[str], target: str, operations: Sequence[ConversionOps]) -> None:
        self.sources, self.target, self.operations = list(sources), target, list(operations)

    def convert(
        self,
        input_dict: JsonObject,
        source_patterns: list[str],  # noqa: ARG002 (passed by name; `self.sources` are the parts of a weight)
        target_patterns: list[str],  # noqa: ARG002
        **kwargs: Stock,
    ) -> JsonObject:
        full_layer_name: str = kwargs["full_layer_name"]
        model: nn.Module = kwargs["model"]
        path, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        packed = module.packed if isinstance(module, PackedExperts | PackedLinear) else {}
        layout = packed.get(name)
        if layout is None:  # this layer is stored unpacked
            return {self.target: self._fused(input_dict, ".weight", kwargs)}
        made = {
            self.target + _FUSED[suffix]: self._fused(input_dict, suffix, kwargs)
            for suffix in layout.files
            if suffix in _FUSED
        }
        if layout.scheme == "int8":
            return made
        made |= self._maps(input_dict, layout, full_layer_name)
        states = [read_quant_state(state) for state in self._taken(input_dict, f".weight.{STATE}{layout.scheme}")]
        _check_states(states, layout, where=full_layer_name)
        packed[name] = dataclasses.replace(layout, dtype=states[0]["dtype"])
        if layout.nested:
            offsets = torch.tensor([state["nested_offset"] for state in states], dtype=torch.float32)
            offsets = offsets.view(layout.parts, -1).T if layout.experts else offsets
            made[f"{self.target}_nested_offset"] = offsets.contiguous()
        return made

    def _taken(self, tensors: JsonObject, suffix: str) -> list[Tensor]:
        """Remove the companions with a suffix from `tensors`, and return them: ordered by part, and within a part by
        expert."""
        found = [tensors.pop(companion(source, suffix)) for source in self.sources]
        return [tensor for part in found for tensor in (part if isinstance(part, list) else [part])]

    def _fused(self, tensors: JsonObject, suffix: str, context: JsonObject) -> Tensor:
        """Remove the companions with a suffix from `tensors`, and return them fused as the family fuses its weights."""
        if not self.operations:
            return self._taken(tensors, suffix)[0]
        parts: JsonObject = {source: tensors.pop(companion(source, suffix)) for source in self.sources}
        for operation in self.operations:
            parts = operation.convert(parts, source_patterns=self.sources, target_patterns=[self.target], **context)
        made: Tensor = parts[self.target]
        return made

    def _maps(self, tensors: JsonObject, layout: Layout, name: str) -> dict[str, Tensor]:
        """The tables of 4-bit values, which all experts of a layer must share. Raises InputError if they differ."""
        made = {}
        for suffix, attribute in _MAPS.items():
            if suffix in layout.files:
                maps = self._taken(tensors, suffix)
                if any(not torch.equal(maps[0], other) for other in maps):
                    raise InputError(f"{escape(name)}: its experts have different quant_maps", hint=AGAIN)
                made[self.target + attribute] = maps[0].clone()
        return made

    @property
    def reverse_op(self) -> ConversionOps:
        """No operation: `disk_tensors` already makes the tensors on disk when a model is saved."""
        return self


def _check_states(states: Sequence[JsonObject], layout: Layout, *, where: str) -> None:
    """Raises InputError unless all quant_states of a layer agree with the layout, and have one dtype."""
    expected = (layout.scheme, layout.block_size, [layout.out, layout.columns], layout.nested, states[0]["dtype"])
    for fields in states:
        found = (
            fields["quant_type"], fields["blocksize"], fields["shape"], "nested_offset" in fields, fields["dtype"]
        )  # fmt: skip
        if found != expected:
            raise InputError(
                f"{escape(where)}: a quant_state has the type, block size, shape, double quantization and dtype "
                f"{escape(found)}, but the others have {escape(expected)}",
                hint=AGAIN,
            )


# -- what transformers' converters become ------------------------------------------------------------------------------

_SUFFIXES = (
    ".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
    f".weight.{STATE}nf4", f".weight.{STATE}fp4", ".SCB",
)  # fmt: skip
_ATTRIBUTES = ("", "_absmax", "_quant_map", "_nested_absmax", "_nested_quant_map", "_nested_offset", "_scb")


def with_companions(entries: Sequence[WeightTransform], model: nn.Module) -> list[WeightTransform]:
    """The conversions of transformers, changed so that those that build packed experts also take the companions of the
    weights, and one more conversion per packed linear layer. One converter takes all tensors of a weight: separate ones
    would have to come first, because the pattern `...weight` also matches `...weight.absmax`."""
    packed = [
        (f"{path}.{name}", layout)
        for path, module in model.named_modules()
        if isinstance(module, PackedExperts | PackedLinear)
        for name, layout in module.packed.items()
    ]
    experts = [name for name, layout in packed if layout.experts and not layout.stacked]
    linear = sorted({re.sub(r".*\.\d+\.", "", name) for name, layout in packed if not layout.experts})
    made: list[WeightTransform] = [_widened(entry) if _builds(entry, experts) else entry for entry in entries]
    made += [
        WeightConverter(
            [companion(name, suffix) for suffix in _SUFFIXES],
            [name + suffix for suffix in _ATTRIBUTES],
            operations=[FusePacked([name], name, [])],
        )
        for name in linear
    ]
    return made


def stacked_renamings(model: nn.Module) -> list[WeightRenaming]:
    """The renamings of the companions of experts that are packed in one tensor. On disk a dot precedes the last part of
    their name, so that the renamings of transformers that match the codes match them too. The name of an attribute
    cannot contain a dot."""
    names = {
        f"{path.rpartition('.')[2]}.{name}{suffix}": len(suffix)
        for path, module in model.named_modules()
        if isinstance(module, PackedExperts)
        for name, layout in module.packed.items()
        if layout.stacked
        for suffix in layout.tensors
        if suffix
    }
    return [
        WeightRenaming(re.escape(f"{name[:-size]}.{name[-size + 1 :]}"), name) for name, size in sorted(names.items())
    ]


def _builds(entry: WeightTransform, packed: Sequence[str]) -> TypeGuard[WeightConverter]:
    """Whether a conversion builds one of these packed parameters."""
    return isinstance(entry, WeightConverter) and any(name.endswith(entry.target_patterns[0]) for name in packed)


def _widened(converter: WeightConverter) -> WeightConverter:
    """The converter, which also takes the companions of its weights."""
    target = converter.target_patterns[0]
    return converter.copy(
        [companion(source, suffix) for source in converter.source_patterns for suffix in _SUFFIXES],
        [target + suffix for suffix in _ATTRIBUTES],
        operations=[FusePacked(converter.source_patterns, target, converter.operations)],
    )


# -- saving ------------------------------------------------------------------------------------------------------------


def check_stacked(model: nn.Module) -> None:
    """Raises InputError if the quant_state of experts in one packed tensor has another shape or block size than the one
    with which they are decoded."""
    for path, module in model.named_modules():
        if not isinstance(module, PackedExperts):
            continue
        for name, layout in module.packed.items():
            state = buffers_of(module).get(f"{name}_quant_state")
            if state is None or state.is_meta:
                continue
            fields = read_quant_state(state)
            if (fields["shape"], fields["blocksize"]) != ([layout.out, layout.columns], layout.block_size):
                raise InputError(
                    f"{escape(path)}.{name}: its quant_state has the shape {escape(fields['shape'])} and blocks of "
                    f"{fields['blocksize']}, and the model {[layout.out, layout.columns]} and blocks of "
                    f"{layout.block_size}",
                    hint=AGAIN,
                )


def disk_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of the model, in which every packed parameter is replaced by the tensors that it was loaded from,
    bit for bit. The names are those before the renaming of transformers, which save_pretrained reverses itself.
    Offloaded tensors are read from the disk."""
    state = dict(model.state_dict())
    for path, module in model.named_modules():
        if not isinstance(module, PackedExperts | PackedLinear):
            continue
        for name, layout in module.packed.items():
            if layout.stacked:  # the tensors on disk are those in memory
                continue
            target = f"{path}.{name}"
            held = {suffix: _present(model, target + suffix, state.pop(target + suffix)) for suffix in layout.tensors}
            for stem, tensors in _split(layout, held, target):
                state |= {companion(stem, suffix): tensor for suffix, tensor in tensors.items()}
    return state


def _present(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the model, read from the disk if it was offloaded."""
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def _split(layout: Layout, held: dict[str, Tensor], target: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (name of a weight on disk, its tensors by suffix) for every expert and part."""
    experts = max(1, layout.experts)
    cut = {suffix: held[attribute].reshape(experts, layout.parts, -1) for suffix, attribute in _FUSED.items()
           if attribute in held}  # fmt: skip
    offsets = held["_nested_offset"].reshape(experts, layout.parts).cpu() if layout.nested else None
    prefix = _prefix(target, layout.sources)
    for part in range(layout.parts):
        for expert in range(experts):
            tensors = {
                suffix: cut[suffix][expert, part].reshape(shape).contiguous().clone()
                for suffix, (_, shape) in layout.files.items()
                if suffix in cut and shape is not None
            }
            for suffix, attribute in _MAPS.items():
                if attribute in held:
                    tensors[suffix] = held[attribute].clone()
            if layout.scheme != "int8":
                offset = None if offsets is None else float(offsets[expert, part])
                text = quant_state(
                    (layout.out, layout.columns), dtype=layout.dtype, quant_type=layout.scheme,
                    block_size=layout.block_size, nested_offset=offset,
                )  # fmt: skip
                tensors[f".weight.{STATE}{layout.scheme}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
            name = prefix + layout.sources[part].replace("*", str(expert)) if layout.sources else target
            yield name, tensors


def _prefix(target: str, sources: Sequence[str]) -> str:
    """The part of a name before the pattern of names on disk, such as `model.layers.0.` of
    `model.layers.0.mlp.experts.gate_up_proj`."""
    if not sources:
        return ""
    start = sources[0].partition("*")[0].rstrip(".")  # "mlp.experts"
    before, found, _ = target.rpartition(start)
    return before if found else target.rpartition(".")[0] + "."
