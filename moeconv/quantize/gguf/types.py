"""The number formats of GGUF as data: what each one takes, the error of its codes, and what stands in for it where its
blocks do not divide a width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moeconv.checkpoint.header import BLOCK_DTYPES
from moeconv.quantize.spec import SchemeInfo

# transformers 5.23, measured: a Mixtral's GGUF becomes a dense Llama with random FFNs, without an exception; for
# Qwen3-MoE it takes the default for the experts' width and refuses.
LOADS = {"transformers": "no", "vllm": "unknown", "sglang": "unknown", "llama.cpp": "ok"}
RUN: dict[str, dict[str, str]] = {"transformers": {}, "llama.cpp": {}}  # every family that it is written for


@dataclass(frozen=True, slots=True)
class GgufType:
    """A number format. `bits` are those of --bits, `error` is the relative RMS error of Gaussian weights, `file_type`
    is llama.cpp's number for a file that consists mostly of it, and `instead` is the type that llama-quantize takes
    where the blocks of 256 do not divide a width."""

    dtype: str
    bits: int
    error: float
    file_type: int
    instead: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The value of --scheme."""
        return self.dtype.lower()


# those without --scheme first; the first of a width is that of --bits
TYPES: tuple[GgufType, ...] = (
    GgufType("Q4_K", 4, 0.071, 14, "Q5_0"),
    GgufType("Q8_0", 8, 0.0054, 7, aliases=("q8",)),
    GgufType("Q4_0", 4, 0.086, 2, aliases=("q4",)),
    GgufType("Q6_K", 6, 0.0172, 18, "Q8_0"),
    GgufType("Q5_K", 5, 0.035, 16, "Q5_1"),
    GgufType("Q3_K", 3, 0.144, 11, "Q4_0"),
    GgufType("Q2_K", 2, 0.266, 10, "Q4_0"),
    GgufType("Q4_1", 4, 0.071, 3),
    GgufType("Q5_0", 5, 0.041, 8),
    GgufType("Q5_1", 5, 0.034, 9),
    GgufType("IQ4_NL", 4, 0.074, 25),
    GgufType("IQ4_XS", 4, 0.074, 30, "IQ4_NL"),
    GgufType("MXFP4", 4, 0.112, 38),
    GgufType("F16", 16, 0.0003, 1),
    GgufType("BF16", 16, 0.0017, 32),
    GgufType("F32", 32, 0.0, 0),
)
BY_DTYPE: Mapping[str, GgufType] = {kind.dtype: kind for kind in TYPES}
UNUSUAL = "F16"  # where no block format divides a width


def fitting(dtype: str, columns: int) -> str:
    """The dtype that llama-quantize stores a matrix of `columns` columns in where `dtype` was chosen for it."""
    for kind in (dtype, BY_DTYPE[dtype].instead):
        if kind and columns % BLOCK_DTYPES.get(kind, (1, 0))[0] == 0:
            return kind
    return UNUSUAL


def scheme_of(kind: GgufType) -> SchemeInfo:
    """The record of --scheme for a type. Floats are chosen for whole files."""
    limit = min(0.9, 5 * kind.error) if kind.error else 1e-6
    return SchemeInfo(
        kind.name, kind.bits, kind.dtype, LOADS, limit=max(limit, 0.005) if kind.bits >= 16 else limit,
        aliases=kind.aliases, measured=RUN, error=kind.error, errors={None: kind.error**2},
        whole=kind.dtype not in BLOCK_DTYPES,
    )  # fmt: skip
