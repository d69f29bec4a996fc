"""The block formats of GGUF: what the `gguf` package decodes is as near to the weights as a dense float64 search with
exact scales allows, also where inputs differ in importance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.checkpoint.header import BLOCK_DTYPES
from moeconv.errors import InputError
from moeconv.plan.kernels.pack import ggml
from moeconv.plan.kernels.pack.superblocks import IQ4_LEVELS
from moeconv.quantize.gguf.types import TYPES

pytest.importorskip("gguf")
E2M1 = [0, 1, 2, 3, 4, 6, 8, 12]
SYMMETRIC = {
    "Q3_K": (16, list(range(-4, 4))), "Q6_K": (16, list(range(-32, 32))), "Q5_0": (32, list(range(-16, 16))),
    "Q4_0": (32, list(range(-8, 8))), "IQ4_NL": (32, list(IQ4_LEVELS)), "IQ4_XS": (32, list(IQ4_LEVELS)),
}  # fmt: skip
AFFINE = {"Q2_K": (16, 3), "Q4_K": (32, 15), "Q5_K": (32, 31), "Q4_1": (32, 15), "Q5_1": (32, 31)}
# how much larger the error may be than that of 400 starts with exact scales, without and with importance
ROOM = {
    "Q2_K": (1.12, 1.26), "Q3_K": (1.03, 1.06), "Q4_K": (1.1, 1.18), "Q5_K": (1.16, 1.36), "Q6_K": (1.16, 1.45),
    "Q4_0": (1.0, 1.1), "Q4_1": (1.07, 1.18), "Q5_0": (1.04, 1.15), "Q5_1": (1.1, 1.23), "IQ4_NL": (1.04, 1.11),
    "IQ4_XS": (1.05, 1.13),
}  # fmt: skip
SEARCHED = [*SYMMETRIC, *AFFINE]


def weights(kind, *, rows=24, columns=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    if kind == "heavy":
        x = x * torch.exp(0.7 * torch.randn(rows, columns, generator=generator))
    return x


def importance(columns=512):
    return torch.exp(1.5 * torch.randn(columns, generator=torch.Generator().manual_seed(3)))


def decoded(x, dtype, weight=None):
    return torch.from_numpy(np.array(ggml.decode(ggml.encode(x, dtype, weight), dtype, tuple(x.shape))))


def error(x, y, weight=None):
    squares = (x.double() - y.double()) ** 2
    return float((squares if weight is None else squares * weight).sum())


def exact_search(x, dtype, weight):
    """The squared error with a float64 scale (and offset) per block, out of 400 starts, each improved thrice."""
    size, levels = SYMMETRIC.get(dtype) or AFFINE[dtype]
    x = x.double().numpy().reshape(-1, size)
    w = (
        np.ones_like(x)
        if weight is None
        else np.tile(weight.double().numpy(), len(x) * size // len(weight)).reshape(x.shape)
    )
    best = np.full(len(x), np.inf)
    if dtype in SYMMETRIC:
        table = np.array(sorted(levels), float)
        peak = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
        middles = (table[1:] + table[:-1]) / 2
        for start in np.linspace(0.6, 1.2, 200):
            for end in (table[0], table[-1]):
                scale = peak / (start * end)
                for _ in range(3):
                    q = table[np.searchsorted(middles, x / scale)]
                    scale = ((w * q * x).sum(1) / np.maximum((w * q * q).sum(1), 1e-30))[:, None]
                    best = np.minimum(best, (w * (x - scale * q) ** 2).sum(1))
                    scale = np.where(scale == 0, 1e-30, scale)
        return best.sum()
    low = x.min(1, keepdims=True)
    for start in np.linspace(0.6, 1.4, 400):
        scale, offset = (x.max(1, keepdims=True) - low) / (levels * start), low
        for _ in range(3):
            q = np.clip(np.round((x - offset) / scale), 0, levels)
            total, sq, sx = w.sum(1), (w * q).sum(1), (w * x).sum(1)
            spread = (w * q * q).sum(1) - sq**2 / total
            slope = ((w * q * x).sum(1) - sq * sx / total) / np.maximum(spread, 1e-30)
            scale, offset = slope[:, None], ((sx - slope * sq) / total)[:, None]
            best = np.minimum(best, (w * (x - scale * q - offset) ** 2).sum(1))
            scale = np.where(scale <= 0, 1e-30, scale)
    return best.sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", SEARCHED)
def test_errors_are_near_those_of_exact_scales(dtype, weighted):
    if dtype == "Q4_0" and not weighted:
        pytest.skip("the bytes of the gguf package, see test_gguf.py")
    for kind in ("normal", "heavy"):
        x, w = weights(kind), importance() if weighted else None
        found, least = error(x, decoded(x, dtype, w), w), exact_search(x, dtype, w)
        assert found < ROOM[dtype][weighted] * least, (kind, found / least)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.dtype)
def test_errors_of_gaussian_weights_are_those_of_the_table(kind):
    if kind.dtype not in BLOCK_DTYPES:
        return
    x = weights("normal", rows=128)
    relative = (error(x, decoded(x, kind.dtype)) / error(x, 0 * x)) ** 0.5
    assert relative == pytest.approx(kind.error, rel=0.03)


@pytest.mark.parametrize("dtype", [*SEARCHED, "MXFP4"])
def test_importance_moves_the_error_to_where_it_matters_less(dtype):
    x, w = weights("heavy"), importance()
    plain, by_importance = decoded(x, dtype), decoded(x, dtype, w)
    assert error(x, by_importance, w) < (1.0 if dtype == "MXFP4" else 0.97) * error(x, plain, w)
    # a common factor of the importance changes nothing, and equal importance is no importance
    assert torch.equal(by_importance, decoded(x, dtype, w * 1024))


def test_mxfp4_is_never_worse_than_the_gguf_package():
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    x, kind = weights("heavy"), GGMLQuantizationType.MXFP4
    theirs = torch.from_numpy(dequantize(quantize(x.numpy(), kind), kind).copy())
    per_block = [((x - y) ** 2).reshape(-1, 32).sum(1) for y in (decoded(x, "MXFP4"), theirs)]
    assert (per_block[0] <= per_block[1] * (1 + 1e-5)).all() and per_block[0].sum() < 0.97 * per_block[1].sum()


@pytest.mark.parametrize("dtype", sorted(BLOCK_DTYPES))
def test_blocks_at_the_ends(dtype):
    x = torch.zeros(4, 512)
    x[1] = 3.0  # constant
    x[2, 5] = -7.0  # one value
    x[3] = torch.linspace(-1, 1, 512) * 1e-6  # scales that float16 holds in coarse steps only
    for w in (None, importance()):
        y = decoded(x, dtype, w)
        assert torch.isfinite(y).all() and (y[0] == 0).all()
        assert (y[1] - 3).abs().max() < 0.5 and abs(float(y[2, 5]) + 7) < 1.8  # MXFP4 has 6 and 8
        assert (y[3] - x[3]).abs().max() < 1.1e-6
    for bad in (torch.nan, torch.inf):
        with pytest.raises(InputError, match="NaN or infinity"):
            ggml.encode(torch.full((1, 256), bad), dtype)


@pytest.mark.parametrize("dtype", ["Q2_K", "Q3_K", "Q5_K", "Q5_0", "IQ4_NL"])
def test_values_that_float16_scales_cannot_hold_are_refused(dtype):
    with pytest.raises(InputError, match=f"too large for {dtype}"):
        ggml.encode(torch.full((1, 256), 1e9) * torch.tensor([1.0, -1.0]).repeat(128), dtype)


def test_rows_of_many_blocks_have_the_importance_of_their_own_columns():
    x, w = weights("heavy", rows=600, columns=1024), importance(1024)
    for dtype in ("Q2_K", "IQ4_NL"):
        whole, alone = decoded(x, dtype, w), decoded(x[590:], dtype, w)
        assert (whole[590:] == alone).float().mean() > 0.999
