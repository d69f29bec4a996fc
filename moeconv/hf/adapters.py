"""Adapters of PEFT on packed weights: LoRA on the experts and linear layers of a packed model, as on the stock one.

PEFT adapts experts through a wrapper around one parameter of a module: it asks the parameter for its shape, and gives
the module's forward the parameter plus the adapter's product. A packed parameter has the shape of its codes and no
value to add to, so packed modules get wrappers of their own. Adapters have the names and shapes that they have on the
stock model, so either model takes those trained on the other.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeconv.hf.modules import PackedExperts, PackedLinear, put_weight, weight_of

_ROUNDED = (
    "Merging an adapter into packed weights rounds them to the packed type again. model.dequantize() before "
    "get_peft_model (or a merge into the unquantized model) keeps the sum exact."
)


@functools.cache
def teach_peft() -> None:
    """Let PEFT adapt packed modules, where it is installed; a second call changes nothing."""
    if importlib.util.find_spec("peft") is None:
        return
    model: Any = importlib.import_module("peft.tuners.lora.model").LoraModel
    stock = model._create_new_module  # noqa: SLF001 (PEFT asks it alone, and has no public one)

    def create(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        base = target
        while hasattr(base, "base_layer"):
            base = base.get_submodule("base_layer")
        parameter = kwargs.get("parameter_name")
        if isinstance(base, PackedExperts) and parameter in base.packed:
            return _wrappers()[0](target, adapter_name, config=config, **kwargs)
        if isinstance(base, PackedLinear) and parameter is None:
            return _wrappers()[1](target, adapter_name, config=config, **kwargs)
        return stock(config, adapter_name, target, **kwargs)

    model._create_new_module = staticmethod(create)  # noqa: SLF001


class _Merging:
    """merge and unmerge of a wrapper whose base layer is packed: the sum is packed again, what was there is kept."""

    parameter_name: str
    merged_adapters: list[str]
    _before: dict[str, Tensor]

    def _packed(self) -> Any:
        """The packed module, or None once it was decoded."""
        base = self.get_base_layer()  # type: ignore[attr-defined]
        return base if isinstance(base, PackedExperts | PackedLinear) else None

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        base, name = self._packed(), self.parameter_name
        if base is None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
            return
        chosen = importlib.import_module("peft.tuners.tuners_utils").check_adapters_to_merge(self, adapter_names)
        chosen = [adapter for adapter in chosen or () if adapter in self.lora_A]  # type: ignore[attr-defined]
        if not chosen:
            return
        warnings.warn(_ROUNDED, stacklevel=2)
        if not self.merged_adapters:
            held = {suffix: getattr(base, name + suffix) for suffix in base.packed[name].tensors}
            self._before = {suffix: tensor.data for suffix, tensor in held.items()}
        weight = weight_of(base, name, dtype=torch.float32)
        for adapter in chosen:
            weight += self.get_delta_weight(adapter).to(weight)  # type: ignore[attr-defined]
        put_weight(base, name, weight)  # refuses what is not finite
        self.merged_adapters.extend(chosen)

    def unmerge(self) -> None:
        base = self._packed()
        if base is None or not self.merged_adapters:
            super().unmerge()  # type: ignore[misc]
            return
        for suffix, tensor in self._before.items():
            held: Any = getattr(base, self.parameter_name + suffix)
            held.data = tensor.to(held.device)
        self.merged_adapters.clear()
        self._before = {}


@functools.cache
def _wrappers() -> tuple[type, type]:
    """PEFT's wrapper of a parameter and of a linear layer, for packed ones."""
    lora: Any = importlib.import_module("peft.tuners.lora.layer")

    class PackedParameter(_Merging, lora.ParamWrapper):
        def get_param(self) -> Tensor:
            """A stand-in of the weight's shape, dtype and device that takes no memory."""
            base, name = self._packed(), self.parameter_name
            if base is None:
                return getattr(self.get_base_layer(), name)
            layout = base.packed[name]
            one = torch.zeros((), dtype=base.dtype, device=base.get_parameter(name).device)
            return one.expand(layout.experts, layout.parts * layout.out, layout.columns)

        @contextmanager
        def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
            base = self._packed()
            if base is None:
                with super()._activate_lora(active_adapters):
                    yield
                return
            chosen = [adapter for adapter in active_adapters if adapter in self.lora_A]
            base.deltas[self.parameter_name] = [self.get_delta_factors(adapter) for adapter in chosen]
            try:
                yield
            finally:
                del base.deltas[self.parameter_name]

    class PackedWeight(_Merging, lora.Linear):
        parameter_name = "weight"

    # PEFT finds the wrapper of a parameter again by its class's name.
    PackedParameter.__name__ = PackedParameter.__qualname__ = "ParamWrapper"
    return PackedParameter, PackedWeight
