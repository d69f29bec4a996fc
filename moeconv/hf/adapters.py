"""PEFT adapters on packed weights: LoRA on the experts and linear layers of a packed model, as on the stock model.

PEFT adapts experts by a wrapper around one parameter of a module. It reads the shape of the parameter, and runs the
module's forward with the parameter plus the product of the adapter. A packed parameter has the shape of its codes, to
which no product can be added, so packed modules get wrappers of their own. The adapters have the same names and shapes
as on the stock model, so that each model can load the adapters of the other.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moeconv.hf.modules import PackedExperts, PackedLinear, put_weight, weight_of

# A class or an object of PEFT, which is optional and has no types.
Peft: TypeAlias = Any

_ROUNDED = (
    "Merging an adapter into packed weights rounds them to the packed type again. To keep the sum exact, call "
    "model.dequantize() before get_peft_model, or merge into the unquantized model."
)


@functools.cache
def register_with_peft() -> None:
    """Let PEFT adapt packed modules, if it is installed. A second call changes nothing."""
    if importlib.util.find_spec("peft") is None:
        return
    model: Peft = importlib.import_module("peft.tuners.lora.model").LoraModel
    stock = model._create_new_module  # noqa: SLF001 (the only place where PEFT chooses a wrapper; it has no public name)

    def create(config: Peft, adapter_name: str, target: nn.Module, **kwargs: Peft) -> Peft:
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
    """`merge` and `unmerge` of a wrapper whose base layer is packed. The sum is packed again, and the previous tensors
    are kept for `unmerge`."""

    parameter_name: str
    merged_adapters: list[str]
    _before: dict[str, Tensor]

    def _packed(self) -> PackedExperts | PackedLinear | None:
        """The packed module; None after it was decoded."""
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
        put_weight(base, name, weight)  # raises InputError for NaN and infinity
        self.merged_adapters.extend(chosen)

    def unmerge(self) -> None:
        base = self._packed()
        if base is None or not self.merged_adapters:
            super().unmerge()  # type: ignore[misc]
            return
        for suffix, tensor in self._before.items():
            held = getattr(base, self.parameter_name + suffix)
            held.data = tensor.to(held.device)
        self.merged_adapters.clear()
        self._before = {}


@functools.cache
def _wrappers() -> tuple[type, type]:
    """The wrappers of PEFT for a parameter and for a linear layer, adapted to packed weights."""
    lora: Peft = importlib.import_module("peft.tuners.lora.layer")

    class PackedParameter(_Merging, lora.ParamWrapper):
        def get_param(self) -> Tensor:
            """A tensor with the shape, dtype and device of the weight, which takes no memory."""
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

    # PEFT later recognises the wrapper of a parameter by the name of its class.
    PackedParameter.__name__ = PackedParameter.__qualname__ = "ParamWrapper"
    return PackedParameter, PackedWeight
