"""From the tensors on disk to the packed ones in memory while transformers loads, and back when it saves."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations.accelerate import load_offloaded_parameter

from moeconv.errors import InputError, escape
from moeconv.hf.layout import AGAIN, STATE, Layout, companion
from moeconv.hf.modules import PackedExperts, PackedLinear, buffers_of
from moeconv.plan.kernels.pack.fourbit import read_quant_state
from moeconv.plan.kernels.states import quant_state

# suffix on disk -> suffix of the module's attribute, for what is fused as the weights are
_FUSED = {".weight": "", ".weight.absmax": "_absmax", ".weight.nested_absmax": "_nested_absmax", ".SCB": "_scb"}
_MAPS = {".weight.quant_map": "_quant_map", ".weight.nested_quant_map": "_nested_quant_map"}


class FusePacked(ConversionOps):
    """Runs a family's own fusing operations on the packed weights, and on each of their companions in turn.

    A linear layer, where nothing is fused, has no operations."""

    supports_many_to_many = True

    def __init__(self, sources: Sequence[str], target: str, operations: Sequence[ConversionOps]) -> None:
        self.sources, self.target, self.operations = list(sources), target, list(operations)

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],  # noqa: ARG002 (given by name; our own say which of them are a weight's parts)
        target_patterns: list[str],  # noqa: ARG002
        **kwargs: Any,
    ) -> dict[str, Any]:
        full_layer_name: str = kwargs["full_layer_name"]
        model: nn.Module = kwargs["model"]
        path, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        packed = module.packed if isinstance(module, PackedExperts | PackedLinear) else {}
        layout = packed.get(name)

        def taken(suffix: str) -> list[Tensor]:
            """A companion's tensors, the parts one after the other, an expert after another within a part."""
            found = [input_dict.pop(companion(source, suffix)) for source in self.sources]
            return [tensor for part in found for tensor in (part if isinstance(part, list) else [part])]

        def fused(suffix: str) -> Tensor:
            if not self.operations:
                return taken(suffix)[0]
            parts: dict[str, Any] = {source: input_dict.pop(companion(source, suffix)) for source in self.sources}
            for operation in self.operations:
                parts = operation.convert(
                    parts,
                    source_patterns=self.sources,
                    target_patterns=[self.target],
                    **kwargs,
                )
            made: Tensor = parts[self.target]
            return made

        if layout is None:  # this layer is stored unpacked
            return {self.target: fused(".weight")}
        made = {self.target + _FUSED[suffix]: fused(suffix) for suffix in layout.files if suffix in _FUSED}
        if layout.scheme == "int8":
            return made
        for suffix, attribute in _MAPS.items():
            if suffix in layout.files:
                maps = taken(suffix)
                if any(not torch.equal(maps[0], other) for other in maps):
                    raise InputError(f"{escape(full_layer_name)}: its experts have different quant_maps", hint=AGAIN)
                made[self.target + attribute] = maps[0].clone()
        states = [read_quant_state(state) for state in taken(f".weight.{STATE}{layout.scheme}")]
        _check_states(states, layout, where=full_layer_name)
        packed[name] = dataclasses.replace(layout, dtype=states[0]["dtype"])
        if layout.nested:
            offsets = torch.tensor([state["nested_offset"] for state in states], dtype=torch.float32)
            offsets = offsets.view(layout.parts, -1).T if layout.experts else offsets
            made[f"{self.target}_nested_offset"] = offsets.contiguous()
        return made

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving writes the names on disk itself (`disk_tensors`), so nothing is left to reverse."""
        return self


def _check_states(states: Sequence[dict[str, Any]], layout: Layout, *, where: str) -> None:
    """All of a layer's quant_states say what the layout says, and name one dtype."""
    expected = (layout.scheme, layout.block_size, [layout.out, layout.columns], layout.nested, states[0]["dtype"])
    for fields in states:
        said = (
            fields["quant_type"], fields["blocksize"], fields["shape"], "nested_offset" in fields, fields["dtype"]
        )  # fmt: skip
        if said != expected:
            raise InputError(
                f"{escape(where)}: a quant_state says type, block size, shape, double quantization and dtype "
                f"{escape(said)}, but the others are {escape(expected)}",
                hint=AGAIN,
            )


