"""`import moeconv.hf` makes stock transformers 5 load experts stored packed (bitsandbytes NF4, FP4, row-wise INT8).

`AutoModelForCausalLM.from_pretrained(directory)` then keeps those experts packed in memory, decodes per forward only
the experts that tokens were routed to, and runs the family's own experts code on them, in any experts_implementation.

How such a checkpoint is told from an ordinary one: its `quantization_config` says `quant_method: bitsandbytes` (what
transformers 4 and SGLang read) and has a `moeconv` key besides. transformers picks the config class by `load_in_4bit`
or `load_in_8bit`, so those two entries of its table are wrapped by a class that looks for the key. With it our config
is built, whose `quant_method` "moeconv" leads to the quantizer registered under that name; without it the class that
was there before is called, and the stock quantizer follows. Nothing else of bitsandbytes is touched.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeconv.errors import InputError, escape
from moeconv.plan.kernels.pack import decode_4bit, decode_int8_rowwise, read_quant_state

METHOD = "moeconv"
_STATE = "quant_state.bitsandbytes__"
_AGAIN = "Quantize the source checkpoint again, or load a complete copy of this one."


@dataclass(frozen=True)
class Layout:
    """How one fused parameter [experts, parts * out, in] is packed; a part is a projection (gate and up are two)."""

    scheme: str  # nf4, fp4 or int8
    experts: int
    parts: int
    out: int
    columns: int
    block_size: int

    @property
    def count(self) -> int:
        """Weights in one expert's projection."""
        return self.out * self.columns

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Suffix of the module's attribute -> shape and dtype; "" is the packed parameter."""
        experts, parts = self.experts, self.parts
        if self.scheme == "int8":
            return {
                "": ((experts, parts * self.out, self.columns), torch.int8),
                "_scb": ((experts, parts * self.out), torch.float32),
            }
        return {
            "": ((experts, parts * ((self.count + 1) // 2), 1), torch.uint8),
            "_absmax": ((experts, parts * -(-self.count // self.block_size)), torch.float32),
            "_quant_map": ((16,), torch.float32),
        }

    @property
    def files(self) -> dict[str, tuple[str, tuple[int, ...] | None]]:
        """Suffix of a tensor on disk, after a projection's name -> safetensors dtype and shape (None: any)."""
        if self.scheme == "int8":
            return {".weight": ("I8", (self.out, self.columns)), ".SCB": ("F32", (self.out,))}
        return {
            ".weight": ("U8", ((self.count + 1) // 2, 1)),
            ".weight.absmax": ("F32", (-(-self.count // self.block_size),)),
            ".weight.quant_map": ("F32", (16,)),
            f".weight.{_STATE}{self.scheme}": ("U8", None),
        }


# ------------------------------------------------------------------------------------------------ experts in memory


class PackedExperts(nn.Module):
    """Mixed in before a family's experts class: same attributes, but the fused parameters are packed."""

    packed: dict[str, Layout]  # parameter name -> layout
    stock: type[nn.Module]  # the family's own class
    num_experts: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states` [tokens, hidden], `top_k_index` and `top_k_weights` [tokens, k], as in the stock class."""
        total = self.num_experts
        hit = torch.unique(top_k_index)
        hit = hit[hit < total]  # expert parallelism marks the tokens of other ranks with num_experts
        if not hit.numel():
            hit = torch.zeros(1, dtype=torch.long, device=top_k_index.device)
        if hit.numel() < total:
            # The hit experts in order, renumbered 0, 1, ...: the stock code sums in the same order as over all experts.
            slots = torch.full((total + 1,), hit.numel(), dtype=top_k_index.dtype, device=top_k_index.device)
            slots[hit] = torch.arange(hit.numel(), dtype=top_k_index.dtype, device=top_k_index.device)
            top_k_index = slots[top_k_index.clamp(max=total)]
        few = self._decoded(hit, dtype=hidden_states.dtype)
        return self.stock.forward(few, hidden_states, top_k_index, top_k_weights)

    def _decoded(self, hit: Tensor, *, dtype: torch.dtype) -> nn.Module:
        """A stand-in for this module that holds the experts `hit` [n] alone, decoded; made anew for every forward."""
        few = object.__new__(self.stock)
        few.__dict__.update(self.__dict__)
        parameters: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            if name in self.packed:
                parameters[name] = self._decode(name, hit, dtype=dtype)
            elif parameter is not None and parameter.ndim and parameter.shape[0] == self.num_experts:
                parameters[name] = parameter.index_select(0, hit)  # an unpacked tensor per expert, such as a bias
            else:
                parameters[name] = parameter
        few.__dict__.update(_parameters=parameters, num_experts=hit.numel())
        return few

    def _decode(self, name: str, hit: Tensor, *, dtype: torch.dtype) -> Tensor:
        """[n, parts * out, in] in `dtype`."""
        layout = self.packed[name]

        def chosen(suffix: str) -> Tensor:
            tensor = getattr(self, name + suffix)
            return tensor if hit.numel() == layout.experts else tensor.index_select(0, hit)

        if layout.scheme == "int8":
            return decode_int8_rowwise(chosen(""), scb=chosen("_scb"), dtype=dtype)
        decode = functools.partial(
            decode_4bit, quant_map=getattr(self, name + "_quant_map"), block_size=layout.block_size, dtype=dtype
        )
        octets, absmax, pieces = chosen(""), chosen("_absmax"), hit.numel() * layout.parts
        if layout.count % layout.block_size == 0:
            values = decode(octets.reshape(-1), absmax=absmax.reshape(-1), count=pieces * layout.count)
        else:  # every projection ends in a short block of its own
            rows = zip(octets.reshape(pieces, -1), absmax.reshape(pieces, -1), strict=True)
            values = torch.stack([decode(row, absmax=scales, count=layout.count) for row, scales in rows])
        return values.view(hit.numel(), layout.parts * layout.out, layout.columns)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves like every module; but a cast (`model.half()`) leaves the scales in float32, where they are exact."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


@functools.cache
def _packed_class(stock: type[nn.Module]) -> type[PackedExperts]:
    return type(f"Packed{stock.__name__}", (PackedExperts, stock), {"stock": stock})


def _install(model: nn.Module, target: str, layout: Layout) -> None:
    """Replaces a fused parameter on the meta device by its packed tensors, and the experts' class by the packed one."""
    path, _, name = target.rpartition(".")
    module: Any = model.get_submodule(path)
    if not isinstance(module, PackedExperts):
        stock: Any = type(module)
        module.__class__ = _packed_class(stock)
        module.packed = {}
    module.packed[name] = layout
    for suffix, (shape, dtype) in layout.tensors.items():
        empty = torch.empty(shape, dtype=dtype, device="meta")
        if suffix:
            module.register_buffer(name + suffix, empty)
        else:
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))


# ------------------------------------------------------------------------------------------------- experts on disk


class FusePacked(ConversionOps):
    """Runs a family's own fusing operations on the packed weights, and on each of their companions in turn."""

    supports_many_to_many = True

    def __init__(self, converter: WeightConverter) -> None:
        self.sources = list(converter.source_patterns)
        self.target = converter.target_patterns[0]
        self.operations = list(converter.operations)

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: nn.Module,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        path, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        layout = module.packed.get(name) if isinstance(module, PackedExperts) else None

        def fused(suffix: str) -> Tensor:
            parts = {source: input_dict.pop(_companion(source, suffix)) for source in self.sources}
            for operation in self.operations:
                parts = operation.convert(
                    parts,
                    source_patterns=self.sources,
                    target_patterns=[self.target],
                    full_layer_name=full_layer_name,
                    model=model,
                    **kwargs,
                )
            return parts[self.target]

        if layout is None:  # this layer is stored unpacked
            return {self.target: fused(".weight")}
        if layout.scheme == "int8":
            return {self.target: fused(".weight"), f"{self.target}_scb": fused(".SCB")}
        maps, states = (
            [tensor for source in self.sources for tensor in input_dict.pop(_companion(source, suffix))]
            for suffix in (".weight.quant_map", f".weight.{_STATE}{layout.scheme}")
        )
        _check_states(states, maps, layout, where=full_layer_name)
        return {
            self.target: fused(".weight"),
            f"{self.target}_absmax": fused(".weight.absmax"),
            f"{self.target}_quant_map": maps[0].clone(),
        }


def _companion(weight: str, suffix: str) -> str:
    """`...gate_proj.weight` and `.SCB` -> `...gate_proj.SCB`; works on tensor names and on patterns of them."""
    return weight.removesuffix(".weight") + suffix


def _check_states(states: Sequence[Tensor], maps: Sequence[Tensor], layout: Layout, *, where: str) -> None:
    """All of a layer's quant_states say what the layout says, and all its quant_maps are one."""
    for state in {bytes(state.cpu().numpy()): state for state in states}.values():
        fields = read_quant_state(state)
        said = (fields["quant_type"], fields["blocksize"], fields["shape"])
        if said != (layout.scheme, layout.block_size, [layout.out, layout.columns]):
            raise InputError(
                f"{escape(where)}: a quant_state says type, block size and shape {escape(said)}, but the tensors are "
                f"{(layout.scheme, layout.block_size, [layout.out, layout.columns])}",
                hint=_AGAIN,
            )
    if any(not torch.equal(maps[0], other) for other in maps):
        raise InputError(f"{escape(where)}: its experts have different quant_maps", hint=_AGAIN)


def _stored_tensors(files: Sequence[str] | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> safetensors dtype and shape, from the headers alone."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise InputError("packed experts load from safetensors files only", hint="Load the checkpoint's directory.")
    stored = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                view = opened.get_slice(name)
                stored[name] = (view.get_dtype(), tuple(view.get_shape()))
    return stored


def find_layouts(
    model: nn.Module, stored: Mapping[str, tuple[str, tuple[int, ...]]], *, block_size: int
) -> dict[str, Layout]:
    """Fused parameter name -> layout, for all experts that `stored` holds packed; transformers' own conversion mapping
    says which tensors make up which parameter. The tensors' dtypes decide, so schemes may differ by layer.

    Raises InputError for packed tensors that are no experts, and for experts that are incomplete or misshapen."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_source = {source: converter for converter in converters for source in converter.source_patterns}
    parameters = model.state_dict()

    def target_of(name: str) -> tuple[str, str | None]:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)

    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # parameter -> source -> names
    for name, (dtype, _) in stored.items():
        if dtype in ("U8", "I8") and name.endswith(".weight"):
            target, source = target_of(name)
            if source is None or target not in parameters:
                raise InputError(
                    f"{escape(name)} is stored packed, but {type(model).__name__} has no experts of that name",
                    hint="Only experts can be kept packed; quantize with --scope experts.",
                )
            found[target][source].append(name)
    if not found:
        raise InputError("the config says that the experts are packed, but no tensor of the checkpoint is", hint=_AGAIN)

    layouts = {}
    for target, names in found.items():
        converter = by_source[next(iter(names))]
        layouts[target] = _layout(target, parameters[target], converter, names, stored, block_size=block_size)
    _check_other_layers(layouts, parameters, stored, target_of)
    return layouts


def _layout(
    target: str,
    parameter: Tensor,
    converter: WeightConverter,
    names: Mapping[str, Sequence[str]],
    stored: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    block_size: int,
) -> Layout:
    """The layout of one fused parameter, after every one of its tensors was found with the right dtype and shape."""
    kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
    parts = len(converter.source_patterns)
    plain = kinds[: len(converter.operations)] in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    plain = plain and target.endswith(converter.target_patterns[0])
    if not plain or parameter.ndim != 3 or parameter.shape[1] % parts:
        raise InputError(
            f"{escape(target)}: this family's experts are not rows stacked by expert, so they cannot be kept packed",
            hint="Use --format compressed-tensors for this family.",
        )
    experts, rows, columns = parameter.shape
    first = next(iter(names.values()))[0]
    layout = Layout(_scheme(first, stored), experts, parts, rows // parts, columns, block_size)
    for source in converter.source_patterns:
        if len(names.get(source, ())) != experts:
            raise InputError(
                f"{escape(target)}: {len(names.get(source, ()))} of its {experts} experts have a packed {source}",
                hint=_AGAIN,
            )
        for name in names[source]:
            for suffix, (dtype, shape) in layout.files.items():
                wanted = _companion(name, suffix)
                if wanted not in stored:
                    raise InputError(f"{escape(wanted)} is missing from the checkpoint", hint=_AGAIN)
                if stored[wanted][0] != dtype or (shape is not None and stored[wanted][1] != shape):
                    raise InputError(
                        f"{escape(wanted)} is {stored[wanted][0]} {list(stored[wanted][1])}, expected {dtype} {shape}",
                        hint=_AGAIN,
                    )
    return layout


def _scheme(name: str, stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    if stored[name][0] == "I8":
        return "int8"
    if f"{name}.nested_absmax" in stored:
        raise InputError(
            f"{escape(name)} is double quantized, which is not supported",
            hint="Quantize without double quantization (bnb_4bit_use_double_quant: false).",
        )
    for scheme in ("nf4", "fp4"):
        if f"{name}.{_STATE}{scheme}" in stored:
            return scheme
    raise InputError(f"{escape(name)}.{_STATE}nf4 (or fp4) is missing from the checkpoint", hint=_AGAIN)


def _check_other_layers(
    layouts: Mapping[str, Layout],
    parameters: Mapping[str, Tensor],
    stored: Mapping[str, tuple[str, tuple[int, ...]]],
    target_of: Callable[[str], tuple[str, str | None]],
) -> None:
    """Experts that are stored neither packed nor unpacked would load as random numbers, with a warning only."""
    kinds = {re.sub(r"\d+", "0", target) for target in layouts}
    rest = {name for name in parameters if re.sub(r"\d+", "0", name) in kinds} - set(layouts)
    if rest:
        rest -= {target_of(name)[0] for name in stored}
    if rest:
        raise InputError(f"{escape(sorted(rest)[0])}: its experts are missing from the checkpoint", hint=_AGAIN)


# ---------------------------------------------------------------------------------------------------- registration


class PackedExpertsConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint whose experts are packed, kept word for word as config.json has it."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = METHOD
        self.fields = fields
        own = fields.get(METHOD)
        own = own if isinstance(own, dict) else {}
        self.block_size = own.get("block_size", 64)
        if (own.get("format"), own.get("scope")) != ("bitsandbytes", "experts"):
            raise InputError(
                f"quantization_config.{METHOD} is {escape(fields.get(METHOD))}, not format bitsandbytes, scope experts",
                hint="Upgrade moeconv: the checkpoint may come from a later version.",
            )

    def to_dict(self) -> dict[str, Any]:
        return dict(self.fields)


class PackedExpertsQuantizer(HfQuantizer):
    """Loads packed experts; everything else of the checkpoint is loaded as in an unquantized model."""

    requires_calibration = True  # transformers then refuses to use it on a checkpoint that is not packed

    def __init__(self, quantization_config: PackedExpertsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._targets: set[str] = set()  # the conversion mapping's target patterns that have packed parameters

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        stored = _stored_tensors(checkpoint_files)
        layouts = find_layouts(model, stored, block_size=self.quantization_config.block_size)
        for target, layout in layouts.items():
            _install(model, target, layout)
        return model

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """Lets each converter that builds experts collect the companions as well. One converter takes them all: as
        converters of their own they would have to come first, since `...weight` also matches `...weight.absmax`."""
        packed = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, PackedExperts)
            for name in module.packed
        ]
        return [_with_companions(entry) if _builds(entry, packed) else entry for entry in weight_conversions]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to cast a tensor to. `dtype` is the parameter's; a packed one's must not reach its scales."""
        ours = any(isinstance(operation, FusePacked) for operation in getattr(converter, "operations", ()))
        if ours and dtype is not None and not dtype.is_floating_point:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def is_serializable(self) -> bool:
        """`save_pretrained` is refused: the directory that was loaded is already the packed form."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through the packed experts, which stay as they are, to everything else."""
        return True


def _builds(entry: Any, packed: Sequence[str]) -> bool:
    return isinstance(entry, WeightConverter) and any(name.endswith(entry.target_patterns[0]) for name in packed)


def _with_companions(converter: WeightConverter) -> WeightConverter:
    states = (f".weight.{_STATE}nf4", f".weight.{_STATE}fp4")
    suffixes = (".weight", ".weight.absmax", ".weight.quant_map", *states, ".SCB")
    target = converter.target_patterns[0]
    return converter.copy(
        [_companion(source, suffix) for source in converter.source_patterns for suffix in suffixes],
        [target + suffix for suffix in ("", "_absmax", "_quant_map", "_scb")],
        operations=[FusePacked(converter)],
    )


def _dispatching(previous: type[QuantizationConfigMixin]) -> type[QuantizationConfigMixin]:
    """`previous`, but `from_dict` of a dict with a `moeconv` key builds our config."""

    class BitsAndBytesOrPackedExpertsConfig(previous):  # type: ignore[valid-type, misc]
        @classmethod
        def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            target = PackedExpertsConfig if METHOD in config_dict else previous
            return target.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    return BitsAndBytesOrPackedExpertsConfig


def register() -> None:
    """Makes transformers know packed experts. Importing this module does it; a second call changes nothing."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(METHOD)(PackedExpertsConfig)
    register_quantizer(METHOD)(PackedExpertsQuantizer)
    for key in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        AUTO_QUANTIZATION_CONFIG_MAPPING[key] = _dispatching(AUTO_QUANTIZATION_CONFIG_MAPPING[key])


register()
