"""Registers packed experts with transformers: a config class, a quantizer, and the checkpoints that they are for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, WeightTransform
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from moeconv.errors import InputError, escape
from moeconv.hf.adapters import register_with_peft
from moeconv.hf.conversion import FusePacked, check_stacked, disk_tensors, stacked_renamings, with_companions
from moeconv.hf.layout import METHOD, Stock, find_layouts, stored_tensors
from moeconv.hf.modules import PackedExperts, PackedLinear, install, unpack
from moeconv.types import JsonObject
from moeconv.versions import OLDEST_PACKED, release, untested_transformers

_SCOPES = ("experts", "experts+shared", "all-linear")


class PackedExpertsConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint with packed experts. It is kept exactly as it is in config.json."""

    def __init__(self, **fields: object) -> None:
        self.quant_method = cast(QuantizationMethod, METHOD)  # its type only has the built-in methods
        self.fields = fields
        own = fields.get(METHOD)
        own = own if isinstance(own, dict) else {}
        self.block_size = own.get("block_size", 64)
        if own.get("format") != "bitsandbytes" or own.get("scope") not in _SCOPES:
            raise InputError(
                f"quantization_config.{METHOD} is {escape(fields.get(METHOD))}: expected the format bitsandbytes with "
                f"one of the scopes {', '.join(_SCOPES)}",
                hint="Upgrade moeconv: a later version may have written the checkpoint.",
            )

    def to_dict(self) -> JsonObject:
        return dict(self.fields)


# A call of from_pretrained may pass a config of the same kind as the checkpoint's; transformers compares the names of
# the classes. Scripts for bitsandbytes checkpoints pass a BitsAndBytesConfig: here too, the checkpoint's own config is
# used, with a warning.
PackedExpertsConfig.__name__ = "BitsAndBytesConfig"


class PackedExpertsQuantizer(HfQuantizer):
    """Loads packed experts and linear layers. Everything else is loaded as in an unquantized model."""

    quantization_config: PackedExpertsConfig
    requires_calibration = True  # so that transformers refuses to use it on a checkpoint that is not packed

    def __init__(self, quantization_config: PackedExpertsConfig, **kwargs: object) -> None:
        super().__init__(quantization_config, **kwargs)
        self._conversions: list[WeightTransform] = []  # those of transformers, which saving reverses

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_kwargs: object
    ) -> PreTrainedModel:
        stored = stored_tensors(checkpoint_files)
        layouts = find_layouts(model, stored, block_size=self.quantization_config.block_size)
        for target, layout in layouts.items():
            install(model, target, layout)
        return model

    def _process_model_after_weight_loading(self, model: Stock, **_kwargs: object) -> Stock:
        # As in transformers, a renaming (for names in older files) that was not used in loading is not used in saving.
        used = [c for c in self._conversions if not isinstance(c, WeightRenaming) or c.was_used()]
        model._weight_conversions = used or None  # noqa: SLF001 (the conversions that saving reverses have no public name)
        check_stacked(model)
        register_with_peft()
        return model

    def _dequantize(self, model: Stock, dtype: torch.dtype | None = None) -> Stock:
        """`model.dequantize()`: turn the model into the stock one, with all weights decoded to `dtype`."""
        renamings = stacked_renamings(model)
        for module in list(model.modules()):
            if isinstance(module, PackedExperts | PackedLinear):
                unpack(module, dtype=dtype or model.dtype)
        if conversions := model._weight_conversions:  # noqa: SLF001
            patterns = [entry.source_patterns for entry in renamings]
            kept = [entry for entry in conversions if entry.source_patterns not in patterns]
            model._weight_conversions = kept or None  # noqa: SLF001
        if hasattr(model.config, "auto_map") and hasattr(transformers, type(model).__name__):
            del model.config.auto_map  # it names the loader of packed weights, and the model now has ordinary ones
        return model

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: nn.Module
    ) -> list[WeightTransform]:
        """Let each converter that builds packed weights also collect their companions, and rename the companions of
        experts that are packed in one tensor."""
        self._conversions = [*weight_conversions, *stacked_renamings(model)]
        return with_companions(self._conversions, model)

    def get_new_dtype(self, converter: object, param: Stock, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to cast a tensor to. `dtype` is that of the parameter; the dtype of codes must not apply to
        scales."""
        ours = any(isinstance(operation, FusePacked) for operation in getattr(converter, "operations", ()))
        if ours and dtype is not None and not dtype.is_floating_point:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the tensors that the model was loaded from."""
        return disk_tensors(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through the packed weights, which do not change, to everything else."""
        return True


def _dispatching(previous: type[QuantizationConfigMixin]) -> type[QuantizationConfigMixin]:
    """A subclass of `previous` whose `from_dict` builds our config from a dict with a `moeconv` key."""

    class BitsAndBytesOrPackedExpertsConfig(previous):  # type: ignore[valid-type, misc]
        @classmethod
        def from_dict(cls, config_dict: JsonObject, return_unused_kwargs: bool = False, **kwargs: object) -> Stock:
            target = PackedExpertsConfig if METHOD in config_dict else previous
            return target.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    return BitsAndBytesOrPackedExpertsConfig


def _check_version() -> None:
    """Raises ImportError for a version of transformers whose weight conversion cannot build packed experts."""
    if release(transformers.__version__) < OLDEST_PACKED:
        raise ImportError(
            f"packed experts need transformers {'.'.join(map(str, OLDEST_PACKED))} or newer, and this is "
            f"{transformers.__version__}: pip install -U transformers, on Python 3.11 or newer"
        )


def register() -> None:
    """Register packed experts with transformers. Importing this package does it; a second call changes nothing.

    Raises ImportError for a version of transformers that is too old."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    _check_version()
    for text in untested_transformers():
        warnings.warn(text, stacklevel=2)
    register_quantization_config(METHOD)(PackedExpertsConfig)
    register_quantizer(METHOD)(PackedExpertsQuantizer)
    for key in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        AUTO_QUANTIZATION_CONFIG_MAPPING[key] = _dispatching(AUTO_QUANTIZATION_CONFIG_MAPPING[key])
