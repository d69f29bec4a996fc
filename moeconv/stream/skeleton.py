"""The stock transformers class of a checkpoint on the meta device, and filling or emptying parts of it.

transformers' own converter puts tensors in place (it renames, stacks experts, fuses gate and up), so nothing here knows
a family. It uses interfaces that transformers calls internal: pyproject.toml pins the version, tests load each family.
"""

from __future__ import annotations

import os

# oneDNN keeps packed weights per shape; without a limit that is a second copy of the layers. Read at its first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.spec import Family
from moeconv.stream.silence import transformers_silenced

if TYPE_CHECKING:
    from concurrent.futures import Future


@dataclass(frozen=True)
class Loaded:
    """What transformers said of tensors that it was given: names in memory, but `unexpected` as on disk."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


class Skeleton:
    """A stock model without weights. `module` is what the Auto class of the family makes, `layers` its decoder layers.

    Of a multimodal model the language model alone is filled and run, by the stock forward without images."""

    def __init__(
        self, model: Model, *, dtype: torch.dtype, device: str | torch.device = "cpu", experts: str = "eager"
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, torch.device(device)
        with transformers_silenced():
            self.module = _build(model, dtype, experts)
            self._mapping = _mapping(self.module)
        decoder = self.module.get_decoder()
        if not _has_list(decoder):  # llama4's class names another prefix than it has
            decoder = next((m for m in decoder.children() if _has_list(m)), decoder)
        with transformers_silenced():  # of what is beside the language model nothing runs
            _fill_buffers(self.module, decoder if model.family.multimodal.beside else self.module, self.device)
        lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == model.num_layers]
        if len(lists) != 1:
            raise InputError(
                f"the {model.family.model_type} class of transformers has no list of {model.num_layers} layers",
                hint="Is the installed transformers in the range that moeconv's requirements name?",
            )
        self.decoder, self.layers = decoder, lists[0]
        self._names = {id(m): name for name, m in self.module.named_modules()}
        self._places: dict[str, tuple[str, str | None]] = {}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Names and shapes of every parameter and persistent buffer, in memory."""
        return dict(self.module.state_dict())

    def name_of(self, module: nn.Module) -> str:
        return self._names[id(module)]

    def place(self, name: str) -> str:
        """The name in memory of the parameter that takes (a part of) tensor `name` of the disk."""
        return self._renamed(name)[0]

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """Where a tensor of the disk goes, and the pattern of the conversion that takes it there."""
        if name not in self._places:
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

            renamings = [m for m in self._mapping if isinstance(m, WeightRenaming)]
            converters = [m for m in self._mapping if isinstance(m, WeightConverter)]
            prefix = self.module.base_model_prefix
            self._places[name] = rename_source_key(name, renamings, converters, prefix, self.state)
        return self._places[name]

    def owner(self, name: str) -> nn.Module:
        """The module that holds the parameter of tensor `name` of the disk."""
        return self.module.get_submodule(self.place(name).rpartition(".")[0])

    def parent(self, module: nn.Module) -> nn.Module:
        """The module that contains `module`."""
        return self.module.get_submodule(self.name_of(module).rpartition(".")[0])

    def load(self, tensors: Mapping[str, Tensor], *, device: torch.device | None = None) -> Loaded:
        """Put tensors (named as on disk) in place, converted to the skeleton's dtype and device."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.module._get_dtype_plan(self.dtype),  # noqa: SLF001 (from_pretrained's own)
            device_map={"": device or self.device},
            weight_mapping=self._mapping,
        )
        with transformers_silenced(), torch.no_grad():
            info, _ = convert_and_load_state_dict_in_model(self.module, dict(tensors), config)
        broken = sorted(set(info.conversion_errors))
        mismatched = sorted({str(m[0]) for m in info.mismatched_keys})
        return Loaded(tuple(sorted(info.missing_keys)), tuple(sorted(info.unexpected_keys)), (*mismatched, *broken))

    def convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """{parameter: value} that transformers makes of tensors named as on disk, for as many experts as they are of.
        Empties `tensors`; places nothing, and casts nothing."""
        from transformers.core_model_loading import WeightConverter, dot_natural_key

        patterns = {p: m for m in self._mapping if isinstance(m, WeightConverter) for p in m.source_patterns}
        made: dict[str, Tensor] = {}
        converters: dict[str, WeightConverter] = {}
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = self._renamed(name)
            tensor = tensors.pop(name)
            if pattern is None:
                made[target] = tensor
            else:
                converter = converters.setdefault(target, copy.deepcopy(patterns[pattern]))
                converter.add_tensor(target, name, pattern, cast("Future[Tensor]", tensor))  # as good as one
        with torch.no_grad():
            for target in list(converters):
                found = converters.pop(target).convert(target, model=self.module, config=self.module.config)
                made |= {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
        return made

    def fill(self, tensors: dict[str, Tensor], *, under: str, beside: str | None = None) -> None:
        """Put tensors in place; with them everything whose name starts with `under` must be there, but for what starts
        with `beside`. Empties `tensors`.

        Raises InputError when transformers would leave a parameter random or a tensor unused.
        """
        self._narrow(tensors)
        loaded = self.load(tensors)
        tensors.clear()
        missing = [name for name in loaded.missing if under and name.startswith(under)]
        missing = [name for name in missing if beside is None or not name.startswith(beside)]
        for names, what in ((missing, "lacks"), (loaded.unexpected, "has"), (loaded.mismatched, "has a misshapen")):
            if names:
                raise InputError(
                    f"transformers does not load this checkpoint strictly: it {what} {escape(names[0])}"
                    f" ({len(names)} such)",
                    hint="config.json and the tensors do not belong together.",
                )
        self._widen()

    def _narrow(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the places of tensors their dtype on disk where that is smaller: stacking and fusing the experts then
        takes half the memory, and `_widen` casts one parameter at a time."""
        stored: dict[str, set[torch.dtype]] = {}
        for name, tensor in tensors.items():
            stored.setdefault(self.place(name), set()).add(tensor.dtype)
        for name, dtypes in stored.items():
            owner, _, leaf = name.rpartition(".")
            holder = self.module.get_submodule(owner)
            if len(dtypes) != 1 or name not in self.state or leaf not in own_parameters(holder):
                continue
            (dtype,) = dtypes
            if dtype.is_floating_point and dtype.itemsize < self.dtype.itemsize:
                meta = torch.empty(self.state[name].shape, dtype=dtype, device="meta")
                setattr(holder, leaf, nn.Parameter(meta, False))

    def _widen(self) -> None:
        for part in self.module.modules():
            for name, p in own_parameters(part).items():
                if not p.is_meta and p.dtype.itemsize < self.dtype.itemsize:
                    setattr(part, name, nn.Parameter(p.detach().to(self.dtype), p.requires_grad))

    def tie(self) -> None:
        """Tie output and input embeddings as the config says, from whichever of the two is filled."""
        missing = {name for name, p in self.module.named_parameters(remove_duplicate=False) if p.is_meta}
        with transformers_silenced():
            self.module.tie_weights(missing_keys=missing, recompute_mapping=False)

    @staticmethod
    def empty(module: nn.Module) -> None:
        """Let go of the parameters of `module` and everything in it."""
        for part in module.modules():
            if vars(part).pop("stored", None) is not None:  # experts that are not in their parameters
                vars(part).pop("forward", None)
            for name, parameter in own_parameters(part).items():
                setattr(part, name, nn.Parameter(torch.empty_like(parameter, device="meta"), False))


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the module itself holds, by their names in it."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def auto_class(family: Family) -> Any:
    """transformers' Auto class for models of this family."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if family.multimodal.beside else AutoModelForCausalLM


def _has_list(module: nn.Module) -> bool:
    return any(isinstance(child, nn.ModuleList) for child in module.children())


def _build(model: Model, dtype: torch.dtype, experts: str) -> Any:
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_MAPPING,
        AutoConfig,
    )
    from transformers.initialization import no_init_weights

    path = model.checkpoint.path
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # weights arrive decoded
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.output_router_logits = part.output_hidden_states = part.output_attentions = False
        auto, images = auto_class(model.family), model.family.multimodal.beside
        classes: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if images else MODEL_FOR_CAUSAL_LM_MAPPING
        stock = classes[type(config)]
        inside: list[Any] = [MODEL_MAPPING[type(config.get_text_config())]] if images else []
        free = model.family.kind == "moe" and stock._can_set_experts_implementation()  # noqa: SLF001 (no public name)
        fast = all(c._supports_sdpa for c in (stock, *inside))  # noqa: SLF001 (no public name)
        # Both implementations are named, so that config.json cannot ask for a kernel from the hub.
        with torch.device("meta"), no_init_weights():
            module = auto.from_config(
                config,
                dtype=dtype,
                attn_implementation="sdpa" if fast else "eager",
                experts_implementation=experts if free else "eager",
                trust_remote_code=False,
            )
    except Exception as error:
        # Any value of config.json may make a class of transformers fail in its own way: it is the input's fault.
        raise InputError(
            f"transformers cannot build {escape(path.name)} from its config.json: {escape(error)[:300]}",
            hint="Correct config.json; see `moeconv families` for what is supported.",
        ) from error
    return module.eval()


def _fill_buffers(module: Any, inside: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies) in a part of the model, as from_pretrained
    does."""
    for part in inside.modules():
        unsaved = part._non_persistent_buffers_set  # noqa: SLF001 (torch has no public name for it)
        buffers = {n: b for n, b in part.named_buffers(recurse=False, remove_duplicate=False) if n in unsaved}
        for name, buffer in buffers.items():
            setattr(part, name, torch.empty_like(buffer, device=device))
        if buffers:
            with torch.no_grad():
                module._init_weights(part)  # noqa: SLF001 (from_pretrained's own)


def _mapping(module: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(module)
