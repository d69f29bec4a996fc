"""What transformers is told: a config class, a quantizer, and which checkpoints they are for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

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
from moeconv.hf.adapters import teach_peft
from moeconv.hf.conversion import FusePacked, check_stacked, disk_tensors, stacked_renamings, with_companions
from moeconv.hf.layout import METHOD, find_layouts, stored_tensors
from moeconv.hf.modules import PackedExperts, PackedLinear, install, unpack
from moeconv.versions import OLDEST_PACKED, release, untested_transformers

_SCOPES = ("experts", "experts+shared", "all-linear")


class PackedExpertsConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint whose experts are packed, kept word for word as config.json has it."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = cast(QuantizationMethod, METHOD)  # its annotation knows the built-in methods alone
        self.fields = fields
        own = fields.get(METHOD)
        own = own if isinstance(own, dict) else {}
        self.block_size = own.get("block_size", 64)
        if own.get("format") != "bitsandbytes" or own.get("scope") not in _SCOPES:
            raise InputError(
                f"quantization_config.{METHOD} is {escape(fields.get(METHOD))}, not format bitsandbytes with scope "
                f"{', '.join(_SCOPES)}",
                hint="Upgrade moeconv: the checkpoint may come from a later version.",
            )

    def to_dict(self) -> dict[str, Any]:
        return dict(self.fields)


# transformers lets a call pass a config of the checkpoint's kind, and tells the kind by the class's name. Scripts for
# bitsandbytes checkpoints pass a BitsAndBytesConfig: as there, the checkpoint's own is used, with a warning.
PackedExpertsConfig.__name__ = "BitsAndBytesConfig"


class PackedExpertsQuantizer(HfQuantizer):
    """Loads packed experts and linear layers; everything else is loaded as in an unquantized model."""

    quantization_config: PackedExpertsConfig
    requires_calibration = True  # transformers then refuses to use it on a checkpoint that is not packed

    def __init__(self, quantization_config: PackedExpertsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._conversions: list[Any] = []  # transformers' own, which saving reverses

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_kwargs: Any
    ) -> PreTrainedModel:
        stored = stored_tensors(checkpoint_files)
        layouts = find_layouts(model, stored, block_size=self.quantization_config.block_size)
        for target, layout in layouts.items():
            install(model, target, layout)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        # as transformers does: what renamed nothing on loading (names of older files) must not rename on saving
        used = [c for c in self._conversions if not isinstance(c, WeightRenaming) or c.was_used()]
        model._weight_conversions = used or None  # noqa: SLF001 (what saving reverses has no public name)
        check_stacked(model)
        teach_peft()
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model.dequantize()`: the stock model, its weights decoded to `dtype`; nothing of it is packed any more."""
        renamings = stacked_renamings(model)
        for module in list(model.modules()):
            if isinstance(module, PackedExperts | PackedLinear):
                unpack(module, dtype=dtype or model.dtype)
        if conversions := model._weight_conversions:  # noqa: SLF001
            patterns = [entry.source_patterns for entry in renamings]
            kept = [entry for entry in conversions if entry.source_patterns not in patterns]
            model._weight_conversions = kept or None  # noqa: SLF001
        if hasattr(model.config, "auto_map") and hasattr(transformers, type(model).__name__):
            del model.config.auto_map  # it led to the loader of packed weights, and the stock class takes plain ones
        return model

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: nn.Module
    ) -> list[WeightTransform]:
        """Lets each converter that builds packed weights collect their companions as well, and renames those of experts
        in one packed tensor."""
        self._conversions = [*weight_conversions, *stacked_renamings(model)]
        return with_companions(self._conversions, model)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to cast a tensor to. `dtype` is the parameter's; a packed one's must not reach its scales."""
        ours = any(isinstance(operation, FusePacked) for operation in getattr(converter, "operations", ()))
        if ours and dtype is not None and not dtype.is_floating_point:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the tensors on disk that the model was loaded from."""
        return disk_tensors(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through the packed weights, which stay as they are, to everything else."""
        return True


def _dispatching(previous: type[QuantizationConfigMixin]) -> type[QuantizationConfigMixin]:
    """`previous`, but `from_dict` of a dict with a `moeconv` key builds our config."""

    class BitsAndBytesOrPackedExpertsConfig(previous):  # type: ignore[valid-type, misc]
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            target = PackedExpertsConfig if METHOD in config_dict else previous
            return target.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    return BitsAndBytesOrPackedExpertsConfig


def _check_version() -> None:
    """Raises ImportError for a transformers whose conversion of weights cannot build packed experts."""
    if release(transformers.__version__) < OLDEST_PACKED:
        raise ImportError(
            f"packed experts need transformers {'.'.join(map(str, OLDEST_PACKED))} or newer, and this is "
            f"{transformers.__version__}: pip install -U transformers, on Python 3.11 or newer"
        )


def register() -> None:
    """Makes transformers know packed experts. Importing this package does it; a second call changes nothing.

    Raises ImportError for a transformers that is too old."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    _check_version()
    for text in untested_transformers():
        warnings.warn(text, stacklevel=2)
    register_quantization_config(METHOD)(PackedExpertsConfig)
    register_quantizer(METHOD)(PackedExpertsQuantizer)
    for key in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        AUTO_QUANTIZATION_CONFIG_MAPPING[key] = _dispatching(AUTO_QUANTIZATION_CONFIG_MAPPING[key])
