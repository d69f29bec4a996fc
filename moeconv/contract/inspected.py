"""The JSON of `moeconv inspect`."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict


class RoleCounts(TypedDict):
    """Parameters of a checkpoint; null where the family is not known."""

    total: int | None
    active: int | None
    experts: int | None
    router: int | None
    prediction: int | None  # in multi-token-prediction layers, which `total` and `active` exclude


class Quantization(TypedDict):
    """How a checkpoint's weights are packed."""

    format: str
    bits: float | None
    scheme: str | None
    roles: list[str]


class Inspected(TypedDict):
    """What `moeconv inspect` prints; null is what cannot be known of an architecture that moeconv does not support."""

    path: str
    model_type: str | None
    kind: Literal["dense", "moe"] | None
    architecture: str | None
    layers: int | None
    moe_layers: list[int] | None
    mtp_layers: list[int] | None
    num_experts: int | None
    top_k: int | None
    shared_experts: int | None
    parameters: RoleCounts
    parameters_by_role: dict[str, int]
    bytes_by_role: dict[str, int]
    bytes: int
    dtypes: dict[str, int]
    flops_per_token: int | None
    quantization: Quantization | None
    tensors: int
    shards: int
    identity: str
    warnings: list[str]
