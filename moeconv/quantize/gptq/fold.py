"""Factors that move from the inputs of the experts into their weights, without a change of what the layer computes.

Column j of gate and up is multiplied by s_j, and the norm in front of the experts divided by it, with the columns of
all else that reads the norm (the router, a shared expert) multiplied as well; or column j of down is multiplied, and
row j of up divided. All factors are powers of two, so that no tensor is rounded. Whether a fold is exact is measured on
the layer's own module: it then computes the same with the factors as without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.errors import InputError, escape
from moeconv.plan.kernels import load_kernel
from moeconv.plan.kernels.chain import last_stage
from moeconv.plan.kernels.stored import to_bytes
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.grids import as_planned, by_name
from moeconv.quantize.gptq.groups import role_of, weight_name
from moeconv.quantize.gptq.hidden import hidden_activations
from moeconv.quantize.gptq.need import DIVIDED
from moeconv.quantize.gptq.work import ExpertInputs, LayerWork
from moeconv.tensors import all_finite, packed_source
from moeconv.world import all_agree

_TOLERANCE = 1e-5  # relative; a fold that is exact differs by nothing but the order of sums
_LOUD = 1024.0  # factor of the up projections in the check of what is linear in them: it reaches every clamp
_LARGEST = 8  # exponent of the largest factor


def power_of_two(factors: Tensor) -> Tensor:
    """The nearest powers of two, float32, from 2^-8 to 2^8."""
    return torch.exp2(factors.float().log2().round().clamp(-_LARGEST, _LARGEST))


def reads_alone(work: LayerWork) -> bool:
    """Whether the norm in front of the experts can be divided by factors: the layer computes the same when the columns
    of all known readers are multiplied by them."""
    norm, experts = work.layer.norm, work.layer.experts
    keys = {role_of(work.view, item).key for item in work.beside}
    if norm is None or experts is None or "norm.ffn" not in keys or "router.weight" not in keys:
        return False
    width = work.model.expert_dimension
    factors = torch.exp2((torch.arange(width) % 5 - 2).float()).to(work.stream.device)
    rows = next(work.stream.rows())
    hidden = work.stream.hidden[rows].to(work.stream.device)
    wanted = work.layer.run(hidden, rows)
    changed = _parameters(work)
    if any(p.shape[-1] != width for p, _ in changed):
        return False
    with _multiplied(changed, experts, factors):
        made = work.layer.run(hidden, rows)
    return all_agree(_close(made, wanted))


def _parameters(work: LayerWork) -> list[tuple[nn.Parameter, bool]]:
    """(parameter of the layer's module, whether it is divided by the factors and not multiplied), each once."""
    skeleton, found = work.stream.skeleton, dict[str, bool]()
    for item in work.beside:
        found[skeleton.place(weight_name(item))] = role_of(work.view, item).key in DIVIDED
    return [(skeleton.module.get_parameter(name), divided) for name, divided in found.items()]


@contextmanager
def _multiplied(
    changed: Sequence[tuple[nn.Parameter, bool]], experts: nn.Module, factors: Tensor
) -> Iterator[None]:  # fmt: skip
    """Inside the block, the parameters are multiplied or divided by the factors of their columns, and the experts'
    inputs are multiplied, which is the same as their columns."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0] * factors, *args[1:]), kwargs
        first, *rest = kwargs.items()
        return args, {first[0]: first[1] * factors, **dict(rest)}

    kept = [p.detach().clone() for p, _ in changed]
    handle = experts.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with torch.no_grad():
            for p, divided in changed:
                p.mul_(1 / factors if divided else factors)
            yield
    finally:
        handle.remove()
        with torch.no_grad():
            for (p, _), value in zip(changed, kept, strict=True):
                p.copy_(value)


def linear_in_up(work: LayerWork, seen: ExpertInputs, experts: Sequence[int]) -> bool:
    """Whether the input of the down projection is linear in the rows of up, which may then be divided by factors."""
    ups = {e: name for e in experts for name in work.experts.names(e) if work.view.roles[name].key == "expert.up"}
    if len(ups) < len(experts) or not len(seen.pool):
        return False
    one, device = [experts[0]], work.stream.device
    zero = torch.zeros(len(seen.pool), dtype=torch.int64)
    plain = hidden_activations(work.experts.source(one), seen.inputs, seen.pool, zero, device)
    loud = work.experts.source(one, times={ups[experts[0]]: _LOUD})
    return _close(hidden_activations(loud, seen.inputs, seen.pool, zero, device), plain * _LOUD)


def _close(made: Tensor, wanted: Tensor) -> bool:
    limit = _TOLERANCE * float(wanted.abs().max())
    return all_finite(made) and float((made - wanted).abs().max()) <= limit


# -- what is written -------------------------------------------------------------------------------------------------


def folded(work: LayerWork, item: Item, factors: Tensor) -> dict[str, Tensor]:
    """The output tensors by name of one of the items `beside` the experts, with the columns of its matrix multiplied by
    the factors, or the elements of the norm divided. A matrix that the item packs is packed by its own kernel.

    Raises InputError where the dtype has no room for the product.
    """
    checkpoint = work.model.checkpoint
    by = (1 / factors if role_of(work.view, item).key in DIVIDED else factors).cpu()
    name, spec = weight_name(item), item.outputs[0]
    if len(item.outputs) == 1 and spec.dtype in FLOAT_DTYPES:
        (value,) = as_planned(item, checkpoint).values()
        return {spec.name: _times(name, value, by)}
    last = last_stage(item)
    data = to_bytes(_times(name, packed_source(checkpoint, item), by))
    return by_name(item, load_kernel(last.kernel)([(last.inputs[0], data)], last.outputs, last.params))


def _times(name: str, value: Tensor, factors: Tensor) -> Tensor:
    made = value * factors.to(value.dtype)
    if not torch.equal(made / factors.to(value.dtype), value):
        raise InputError(
            f"{escape(name)} has values too large or too small for the factors of --method awq",
            hint="Use --method gptq, or --dtype bfloat16 for the tensors that are not packed.",
        )
    return made
