"""Measures the dense FFN of every layer of a Mixture-of-Experts into an overlay, layer by layer.

With text, the dense model runs beside the source: each of its layers gets the outputs of its layers before, and its FFN
is fitted so that the residual stream of the source follows, errors of earlier layers included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.overlay import OverlayWriter, writing_overlay
from moeconv.collapsing.fit.choose import (
    Activation,
    CollapseOutcome,
    DenseFfn,
    FitInputs,
    fitted_to,
    hidden_of,
    output_of,
    without_data,
)
from moeconv.collapsing.fit.merged import assumed_weights, merge_equal
from moeconv.collapsing.fit.neurons import SHARED, Neurons, read_neurons
from moeconv.collapsing.planner import Collapse
from moeconv.data.heldout import held_out
from moeconv.data.windows import TokenData
from moeconv.errors import InputError
from moeconv.plan.kernels.stored import to_bytes
from moeconv.stream.layer import Batch, Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.memory import allocate
from moeconv.tensors import all_finite
from moeconv.types import JsonObject

OVERLAY_VERSION = 1
_SAME = 0.02  # relative difference below which a layer counts as adding its FFN to the residual stream
_CLOSE = 1e-2  # relative difference below which the neurons compute what the experts of the class compute
_ACTIVATIONS = ("hidden_act", "hidden_activation", "mlp_hidden_act")


def collapse_by_weights(made: Collapse, path: Path, *, how: str, seed: int) -> list[JsonObject]:
    """Write the FFNs that the weights alone decide. Returns one row per layer."""
    rows = []
    with _writing(made, path, {"neurons": how}) as writer:
        for layer in made.layers:
            neurons = read_neurons(made.model, layer)
            merged = merge_equal(neurons, assumed_weights(made.model, neurons))
            ffn = without_data(merged, made.width.after, how, (seed, "collapse", layer))
            _write(made, writer, layer, ffn)
            rows.append(asdict(CollapseOutcome(layer, len(merged))))
    return rows


@torch.no_grad()
def collapse_on_data(
    made: Collapse, stream: LayerStream, read: TokenData, path: Path, *, how: str, seed: int
) -> tuple[list[JsonObject], Tensor]:
    """Write the FFNs that are chosen and fitted on the text of `read`. Returns (one row per layer, the final
    activations [n, S, H] of the collapsed model)."""
    flow = allocate(tuple(stream.hidden.shape), stream.dtype, stream.max_memory)
    flow.copy_(stream.hidden)
    held = torch.from_numpy(held_out(*stream.windows.shape))
    rows, about = [], {"neurons": how, "sources": [source.to_json() for source in read.sources]}
    with _writing(made, path, about) as writer:
        for layer in stream.layers():
            for batch in layer.batches():
                del batch
            if layer.experts is None:
                for batch in layer.batches(hidden=flow):
                    del batch
                continue
            block = _LayerFit(made, stream, layer, _activation(made))
            ffn, outcome = block.fitted(flow, held, how=how, seed=seed)
            _write(made, writer, layer.index, ffn)
            rows.append(asdict(outcome))
            with block.replaced(ffn):
                for batch in layer.batches(hidden=flow):
                    del batch
    return rows, flow


@dataclass(frozen=True, eq=False)
class _LayerFit:
    """The FFN of one layer of the source, and what takes its place."""

    made: Collapse
    stream: LayerStream
    layer: Layer
    act: Activation

    def fitted(self, flow: Tensor, held: Tensor, *, how: str, seed: int) -> tuple[DenseFfn, CollapseOutcome]:
        """Choose and fit the dense FFN on the activations `flow` [n, S, H] of the collapsed model before the layer."""
        index, model = self.layer.index, self.made.model
        neurons = read_neurons(model, index)
        shared = neurons.some((neurons.expert == SHARED).nonzero().flatten())
        inputs: list[Tensor] = []
        wanted: list[Tensor] = []
        sums = _NeuronSums(neurons, self.act)
        for batch in self.layer.batches(advance=False, hidden=flow):
            assert batch.top_k_index is not None and batch.top_k_weights is not None
            weights = batch.top_k_weights * model.routed_share
            if not inputs:
                sums.check(batch, weights, index)
            inputs.append(batch.ffn_input.cpu())
            wanted.append(self._wanted(batch, shared).cpu())
            sums.add(batch.ffn_input.cpu(), batch.top_k_index.cpu(), weights.cpu(), self._shared_weights(batch))
        merged = merge_equal(neurons, sums.mean_weight)
        energy = merged.summed(sums.energy)
        given = FitInputs(torch.cat(inputs), torch.cat(wanted), held.flatten(), energy)
        if not all_finite(given.y):
            raise InputError(f"layer {index} computes NaN or infinite values", hint="The checkpoint is damaged.")
        return fitted_to(merged, self.act, given, self.made.width.after, how, index, (seed, "collapse", index))

    def _wanted(self, batch: Batch, shared: Neurons) -> Tensor:
        """The wanted output [T, H] of the FFN: that with which the residual stream of the source follows where the
        family simply adds it to the stream, and elsewhere that of the experts on the same inputs."""
        own = batch.ffn_output.float()
        if self._shared_outside:
            own = own + self._of_shared(batch.ffn_input, shared)
        if self.stream.model.residual_size == self.stream.model.hidden_size:
            after = batch.outputs.flatten(0, 1)
            if bool((batch.residual.float() + own - after.float()).norm() <= _SAME * own.norm()):
                return self.stream.hidden[batch.rows].to(after.device).flatten(0, 1).float() - batch.residual.float()
        return own

    @property
    def _shared_outside(self) -> bool:
        """Whether the class computes the shared expert outside the block that holds the experts."""
        family, skeleton = self.made.model.family, self.stream.skeleton
        key = next((key for key in family.tensors.names if key.startswith("shared.") and key != "shared.router"), None)
        if key is None or not self.made.width.shared:
            return False
        name = family.name(key, layer=self.layer.index)
        return not skeleton.place(name).startswith(skeleton.name_of(self.layer.ffn) + ".")

    def _of_shared(self, x: Tensor, shared: Neurons) -> Tensor:
        return (hidden_of(shared, self.act, x.cpu()) @ shared.down.float()).to(x.device)

    def _shared_weights(self, batch: Batch) -> Tensor:
        """The weight [T] of the shared expert for each token."""
        family, skeleton = self.made.model.family, self.stream.skeleton
        share = self.made.model.routed_share if family.experts.averaged else 1.0
        if not family.has("shared.router"):
            return torch.full((len(batch.ffn_input),), share)
        row = skeleton.module.get_parameter(skeleton.place(family.name("shared.router", layer=self.layer.index)))
        return torch.sigmoid(batch.ffn_input.float() @ row.float().T).flatten().cpu() * share

    @contextmanager
    def replaced(self, ffn: DenseFfn) -> Iterator[None]:
        """Inside the block, the layer computes the dense FFN."""
        shared = None
        if self._shared_outside:
            neurons = read_neurons(self.made.model, self.layer.index)
            shared = neurons.some((neurons.expert == SHARED).nonzero().flatten())

        def instead(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: object) -> object:
            given = (*args, *kwargs.values())[0]
            old = out[0] if isinstance(out, tuple) else out
            assert isinstance(old, Tensor)
            x = given.reshape(-1, given.shape[-1])
            new = output_of(ffn, self.act, x.cpu()).to(x.device)
            if shared is not None:
                new = new - self._of_shared(x, shared)
            new = new.reshape(old.shape).to(old.dtype)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handle = self.layer.ffn.register_forward_hook(instead, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class _NeuronSums:
    """Sums over the tokens of a layer: the weights of its experts, and what each neuron adds to the output."""

    def __init__(self, neurons: Neurons, act: Activation) -> None:
        self._neurons, self._act = neurons, act
        self._experts = int(neurons.expert.max()) + 1
        self._tokens, self._weight = 0, torch.zeros(self._experts + 1, dtype=torch.float64)  # the last: shared
        self._square = torch.zeros(len(neurons), dtype=torch.float64)

    def check(self, batch: Batch, weights: Tensor, layer: int) -> None:
        """Raises InputError where the experts of the class compute something else than their neurons."""
        few = min(64, len(batch.ffn_input))
        x, index = batch.expert_input[:few].cpu(), batch.top_k_index[:few].cpu()  # type: ignore[index]
        made = torch.zeros(few, x.shape[1])
        for expert in range(self._experts):
            of = (index == expert).any(1)
            if bool(of.any()):
                one = self._neurons.some((self._neurons.expert == expert).nonzero().flatten())
                by = (weights[:few].cpu().float() * (index == expert)).sum(1)[of]
                made[of] += hidden_of(one, self._act, x[of]) @ one.down.float() * by[:, None]
        theirs = batch.expert_output[:few].cpu().float()
        if float((made - theirs).norm()) > _CLOSE * float(theirs.norm()) + 1e-6:
            raise InputError(
                f"the experts of layer {layer} compute something else than activation(gate) * up, so that their "
                "neurons cannot be those of a dense FFN",
                hint="Please report the family and the version of transformers.",
            )

    def add(self, x: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> None:
        """Add the tokens x [T, H] with their experts `index` and `weights` [T, k], and the weights of the shared expert
        [T]."""
        self._tokens += len(x)
        self._weight[:-1].index_add_(0, index.flatten(), weights.flatten().double())
        self._weight[-1] += float(shared.double().sum())
        for expert in range(-1, self._experts):
            of = torch.ones(len(x), dtype=torch.bool) if expert == SHARED else (index == expert).any(1)
            which = (self._neurons.expert == expert).nonzero().flatten()
            if not len(which) or not bool(of.any()):
                continue
            by = shared[of] if expert == SHARED else (weights.float() * (index == expert)).sum(1)[of]
            h = hidden_of(self._neurons.some(which), self._act, x[of]) * by[:, None]
            self._square[which] += h.double().square().sum(0)

    @property
    def mean_weight(self) -> Tensor:
        """float64 [n]: the mean weight of each neuron's expert."""
        return self._weight[self._neurons.expert] / self._tokens

    @property
    def energy(self) -> Tensor:
        """float64 [n]: the sum over all tokens of the square of what each neuron adds to the output."""
        return self._square * self._neurons.down.double().square().sum(1)


