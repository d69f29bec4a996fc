"""Statistics of the FFN neurons of a dense model, measured layer by layer; `upcycle --method split` uses them.

The activation h of a neuron is its input to the down projection; in most families, h = act(x Wg) * (x Wu).

    layer.L.inputs   [n, H]  BF16, FFN inputs x of a token sample, the same tokens in every layer
    layer.L.rate     [f]     F32, share of the tokens for which the neuron is among the tenth with the largest |h|
    layer.L.mean     [f]     F32, mean of h; energy [f] mean of h^2
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from moeconv.calibrate.twin import measured_on, structure
from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.measured import open_measured
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.writer import writing_artifact
from moeconv.data.windows import TokenData
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.plan.kernels.stored import to_bytes, to_tensor
from moeconv.randomness import generator
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.skeleton import Skeleton
from moeconv.types import Config, JsonObject
from moeconv.units import counted

KIND = "neurons"
VERSION = 1
TOP = 0.1  # share of a token's neurons that count as active
_REQUIRED = ("version", "identity", "model_type", "layers", "width", "tokens", "sources")


def down_module(skeleton: Skeleton, model: Model, layer: int) -> nn.Module:
    """The down projection, whose inputs are the activations of the neurons."""
    return skeleton.owner(model.ffn_name("down", layer=layer))


@contextmanager
def activations(down: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block, every forward pass appends its activations h [T, f] to the list."""
    seen: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def layer_neurons(layer: Layer, down: nn.Module, *, chosen: Tensor) -> dict[str, Tensor]:
    """Run `layer` over all windows and return its fields. `chosen` int64 [n] are the sorted positions of the sample.

    Raises InputError if the layer computes NaN or infinite values.
    """
    count = energy = total = None
    sample, tokens = [], 0
    with activations(down) as seen:
        for batch in layer.batches():
            h = seen.pop()
            if total is None:
                count, energy, total = (torch.zeros(h.shape[1], dtype=torch.float64, device=h.device) for _ in range(3))
            assert count is not None and energy is not None
            top = torch.topk(h.abs(), max(1, round(TOP * h.shape[1])), dim=1, sorted=False).indices
            count += torch.bincount(top.flatten(), minlength=h.shape[1])
            energy += h.double().square().sum(0)
            total += h.sum(0, dtype=torch.float64)
            start = batch.rows.start * batch.inputs.shape[1]
            here = chosen[(chosen >= start) & (chosen < start + len(h))] - start
            sample.append(batch.ffn_input[here.to(h.device)].to(torch.bfloat16).cpu())
            tokens += len(h)
    assert count is not None and energy is not None and total is not None
    if not bool(energy.isfinite().all()):
        raise InputError(
            f"layer {layer.index} computes NaN or infinite values",
            hint="The checkpoint is damaged, or its weights overflow in this dtype.",
        )
    sums = {"rate": count, "mean": total, "energy": energy}
    return {"inputs": torch.cat(sample)} | {k: (v / tokens).float().cpu() for k, v in sums.items()}


def measure_neurons(
    stream: LayerStream, read: TokenData, path: Path, *, seed: int, sample_tokens: int, overwrite: bool
) -> JsonObject:
    """Run the whole model, and write the fields of every layer as they are measured. Returns a summary: {layers,
    seconds}."""
    model = stream.model
    began = time.monotonic()
    n = min(sample_tokens, read.tokens)
    draw = generator((seed, "neurons"))
    chosen = torch.from_numpy(np.sort(draw.choice(read.tokens, size=n, replace=False, shuffle=False)))
    width, hidden = model.ffn_width, model.hidden_size
    specs: list[tuple[str, str, tuple[int, ...]]] = []
    layers = model.with_ffn(range(model.num_layers), every=True)
    for index in layers:
        specs.append((f"layer.{index}.inputs", "BF16", (n, hidden)))
        specs += [(f"layer.{index}.{field}", "F32", (width,)) for field in ("rate", "mean", "energy")]
    about = {
        "identity": model.identity,
        "structure": structure(model),
        "model_type": model.family.model_type,
        "layers": list(layers),
        "width": width,
        "tokens": read.tokens,
        "sources": [source.to_json() for source in read.sources],
        "seq_len": read.seq_len,
        "seed": seed,
        "sample_tokens": n,
        "dtype": str(stream.dtype).removeprefix("torch."),
    }
    rows = []
    metadata = artifact_metadata(KIND, version=VERSION, **about)
    with writing_artifact(path, specs, metadata=metadata, overwrite=overwrite) as writer:
        for layer in stream.layers():
            if layer.index not in layers:
                continue
            fields = layer_neurons(layer, down_module(stream.skeleton, model, layer.index), chosen=chosen)
            for field, value in fields.items():
                writer.write(f"layer.{layer.index}.{field}", to_bytes(value))
            rows.append({"layer": layer.index} | _concentration(fields))
    return {"layers": rows, "seconds": time.monotonic() - began}


def _concentration(fields: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of the busiest half of the neurons in the activity (`rate`) and in the energy of a layer."""
    found = {}
    for name, key in (("rate", "rate_top_half"), ("energy", "energy_top_half")):
        values = fields[name].double().sort(descending=True).values
        found[key] = float(values[: len(values) // 2].sum() / values.sum().clamp_min(1e-300))
    return found


@dataclass(frozen=True, eq=False)
class NeuronStatistics:
    """A neuron statistics file; `metadata` is its provenance."""

    metadata: Config
    file: SafetensorsFile

    def field(self, layer: int, name: str) -> Tensor:
        """A field of one layer in float32."""
        info = self.file.tensors.get(f"layer.{layer}.{name}")
        if info is None:
            raise InputError(
                f"{self.file.label} has no {name} for layer {layer}", hint="Run `moeconv calibrate` again."
            )
        return to_tensor(bytearray(self.file.read(info.name)), info.dtype, info.shape).float()


def load_neurons(path: str | os.PathLike[str], model: Model, *, twin: bool = False) -> NeuronStatistics:
    """Open the neuron statistics of exactly this model or, with `twin`, of the same model in another dtype or
    quantization. Raises InputError if the file is missing, damaged or of another model."""
    make = "moeconv calibrate SOURCE STATS --data FILE"
    file, metadata = open_measured(path, kind=KIND, version=VERSION, required=_REQUIRED, make=make)
    layers, width = len(metadata["layers"]), escape(metadata["width"])
    what = f"{escape(metadata['model_type'])}, {counted(layers, 'layer')} of {width} neurons"
    measured_on(model, metadata, label=file.label, what=what, twin=twin)
    return NeuronStatistics(metadata, file)
