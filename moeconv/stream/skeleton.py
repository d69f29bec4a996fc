"""The stock transformers model of a checkpoint on the meta device, and loading and freeing of its parts.

The converter of transformers itself loads the tensors (it renames them, stacks experts, fuses gate and up), so nothing
here depends on a family. This uses interfaces that transformers calls internal: pyproject.toml pins the version, and
tests load each family.
"""

from __future__ import annotations

import os

# oneDNN caches packed weights per shape; without a limit the cache is a second copy of the layers. It reads this
# variable at its first use, so that it must be set before torch is imported.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.remote import stock_config
from moeconv.families.spec import Family
from moeconv.stream.silence import transformers_silenced
from moeconv.types import Config

if TYPE_CHECKING:
    from concurrent.futures import Future

# A model of transformers, or a class of it: the interfaces used here are internal and have no types.
Stock: TypeAlias = Any


@dataclass(frozen=True)
class Loaded:
    """What transformers reported on the tensors that it loaded, by their names in memory (`unexpected`: on disk)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


class Skeleton:
    """A stock model without weights. `module` is the model that the family's Auto class makes, `layers` its decoder
    layers. Of a multimodal model only the language model is loaded and run, by the stock forward without images."""

    def __init__(
        self, model: Model, *, dtype: torch.dtype, device: str | torch.device = "cpu", experts: str = "eager"
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, torch.device(device)
        _check_class(model)
        with transformers_silenced():
            self.module = _build(model, dtype, experts)
            self._mapping = _mapping(self.module)
        decoder = self.module.get_decoder()
        if not _has_list(decoder):  # the class of llama4 names a prefix that its model does not have
            decoder = next((m for m in decoder.children() if _has_list(m)), decoder)
        with transformers_silenced():  # the parts beside the language model do not run, so they need no buffers
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
        """Every parameter and persistent buffer by its name in memory; tensors on the meta device, for their shapes."""
        return dict(self.module.state_dict())

    @property
    def head(self) -> nn.Module:
        """The output embeddings; some classes around a whole language model do not name its own as theirs."""
        inside: Stock = getattr(self.module, "language_model", self.module)
        found = self.module.get_output_embeddings() or inside.get_output_embeddings()
        assert isinstance(found, nn.Module)
        return found

    def name_of(self, module: nn.Module) -> str:
        return self._names[id(module)]

    def place(self, name: str) -> str:
        """The name in memory of the parameter that (a part of) the tensor `name` on disk is loaded into."""
        return self._renamed(name)[0]

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """(the name in memory of a tensor on disk, the source pattern of the conversion that builds it or None)."""
        if name not in self._places:
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

            renamings = [m for m in self._mapping if isinstance(m, WeightRenaming)]
            converters = [m for m in self._mapping if isinstance(m, WeightConverter)]
            prefix = self.module.base_model_prefix
            self._places[name] = rename_source_key(name, renamings, converters, prefix, self.state)
        return self._places[name]

    def owner(self, name: str) -> nn.Module:
        """The module that holds the parameter of the tensor `name` on disk."""
        return self.module.get_submodule(self.place(name).rpartition(".")[0])

    def parent(self, module: nn.Module) -> nn.Module:
        """The module that contains `module`."""
        return self.module.get_submodule(self.name_of(module).rpartition(".")[0])

    def load(self, tensors: Mapping[str, Tensor], *, device: torch.device | None = None) -> Loaded:
        """Load tensors (by their names on disk), converted to the dtype of the skeleton and to `device`."""
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
        """{parameter: value} that transformers makes of `tensors` (by their names on disk), for the experts that they
        belong to. Empties `tensors`. Neither changes the model nor casts a tensor."""
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
                # its annotation names the future of a tensor alone, and it takes tensors as well
                converter.add_tensor(target, name, pattern, cast("Future[Tensor]", tensor))
        with torch.no_grad():
            for target in list(converters):
                found = converters.pop(target).convert(target, model=self.module, config=self.module.config)
                made |= {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
        return made

    def saved(self, part: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name on disk: tensor} as transformers saves the parameters {leaf: value} of a part of the model. There may
        be fewer experts than in the model; they are numbered from 0."""
        from transformers.core_model_loading import revert_weight_conversion

        prefix = self.name_of(part) + "."
        with torch.no_grad(), transformers_silenced():
            made: dict[str, Tensor] = revert_weight_conversion(
                self.module, {prefix + leaf: value for leaf, value in weights.items()}
            )
        return made

    def fill(self, tensors: dict[str, Tensor], *, under: str, beside: str | None = None) -> None:
        """Load tensors. Afterwards, every parameter whose name starts with `under` must be loaded, except those whose
        names start with `beside`. Empties `tensors`.

        Raises InputError if transformers would leave a parameter random or a tensor unused.
        """
        self._narrow(tensors)
        loaded = self.load(tensors)
        tensors.clear()
        missing = [name for name in loaded.missing if under and name.startswith(under)]
        missing = [name for name in missing if beside is None or not name.startswith(beside)]
        for names, what in (
            (missing, "it lacks"),
            (loaded.unexpected, "no parameter takes"),
            (loaded.mismatched, "the shape is wrong of"),
        ):
            if names:
                raise InputError(
                    f"transformers does not load this checkpoint strictly: {what} {escape(names[0])}"
                    f" ({len(names)} such)",
                    hint="config.json and the tensors do not belong together: copy the checkpoint again.",
                )
        self._widen()

    def _narrow(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the parameters of these tensors their dtype on disk where that is smaller. Stacking and fusing the
        experts then takes half the memory, and `_widen` casts one parameter at a time."""
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
        """Cast the loaded parameters to the dtype of the computation, one at a time."""
        for part in self.module.modules():
            for name, p in own_parameters(part).items():
                if not p.is_meta and p.dtype.itemsize < self.dtype.itemsize:
                    setattr(part, name, nn.Parameter(p.detach().to(self.dtype), p.requires_grad))

    def tie(self) -> None:
        """Tie the output and input embeddings if the config ties them, from the one that is loaded."""
        missing = {name for name, p in self.module.named_parameters(remove_duplicate=False) if p.is_meta}
        with transformers_silenced():
            self.module.tie_weights(missing_keys=missing, recompute_mapping=False)

    @staticmethod
    def empty(module: nn.Module) -> None:
        """Free the parameters of `module` and of all modules in it."""
        for part in module.modules():
            if vars(part).pop("stored", None) is not None:  # stored.StoredExperts
                vars(part).pop("forward", None)
            for name, parameter in own_parameters(part).items():
                setattr(part, name, nn.Parameter(torch.empty_like(parameter, device="meta"), False))


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the module itself, not of its children, by name."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def auto_class(family: Family) -> Stock:
    """The Auto class of transformers for models of this family."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if family.multimodal.beside else AutoModelForCausalLM


def _check_class(model: Model) -> None:
    """Raises InputError for experts in a layout that transformers does not read."""
    if model.family.only_served:
        raise InputError(
            f"the experts of this {model.family.model_type} are in the layout of {model.family.tensors.readers}, which "
            "its class in transformers cannot load",
            hint="Run the command on the source of this checkpoint.",
        )


def _has_list(module: nn.Module) -> bool:
    return any(isinstance(child, nn.ModuleList) for child in module.children())


def _stock_config(path: Path, stated: Config) -> Stock:
    """The config object of transformers for a config.json of these values, which may differ from the checkpoint's own
    in the names of its family."""
    from transformers import AutoConfig

    given = {"local_files_only": True, "trust_remote_code": False}
    if json.loads((path / "config.json").read_bytes()) == stated:
        return AutoConfig.from_pretrained(str(path), **given)
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(stated))
        return AutoConfig.from_pretrained(directory, **given)


