"""The kernels of compressed-tensors' 8-bit and 4-bit floats and asymmetric integers: equal to the library's own
calculation and compression, bit by bit, and decoded as it decodes them."""

from __future__ import annotations

import pytest
import torch

from moeconv.errors import InputError, UsageError
from moeconv.families.methods import encodings
from moeconv.families.packed import split_part
from moeconv.plan.kernels.decode import decode_parts
from moeconv.plan.kernels.pack.asymmetric import pack_int4_asymmetric
from moeconv.plan.kernels.pack.eightbit import pack_float8, pack_float8_blocks, pack_int8_rows, pack_mxfp8
from moeconv.plan.kernels.pack.fp4 import pack_mxfp4, pack_nvfp4
from moeconv.quantize.compressed_tensors import COMPRESSED_TENSORS
from moeconv.quantize.spec import Scheme

PACK = {
    "fp8": pack_float8,
    "fp8-block": lambda w: pack_float8_blocks(w, block=128),
    "w8a8": pack_int8_rows,
    "mxfp8": pack_mxfp8,
    "nvfp4": pack_nvfp4,
    "mxfp4": pack_mxfp4,
    "int4-asym": lambda w: pack_int4_asymmetric(w, group_size=32),
}
GROUPS = {"fp8-block": 128, "mxfp8": 32, "nvfp4": 16, "mxfp4": 32, "int4-asym": 32}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FITTED = {
    "fp8": lambda w: pack_float8(w, fit=True),
    "fp8-block": lambda w: pack_float8_blocks(w, block=128, fit=True),
    "w8a8": lambda w: pack_int8_rows(w, fit=True),
    "mxfp8": lambda w: pack_mxfp8(w, fit=True),
    "nvfp4": lambda w: pack_nvfp4(w, fit=True),
    "mxfp4": lambda w: pack_mxfp4(w, fit=True),
    "int4-asym": lambda w: pack_int4_asymmetric(w, group_size=32, fit=True),
}
EVERY = pytest.mark.parametrize("scheme", PACK)


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gaussian weights; rows of zeros, of one value, with an outlier, and of one sign; every midpoint between codes."""
    torch.manual_seed(0)
    usual = torch.randn(128, 256) * 0.02
    edges = usual.clone()
    edges[0] = 0
    edges[1] = 0.375
    edges[2, 7] = 30
    edges[3] = edges[3].abs()
    edges[4] = -edges[4].abs()
    edges[5, :16] = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, -5])
    edges[6, :16] = -edges[5, :16]
    edges[7] = 0
    edges[7, 100] = -1
    return {"usual": usual.to(dtype), "edges": edges.to(dtype), "zeros": torch.zeros(128, 128, dtype=dtype)}


def library(scheme: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(what compressed-tensors stores of a weight with the scales of its extremes, what it decodes that to)."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    group = _config(scheme)["config_groups"]["group_0"]
    made = QuantizationScheme.model_validate({k: group[k] for k in ("targets", "weights", "input_activations")})
    size = GROUPS.get(scheme, weight.shape[1])
    parts = weight.view(weight.shape[0], -1, size)
    if scheme == "fp8-block":
        parts = weight.view(-1, 128, weight.shape[1] // 128, 128).transpose(1, 2).flatten(2)
    low, high = parts.amin(-1), parts.amax(-1)
    state = {"weight": weight}
    if scheme == "nvfp4":
        state["weight_global_scale"] = generate_gparam(low.min().reshape(1), high.max().reshape(1))
    scale, zero = calculate_qparams(low, high, made.weights, global_scale=state.get("weight_global_scale"))
    state |= {"weight_scale": scale} | ({"weight_zero_point": zero} if scheme == "int4-asym" else {})
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    stored = compressor.compress(state, made)
    return stored, compressor.decompress(stored, made)["weight"]


def _config(scheme: str) -> dict:
    bits = COMPRESSED_TENSORS.scheme(scheme).bits
    return COMPRESSED_TENSORS.config(Scheme(scheme, bits, GROUPS.get(scheme)), [], "bfloat16", "experts")


def decoded(scheme: str, packed: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    (form,) = encodings(_config(scheme))
    parts = {split_part(f"x.{name}")[1]: tensor for name, tensor in packed.items()}
    how = {"form": form.name, "bits": form.bits, "grid": form.grid, "shape": list(shape)}
    return decode_parts(parts, name="x.weight", how=how)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["usual", "edges", "zeros"])
def test_bytes_and_decoded_values_are_those_of_the_library(scheme, dtype, kind):
    pytest.importorskip("compressed_tensors")
    weight = weights(dtype)[kind]
    if dtype is torch.float16 and scheme in ("mxfp4", "mxfp8") and kind != "usual":
        pytest.skip("the library's scales underflow in float16 for groups of zeros")
    stored, values = library(scheme, weight)
    packed = PACK[scheme](weight)
    if scheme == "int4-asym" and kind != "usual":  # a group of zeros: 0 / 0 there, and any zero point decodes to zero
        empty = (weight.view(128, -1, 32) == 0).all(-1)
        assert torch.equal(packed["weight_scale"][~empty], stored["weight_scale"][~empty])
        ours = decoded(scheme, packed, weight.shape)
        assert torch.equal(ours.view(128, -1, 32)[~empty], values.view(128, -1, 32)[~empty])
        assert not ours.view(128, -1, 32)[empty].any()
        return
    assert set(packed) == set(stored)
    for name, tensor in packed.items():
        if name != "weight_shape":
            assert same(tensor, stored[name].to(tensor.dtype)), name
    assert torch.equal(decoded(scheme, packed, weight.shape).float(), values.float())


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_weight_is_further_from_its_code_than_the_next_code(scheme, dtype):
    """Against float64: the error of every weight is at most half the distance of two codes at its size."""
    weight = weights(dtype)["usual"]
    values = decoded(scheme, PACK[scheme](weight), weight.shape).double()
    x = weight.double()
    peak = x.abs().view(128, -1, GROUPS.get(scheme, 256) if scheme != "fp8-block" else 256).amax(-1, keepdim=True)
    peak = peak.expand(-1, -1, 256 // peak.shape[1]).reshape(128, 256)
    if scheme == "fp8-block":
        peak = x.abs().amax()
    steps = {"fp8": 1 / 16, "fp8-block": 1 / 16, "mxfp8": 1 / 16, "nvfp4": 1 / 4, "mxfp4": 1 / 4}
    if scheme in steps:  # half a step is relative to the weight above the smallest codes, with room for the scale
        smallest = {"nvfp4": 0.25 / 6, "mxfp4": 0.25 / 4}.get(scheme, 2.0**-10 / 448 * 2)
        bound = torch.maximum(x.abs() * steps[scheme], peak * smallest) * 1.15
    else:
        bound = peak * (1.2 / 127 if scheme == "w8a8" else 0.6 / 7)  # in bfloat16 the quotient is rounded too
    if scheme in ("nvfp4", "mxfp4", "mxfp8"):  # the largest weights of a group may lie above the largest code
        bound = torch.maximum(bound, peak * 0.15)
    assert bool(((values - x).abs() <= bound).all())


@EVERY
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_is_refused(scheme, value, dtype):
    weight = weights(dtype)["usual"]
    weight[77, 200] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        PACK[scheme](weight)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.01, 3e-4])
def test_small_weights_are_packed_as_exactly_as_usual_ones(scheme, dtype, size):
    """No scale overflows or underflows in the dtype of the weights: that of NVFP4 is above the largest float16."""
    draw = torch.randn(128, 256, generator=torch.Generator().manual_seed(2))

    def error(weight):
        values = decoded(scheme, PACK[scheme](weight), weight.shape).double()
        return float((values - weight.double()).norm() / weight.double().norm())

    assert error((draw * size).to(dtype)) < 1.1 * error(draw.to(dtype))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_below_the_smallest_scale_decode_to_almost_nothing(scheme, dtype):
    """Subnormal weights: no NaN, no infinity, and nothing grows."""
    weight = torch.full((128, 128), 1e-39).to(dtype)
    weight[::2] *= -1
    values = decoded(scheme, PACK[scheme](weight), weight.shape).float()
    assert torch.isfinite(values).all() and float(values.abs().max()) <= 2e-38


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_stays_as_it_is(scheme, dtype):
    weight = weights(dtype)["usual"]
    PACK[scheme](weight)
    assert torch.equal(weight, weights(dtype)["usual"])


@pytest.mark.parametrize("scheme", FITTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_of_least_error_are_never_worse(scheme, dtype):
    for kind, weight in weights(dtype).items():
        errors = [
            float((decoded(scheme, pack[scheme](weight), weight.shape).double() - weight.double()).square().sum())
            for pack in (PACK, FITTED)
        ]
        room = 1.001 if dtype is torch.float32 else 1.01  # readers round a product to the dtype of the scale
        assert errors[1] <= errors[0] * room, kind
        if kind == "usual":
            gain = {"nvfp4": 0.78, "fp8": 0.95, "int4-asym": 0.94}.get(scheme, room)
            assert errors[1] < gain * errors[0]
        assert kind != "zeros" or errors == [0, 0]


@pytest.mark.parametrize("pack", [PACK, FITTED], ids=["rtn", "mse"])
@pytest.mark.parametrize("scheme", FITTED)
def test_large_float16_weights_are_packed(scheme, pack):
    """Between the least and the largest lies more than the largest float16."""
    weight = weights(torch.float16)["usual"].float()
    weight *= 50000 / weight.abs().max()
    values = decoded(scheme, pack[scheme](weight.half()), weight.shape).double()
    assert float((values - weight.double()).norm() / weight.double().norm()) < 0.12


@pytest.mark.parametrize("scheme", FITTED)
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e-39])
def test_scales_of_least_error_of_what_is_no_usual_number(scheme, value):
    weight = torch.full((128, 256), value).bfloat16()
    if value == 1e-39:  # subnormal
        values = decoded(scheme, FITTED[scheme](weight), weight.shape).float()
        assert torch.isfinite(values).all() and float(values.abs().max()) <= 2e-38
        return
    with pytest.raises(InputError, match="NaN or infinity"):
        FITTED[scheme](weight)


def test_scales_of_least_error_are_those_of_a_search_over_all_scales():
    """NVFP4 against every FP8 scale of each group, in float64."""
    weight = weights(torch.float32)["usual"][:8]
    packed = pack_nvfp4(weight, fit=True)
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    parts = weight.double().abs().view(-1, 16) * packed["weight_global_scale"].double()
    scaled = parts[:, None] / every[:, None]
    nearest = codes[torch.bucketize(scaled, (codes[1:] + codes[:-1]) / 2)] * every[:, None]
    least = (nearest - parts[:, None]).square().sum(-1).amin(1).sum()
    found = decoded("nvfp4", packed, weight.shape).double().abs().view(-1, 16) * packed["weight_global_scale"].double()
    assert float((found - parts).square().sum() / least) < 1.06


def test_joined_weights_with_scales_of_least_error_share_one_too():
    gate, up = torch.randn(32, 64) * 0.02, torch.randn(32, 64) * 0.1
    joined = pack_nvfp4(gate, beside=[up], fit=True)
    assert torch.equal(joined["weight_global_scale"], pack_nvfp4(up)["weight_global_scale"])
    errors = [
        float((decoded("nvfp4", made, gate.shape).float() - gate).norm())
        for made in (joined, pack_nvfp4(gate, beside=[up]))
    ]
    assert errors[0] < 0.95 * errors[1]


def test_joined_weights_share_the_scale_of_the_largest():
    gate, up = torch.randn(32, 64) * 0.02, torch.randn(32, 64) * 0.1
    alone, joined = pack_nvfp4(up), pack_nvfp4(gate, beside=[up])
    assert torch.equal(alone["weight_global_scale"], joined["weight_global_scale"])
    assert torch.equal(alone["weight_global_scale"], 2688 / up.abs().max().reshape(1))
    assert pack_nvfp4(gate)["weight_global_scale"] > joined["weight_global_scale"]


def test_a_matrix_without_whole_blocks_is_refused():
    with pytest.raises(UsageError, match="blocks of 128 do not divide"):
        pack_float8_blocks(torch.zeros(100, 128), block=128)
