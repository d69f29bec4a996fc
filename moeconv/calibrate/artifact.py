"""The statistics file: one safetensors file with its provenance, written in one step and read without torch.

It has F64 tensors per MoE layer L, for S data sources, E experts and the hidden size H. `g` is the weight that the
model really gives an expert, `f` the output of the expert, and `c` = 1 - cos(residual stream before the FFN, after it).
`prediction_layers` of the provenance are the multi-token-prediction layers that were measured, numbered on from the
model's layers. All sums are over routed tokens only. Where the weights multiply the inputs of the experts (llama4), an
expert adds its output for the input g x as it is: `f` is that output, in all fields, and ||f|| takes the place of
g ||f||.

    layer.L.count              [S, E]  number of tokens routed to the expert
    layer.L.gate_sum, gate_sq_sum, norm_sum, norm_sq_sum, gate_norm_sum, gate_norm_sq_sum, easy_ep_sum
                               [S, E]  sums of g, g^2, ||f||, ||f||^2, g ||f||, (g ||f||)^2, g ||f|| c
    layer.L.out_mean           [E, H]  F32, mean of f; out_var [E] = mean of ||f - out_mean||^2
    layer.L.coactivation       [E, E]  number of tokens routed to both experts; the diagonal is the count
    layer.L.output_cosine      [E, E]  mean cosine of the outputs of two experts on a token sample that runs
                                       through every expert
    layer.L.router_cosine      [E, E]  cosine of router rows; logit_correlation [E, E] Pearson over all tokens
    layer.L.logit_sum          [E]     sum of the router logits; logit_product [E, E] sum of their products, from
                                       which the correlation of two added files is computed
    layer.L.sample_logits      [T, E]  F32, router logits of the token sample; sample_outputs [T, E, P] F16, the
                                       projected outputs of every expert (sample.py), divided by sample_unit [1]
    layer.L.sample_scale       [T]     norm of the residual stream before the FFN; sample_bias [E] the bias that the
                                       router adds for the choice, sample_factor [1] the factor of the weights
    layer.L.entropy_sum        [S]     sum of the entropy of softmax(router logits), nats; tokens [S]
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeconv.calibrate.twin import check_routers, measured_on
from moeconv.checkpoint.artifact import artifact_metadata, is_artifact
from moeconv.checkpoint.measured import open_measured
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.writer import writing_artifact
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.types import Config

KIND = "statistics"
VERSION = 1
PER_SOURCE = (
    "count", "gate_sum", "gate_sq_sum", "norm_sum", "norm_sq_sum", "gate_norm_sum", "gate_norm_sq_sum", "easy_ep_sum",
)  # fmt: skip
FIELDS = (
    *PER_SOURCE, "out_mean", "out_var", "coactivation", "output_cosine", "router_cosine", "logit_correlation",
    "logit_sum", "logit_product", "entropy_sum", "tokens",
)  # fmt: skip
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_REQUIRED = ("version", "identity", "model_type", "layers", "num_experts", "top_k", "tokens", "sources")


@dataclass(frozen=True, eq=False)
class Statistics:
    """A statistics file; `metadata` is its provenance."""

    metadata: Config
    file: SafetensorsFile

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.metadata["layers"])

    @property
    def prediction_layers(self) -> tuple[int, ...]:
        """The multi-token-prediction layers that were measured."""
        return tuple(self.metadata.get("prediction_layers", ()))

    def has(self, layer: int, field: str) -> bool:
        """Whether the file holds a field."""
        return f"layer.{layer}.{field}" in self.file.tensors

    def layer(self, layer: int, field: str) -> np.ndarray:
        """A field of one MoE layer, in its shape in the file. Raises InputError if the file does not have it."""
        name = f"layer.{layer}.{field}"
        info = self.file.tensors.get(name)
        if info is None or info.dtype not in _NUMPY:
            raise InputError(
                f"{self.file.label} has no {field} for layer {layer}",
                hint="The file was written for another model or by another version: run `moeconv calibrate` again.",
            )
        return np.frombuffer(self.file.read(name), _NUMPY[info.dtype]).reshape(info.shape)

    def check_belongs(self, model: Model, *, twin: bool = False) -> str | None:
        """Check that these are statistics of `model` or, with `twin`, of its twin: the same model in another dtype or
        quantization. Returns None, or the fingerprint of the twin. Raises InputError for any other model."""
        theirs = self.metadata
        what = (
            f"{escape(theirs['model_type'])}, {len(theirs['layers'])} MoE layers of "
            f"{escape(theirs['num_experts'])} experts"
        )
        found = measured_on(model, theirs, label=self.file.label, what=what, twin=twin)
        if found is not None:
            cosines = {layer: self.layer(layer, "router_cosine") for layer in self.layers}
            check_routers(model, cosines, label=self.file.label)
        return found


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Open a statistics file. Raises InputError if it is missing, damaged or another kind of file."""
    make = "moeconv calibrate MODEL STATS --data FILE"
    file, metadata = open_measured(path, kind=KIND, version=VERSION, required=_REQUIRED, make=make)
    return Statistics(metadata, file)


def layer_importance(statistics: Statistics) -> dict[int, float]:
    """{layer: how much an error in the experts of the layer affects the layers after it, >= 0}.

    This is the mean over routed tokens, weighted by g ||f||, of 1 - cos(residual stream before the FFN, after it):
    about half the square of the FFN's share in the direction of the stream, and the next norm passes only the
    direction. The squared relative error of the experts' weights, times this number, is the error in the stream.
    """
    return {
        layer: float(
            statistics.layer(layer, "easy_ep_sum").sum()
            / max(statistics.layer(layer, "gate_norm_sum").sum(), np.finfo(np.float64).tiny)
        )
        for layer in statistics.layers
    }


def is_statistics(path: str | os.PathLike[str]) -> bool:
    """Whether a file has the statistics of an MoE. `calibrate` also writes files of the neurons of dense models."""
    return is_artifact(path, KIND)


def write_statistics(
    path: str | os.PathLike[str],
    fields: Mapping[int, Mapping[str, np.ndarray]],
    *,
    metadata: Config,
    overwrite: bool = False,
) -> None:
    """Write {layer: {field: float64 array, out_mean float32}}. The file appears complete or not at all.

    Raises OutputError if `path` exists and `overwrite` is not set, or if it cannot be written.
    """
    arrays = {f"layer.{layer}.{name}": a for layer, of_layer in fields.items() for name, a in of_layer.items()}
    kinds = {np.dtype(numpy): name for name, numpy in _NUMPY.items()}
    specs = [(name, kinds[array.dtype], array.shape) for name, array in arrays.items()]
    provenance = artifact_metadata(KIND, version=VERSION, **metadata)
    with writing_artifact(Path(path), specs, metadata=provenance, overwrite=overwrite) as writer:
        for name, array in arrays.items():
            writer.write(name, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