def _build(model: Model, dtype: torch.dtype, experts: str) -> Stock:
    """The stock model on the meta device. Raises InputError if transformers cannot build it from config.json."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_MAPPING,
    )
    from transformers.initialization import no_init_weights

    path, stated = model.checkpoint.path, stock_config(model.family, model.checkpoint.config)
    try:
        config = _stock_config(path, stated)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            if hasattr(part, "quantization_config"):
                del part.quantization_config  # the weights are decoded before they are loaded
            part.output_router_logits = part.output_hidden_states = part.output_attentions = False
        auto, images = auto_class(model.family), model.family.multimodal.beside
        classes: Stock = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if images else MODEL_FOR_CAUSAL_LM_MAPPING
        stock = classes[type(config)]
        text = type(config.get_text_config())
        inside: list[Stock] = [MODEL_MAPPING[text]] if images and text in MODEL_MAPPING else []
        free = model.family.kind == "moe" and stock._can_set_experts_implementation()  # noqa: SLF001 (no public name)
        fast = all(c._supports_sdpa for c in (stock, *inside))  # noqa: SLF001 (no public name)
        # Both implementations are given, so that config.json cannot ask for a kernel from the hub.
        with torch.device("meta"), no_init_weights():
            module = auto.from_config(
                config,
                dtype=dtype,
                attn_implementation="sdpa" if fast else "eager",
                experts_implementation=experts if free else "eager",
                trust_remote_code=False,
            )
    except Exception as error:
        # A value of config.json can make a class of transformers fail in any way, so every error is about the input.
        raise InputError(
            f"transformers cannot build {escape(path.name)} from its config.json: {escape(error)[:300]}",
            hint="Correct config.json; see `moeconv families` for what is supported.",
        ) from error
    return module.eval()


def _fill_buffers(module: Stock, inside: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint contains (rotary frequencies) in a part of the model, as from_pretrained
    does."""
    for part in inside.modules():
        unsaved = part._non_persistent_buffers_set  # noqa: SLF001 (torch has no public name for it)
        buffers = {n: b for n, b in part.named_buffers(recurse=False, remove_duplicate=False) if n in unsaved}
        for name, buffer in buffers.items():
            setattr(part, name, torch.empty_like(buffer, device=device))
        if buffers:
            with torch.no_grad():
                module._init_weights(part)  # noqa: SLF001 (from_pretrained's own)


def _mapping(module: Stock) -> list[Stock]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(module)