def _activation(made: Collapse) -> Activation:
    from transformers.activations import ACT2FN

    model = made.model
    word = next((model.value(key) for key in _ACTIVATIONS if model.value(key)), "silu")
    found: Callable[[Tensor], Tensor] = ACT2FN[word]
    return found


@contextmanager
def _writing(made: Collapse, path: Path, about: JsonObject) -> Iterator[OverlayWriter]:
    tensors = [(layer, of) for layer in made.layers for of, _ in made.layout(layer).values()]
    metadata = artifact_metadata(
        "overlay", version=OVERLAY_VERSION, identity=made.model.identity, method="collapse", width=made.width.after,
        **about,
    )  # fmt: skip
    with writing_overlay(path, tensors, metadata=metadata, overwrite=True) as writer:
        yield writer


def _write(made: Collapse, writer: OverlayWriter, layer: int, ffn: DenseFfn) -> None:
    """Write the FFN of a layer, with neurons of zero up to its width."""
    rows = {"up": ffn.neurons.up, "down": ffn.down}
    if ffn.neurons.gate is not None:
        rows["gate"] = ffn.neurons.gate
    missing = made.width.after - len(ffn.down)
    whole = {part: nn.functional.pad(tensor.float(), (0, 0, 0, missing)) for part, tensor in rows.items()}
    whole["down"] = whole["down"].T
    for (name, _, _), parts in made.layout(layer).values():
        writer.write(name, to_bytes(torch.cat([whole[part] for part in parts]).contiguous()))