# -- what transformers' converters become ------------------------------------------------------------------------------

_SUFFIXES = (
    ".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
    f".weight.{STATE}nf4", f".weight.{STATE}fp4", ".SCB",
)  # fmt: skip
_ATTRIBUTES = ("", "_absmax", "_quant_map", "_nested_absmax", "_nested_quant_map", "_nested_offset", "_scb")


def with_companions(entries: Sequence[Any], model: nn.Module) -> list[Any]:
    """transformers' conversions, where those that build packed experts take the companions too, and one more for every
    packed linear layer. One converter takes them all: as converters of their own they would have to come first, since
    `...weight` also matches `...weight.absmax`."""
    packed = [
        (f"{path}.{name}", layout)
        for path, module in model.named_modules()
        if isinstance(module, PackedExperts | PackedLinear)
        for name, layout in module.packed.items()
    ]
    experts = [name for name, layout in packed if layout.experts and not layout.stacked]
    linear = sorted({re.sub(r".*\.\d+\.", "", name) for name, layout in packed if not layout.experts})
    made = [_widened(entry) if _builds(entry, experts) else entry for entry in entries]
    return made + [
        WeightConverter(
            [companion(name, suffix) for suffix in _SUFFIXES],
            [name + suffix for suffix in _ATTRIBUTES],
            operations=[FusePacked([name], name, [])],
        )
        for name in linear
    ]


def stacked_renamings(model: nn.Module) -> list[Any]:
    """Experts in one packed tensor: what lies beside the codes has a dot before its last name on disk (transformers'
    own renamings then match it as they match the codes), which no attribute of a module can have."""
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


def _builds(entry: Any, packed: Sequence[str]) -> bool:
    return isinstance(entry, WeightConverter) and any(name.endswith(entry.target_patterns[0]) for name in packed)


def _widened(converter: WeightConverter) -> WeightConverter:
    target = converter.target_patterns[0]
    return converter.copy(
        [companion(source, suffix) for source in converter.source_patterns for suffix in _SUFFIXES],
        [target + suffix for suffix in _ATTRIBUTES],
        operations=[FusePacked(converter.source_patterns, target, converter.operations)],
    )


# -- saving ------------------------------------------------------------------------------------------------------------


def check_stacked(model: nn.Module) -> None:
    """What the JSON beside 4-bit codes of all experts says is the shape and block size that they are decoded with.

    Raises InputError."""
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
                    f"{escape(path)}.{name}: its quant_state says shape {escape(fields['shape'])} in blocks of "
                    f"{fields['blocksize']}, the model {[layout.out, layout.columns]} in blocks of {layout.block_size}",
                    hint=AGAIN,
                )


def disk_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state dict with every packed parameter as the tensors that it was loaded from, bit for bit; names are
    those before transformers' renaming, which save_pretrained reverses itself. What lies on disk is read back."""
    state = dict(model.state_dict())
    for path, module in model.named_modules():
        if not isinstance(module, PackedExperts | PackedLinear):
            continue
        for name, layout in module.packed.items():
            if layout.stacked:  # on disk as in memory
                continue
            target = f"{path}.{name}"
            held = {suffix: _present(model, target + suffix, state.pop(target + suffix)) for suffix in layout.tensors}
            for stem, tensors in _split(layout, held, target):
                state |= {companion(stem, suffix): tensor for suffix, tensor in tensors.items()}
    return state


def _present(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the module, from the disk where it was offloaded."""
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def _split(layout: Layout, held: dict[str, Tensor], target: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name of a weight on disk, its tensors by suffix) for every expert and part."""
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
    """What stands before a pattern of names on disk: `model.layers.0.` of `model.layers.0.mlp.experts.gate_up_proj`."""
    if not sources:
        return ""
    start = sources[0].partition("*")[0].rstrip(".")  # "mlp.experts"
    before, found, _ = target.rpartition(start)
    return before if found else target.rpartition(".")[0] + "."
