"""Cuts the shared expert of a layer to fewer neurons, as one expert that every token uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.families.neurons import Narrow
from moeconv.prune.repair.narrow import narrow_layer
from moeconv.prune.repair.refit import Routes
from moeconv.prune.repair.variant import Variant
from moeconv.prune.repair.wanted import FitTokens, Wanted
from moeconv.stream.experts import down_projections, with_down
from moeconv.stream.layer import Batch, Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.one_ffn import OneFfn, every_token, one_shared
from moeconv.stream.skeleton import Skeleton

_SAME = 0.02  # relative difference below which the shared expert's output counts as added to the layer's

Masked = Callable[[], AbstractContextManager[object]]  # a context in which a layer uses only the kept experts


@contextmanager
def shared_narrowed(
    stream: LayerStream, layer: Layer, variant: Variant, tokens: FitTokens, masked: Masked
) -> Iterator[None]:
    """Inside the block, the shared expert of the layer has the neurons that the variant leaves it."""
    model = stream.model
    if variant.width is None and variant.shared is None:
        yield
        return
    found = Narrow(model, variant.width or model.cut_width, variant.shared).shared_down(layer.index)
    if found is None:
        yield
        return
    part, at = one_shared(stream.skeleton, layer), layer.index
    target = "layer" if variant.refit is None else variant.refit.target
    wanted, added = _wanted(stream, layer, part, variant.hidden, tokens, target=target, masked=masked)
    refit = variant.refit if added else None
    made = narrow_layer(at, part, wanted, [0], down_projections(part, [0]), found[1].new, refit)
    variant.shared_neurons[at] = made.neurons
    variant.shared_narrowed.append(made.outcome)
    variant.shared_fitted += [] if made.fitted is None else [made.fitted]
    if variant.on_shared is not None:
        variant.on_shared(at, [0], made.down)
    with with_down(part, [0], made.down):
        yield


@dataclass(frozen=True, eq=False)
class _Seen:
    """A pass over one batch: its `batch`, what the shared expert reads and returns, `given` and `out` [T, H], and the
    factor `gate` [T] that its gate gives."""

    batch: Batch
    given: Tensor
    out: Tensor
    gate: Tensor


@dataclass(eq=False)
class _Rows:
    """The tokens of one batch for the fit, `of` bool [T]: `given` and `missing` [t, H], `weights` [t], and which are
    `held` out bool [t]. `square` is the squared norm of the wanted output on the latter."""

    of: Tensor
    given: Tensor
    missing: Tensor
    weights: Tensor
    held: Tensor
    square: float


def _wanted(
    stream: LayerStream, layer: Layer, part: OneFfn, hidden: Tensor, tokens: FitTokens, *, target: str, masked: Masked
) -> tuple[Wanted, bool]:
    """(what the shared expert should compute, whether its output is added to the residual stream).

    Where it is added, the wanted output is that with which the residual stream of the unpruned model follows (`target`
    "stream"), or with which the layer's output is that of all experts on the same inputs ("layer"). Otherwise (where a
    norm follows, for example) it is the output that it has. Raises InputError for NaN and infinite values."""
    with masked():
        factor = _factor(stream, layer, part, hidden)
        found = [_rows(stream, seen, tokens, factor, target) for seen in _observed(stream, layer, part, hidden)]
    if factor is not None and target != "stream":
        for rows, batch in zip(found, layer.batches(advance=False, hidden=hidden), strict=True):
            rows.missing += batch.outputs.flatten(0, 1)[rows.of]
    given, missing, weights, held = (
        torch.cat([getattr(rows, name) for rows in found]) for name in ("given", "missing", "weights", "held")
    )
    if not bool(torch.isfinite(missing).all()):
        raise InputError(f"layer {layer.index} computes NaN or infinite values", hint="The checkpoint is damaged.")
    routes = Routes(given, every_token(given)[0], weights[:, None])
    square = sum(rows.square for rows in found)
    wanted = Wanted(routes.where(~held), missing[~held], routes.where(held), missing[held], square)
    return wanted, factor is not None


def _rows(stream: LayerStream, seen: _Seen, tokens: FitTokens, factor: float | None, target: str) -> _Rows:
    batch, length = seen.batch, seen.batch.inputs.shape[1]
    of = tokens.windows[batch.rows].repeat_interleave(length).to(seen.given.device)
    held = tokens.held[batch.rows].flatten().to(of.device)
    outputs = batch.outputs.flatten(0, 1)
    if factor is None:
        missing, weights, made = torch.zeros_like(seen.out), torch.ones_like(seen.gate), seen.out
    else:
        weights, made, missing = factor * seen.gate, outputs - batch.residual, -outputs
        if target == "stream":
            missing = missing + stream.hidden[batch.rows].to(outputs.device).flatten(0, 1)
    square = float(made[held].double().square().sum())
    return _Rows(of, seen.given[of], missing[of], weights[of].to(seen.given.dtype), held[of], square)


def _factor(stream: LayerStream, layer: Layer, part: OneFfn, hidden: Tensor) -> float | None:
    """The factor of the shared expert's gated output in the output of the layer, by what the layer lacks without it;
    None where that is no multiple of it."""
    with_it = next(iter(_observed(stream, layer, part, hidden)))
    with with_down(part, [0], torch.zeros_like(down_projections(part, [0]))):
        without = next(iter(_observed(stream, layer, part, hidden)))
    lacks = (with_it.batch.outputs - without.batch.outputs).flatten(0, 1).double()
    adds = ((with_it.out - without.out) * with_it.gate[:, None]).double()
    if lacks.shape != adds.shape or not bool(adds.any()):
        return None
    factor = float((lacks * adds).sum() / adds.square().sum())
    return factor if bool((lacks - factor * adds).norm() <= _SAME * lacks.norm()) else None


def _observed(stream: LayerStream, layer: Layer, part: OneFfn, hidden: Tensor) -> Iterator[_Seen]:
    """Run the layer on `hidden` [n, S, H], batch by batch."""
    found: dict[str, Tensor] = {}
    gate = _gate(stream.skeleton, layer.index)

    def on_shared(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        made = out[0] if isinstance(out, tuple) else out
        found["given"], found["out"] = (x.detach().reshape(-1, x.shape[-1]) for x in (args[0], made))

    def on_gate(_module: nn.Module, _args: object, out: Tensor) -> None:
        found["gate"] = out.detach().sigmoid().flatten()

    with ExitStack() as hooks:
        hooks.callback(part.ffn.register_forward_hook(on_shared).remove)
        if gate is not None:
            hooks.callback(gate.register_forward_hook(on_gate).remove)
        for batch in layer.batches(advance=False, hidden=hidden):
            given, out = found.pop("given"), found.pop("out")
            yield _Seen(batch, given, out, found.pop("gate", torch.ones_like(out[:, 0])))


def _gate(skeleton: Skeleton, layer: int) -> nn.Module | None:
    """The module whose output, by a sigmoid, is the factor of the shared expert; None in a family without a gate."""
    family = skeleton.model.family
    return skeleton.owner(family.name("shared.router", layer=layer)) if family.has("shared.router") else None
