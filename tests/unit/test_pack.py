"""The pack kernels against compressed-tensors, which must decode ours, and bitsandbytes, whose bits they must give."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from moeconv.errors import InputError, UsageError
from moeconv.plan.kernels import pack

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


pytestmark = pytest.mark.usefixtures("one_thread")


def gauss(*shape: int, seed: int = 0, scale: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def samples(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of every awkward kind that a checkpoint may hold."""
    base = gauss(*shape, scale=1.0, dtype=torch.float32)
    mask = gauss(*shape, seed=1, scale=1.0, dtype=torch.float32) > 0
    alternate = (torch.arange(shape[0]) % 2).view(-1, *[1] * (len(shape) - 1))
    found = {
        "random": base * 0.02,
        "constant": torch.full(shape, 0.3),
        "negative": torch.full(shape, -0.3),
        "zero": torch.zeros(shape),
        "tiny": base * 1e-36,
        "subnormal": base * 1e-41,
        "large": base * 1e4,
        "huge": base * 1e37,
        "sparse": base * mask,
        "mixed scales": torch.where(mask, base, base * 1e-42),
        "zero rows": base * alternate,
        "on the grid": (base * 5000).round().clamp(-16384, 16384) / 16384,
    }
    return {name: w.to(dtype) for name, w in found.items() if torch.isfinite(w.to(dtype)).all()}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


# ---------------------------------------------------------------------------------------------- compressed-tensors


def decompressed(packed: dict[str, torch.Tensor], *, bits: int, group: int | None) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if group else "channel"
    args = QuantizationArgs(num_bits=bits, symmetric=True, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, None])
def test_compressed_tensors_decodes_what_we_pack(bits, group, dtype):
    for name, weight in samples((16, 256), dtype).items():
        packed = pack.pack_int(weight, bits=bits, group_size=group)
        assert packed["weight_packed"].dtype == torch.int32
        assert packed["weight_packed"].shape == (16, 256 * bits // 32)
        assert packed["weight_scale"].dtype == dtype
        assert packed["weight_scale"].shape == (16, 256 // (group or 256))
        assert same(packed["weight_shape"], torch.tensor([16, 256]))
        ours = pack.unpack_int(packed, bits=bits)
        assert torch.isfinite(ours).all(), name
        assert same(decompressed(packed, bits=bits, group=group), ours), name


@pytest.mark.parametrize("bits,half,top", [(2, 2, 1.5), (3, 4, 3.5), (4, 8, 7.5), (8, 128, 127.5)])
def test_levels_follow_the_written_formula(bits, half, top):
    weight = gauss(8, 64)
    packed = pack.pack_int(weight, bits=bits, group_size=32)
    groups = weight.view(8, 2, 32)
    scale = (groups.abs().amax(-1).float() / top).bfloat16()
    assert same(packed["weight_scale"], scale)
    levels = (groups.float() / scale.float().unsqueeze(-1)).round().clamp(-half, half - 1).view(8, 64).to(torch.int8)
    assert same(pack.unpack_words(packed["weight_packed"], bits=bits, columns=64), levels)
    # little end first, offset by half, across the ends of words: spelt out for the first row
    row = sum((int(level) + half) << (bits * i) for i, level in enumerate(levels[0]))
    assert packed["weight_packed"][0].numpy().tobytes() == row.to_bytes(64 * bits // 8, "little")
    assert same(packed["weight_packed"], pack_to_int32(levels, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_given_scales_are_packed_and_the_steps_compose(bits):
    weight = gauss(12, 128)
    scales = pack.int_scales(weight, bits=bits, group_size=64)
    whole = pack.pack_int(weight, bits=bits, group_size=64)
    assert same(whole["weight_scale"], scales)
    halved = pack.pack_int(weight, bits=bits, group_size=64, scales=scales / 2)
    levels = pack.quantize_int(weight, scales=scales / 2, bits=bits)
    assert levels.dtype == torch.int8
    assert levels.min() == -(1 << (bits - 1))
    assert levels.max() == (1 << (bits - 1)) - 1  # saturated, not wrapped
    assert same(pack.pack_words(levels, bits=bits), halved["weight_packed"])
    assert same(pack.unpack_words(halved["weight_packed"], bits=bits, columns=128), levels)


def test_zero_groups_and_zero_scales_decode_to_zero():
    weight = gauss(4, 64)
    weight[1] = 0
    packed = pack.pack_int(weight, bits=4, group_size=32)
    assert (packed["weight_scale"] > 0).all()
    assert (pack.unpack_int(packed, bits=4)[1] == 0).all()
    levels = pack.quantize_int(weight, scales=torch.zeros(4, 2, dtype=torch.bfloat16), bits=4)
    assert (levels[1] == 0).all()


@pytest.mark.parametrize("group,plain,searched", [(128, 0.111, 0.101), (32, 0.0955, 0.083)])
def test_fitted_scales_lower_the_error_of_gaussian_weights(group, plain, searched):
    weight = gauss(256, 1024)
    errors = []
    for fit in (False, True):
        packed = pack.pack_int(weight, bits=4, group_size=group, fit=fit)
        errors.append(pack.relative_rms(weight, pack.unpack_int(packed, bits=4)))
    assert errors[0] == pytest.approx(plain, abs=0.001)
    assert errors[1] == pytest.approx(searched, abs=0.001)


def test_fitted_scales_never_raise_a_groups_error():
    for weight in samples((8, 128), torch.float32).values():
        scales = [pack.int_scales(weight, bits=4, group_size=32), pack.fitted_scales(weight, bits=4, group_size=32)]
        plain, searched = (
            (pack.unpack_int(pack.pack_int(weight, bits=4, group_size=32, scales=s), bits=4) - weight)
            .double().view(8, 4, 32).square().sum(-1)
            for s in scales
        )  # fmt: skip
        assert (searched <= plain * (1 + 1e-4) + 1e-60).all()


def test_several_blocks_and_strided_rows_give_the_bytes_of_one_block(monkeypatch):
    weight = gauss(96, 256)
    strided = torch.cat([weight, weight], 1)[:, :256]
    whole = [pack.pack_int(weight, bits=b, group_size=32) for b in (4, 8)]
    fitted = pack.fitted_scales(weight, bits=4, group_size=32)
    nf4, rows = pack.pack_nf4(weight), pack.pack_int8_rowwise(weight)
    decoded = pack.unpack_nf4(nf4)
    for module in (pack.common, pack.fourbit, pack.rowwise):
        monkeypatch.setattr(module, "BLOCK", 7 * 256)  # 96 rows end in a short block
    for w in (weight, strided):
        for bits, expected in zip((4, 8), whole, strict=True):
            assert same(pack.pack_int(w, bits=bits, group_size=32)["weight_packed"], expected["weight_packed"])
            assert same(pack.unpack_int(expected, bits=bits), decompressed(expected, bits=bits, group=32))
        assert same(pack.fitted_scales(w, bits=4, group_size=32), fitted)
        assert all(same(tensor, nf4[key]) for key, tensor in pack.pack_nf4(w).items())
        assert all(same(tensor, rows[key]) for key, tensor in pack.pack_int8_rowwise(w).items())
    assert same(pack.unpack_nf4(nf4), decoded)


# ---------------------------------------------------------------------------------------------------- bitsandbytes

SHAPES = [(64, 64), (30, 70), (7, 13), (1, 31), (1, 64), (33, 65), (3, 5, 7), (1, 1)]


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


def plainly_decoded(codes: torch.Tensor, state) -> torch.Tensor:
    """The format's definition: value of the code times the block's absmax in float32, rounded once."""
    nibbles = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], -1).view(-1)[: math.prod(state.shape)]
    scales = state.absmax.repeat_interleave(state.blocksize)[: nibbles.numel()]
    return (state.code[nibbles.long()] * scales).to(state.dtype).view(state.shape)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_double_quantization_is_bit_equal_to_bitsandbytes(bnb, quant_type):
    shapes = [*SHAPES, (128, 256), (96, 700)]  # up to 1050 blocks: five nested ones, the last one short
    for shape in shapes:
        for name, weight in samples(shape, torch.bfloat16).items():
            codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True)
            if not torch.isfinite(state.offset):  # bitsandbytes writes NaN
                with pytest.raises(InputError, match="too large for double quantization"):
                    pack.pack_nf4(weight, quant_type=quant_type, nested=True)
                continue
            ours, theirs = pack.pack_nf4(weight, quant_type=quant_type, nested=True), state.as_dict(packed=True)
            key = f"quant_state.bitsandbytes__{quant_type}"
            # the state has spaces after the offset, so that its length is known before the weight is
            assert json.loads(bytes(ours.pop(key))) == json.loads(bytes(theirs.pop(key)))
            assert sorted(ours) == sorted({"": codes, **theirs})
            for part, tensor in {"": codes, **theirs}.items():
                assert same(ours[part], tensor), (shape, name, part)
            flat = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            mine = pack.unnest_absmax(ours["absmax"], nested_absmax=ours["nested_absmax"],
                                      nested_quant_map=ours["nested_quant_map"], offset=state.offset)  # fmt: skip
            assert same(mine, flat), (shape, name)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_is_bit_equal_to_bitsandbytes(bnb, dtype, quant_type):
    for shape in SHAPES:
        for name, weight in samples(shape, dtype).items():
            for block_size in (32, 64, 128):
                codes, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=quant_type)
                ours = pack.pack_nf4(weight, block_size=block_size, quant_type=quant_type)
                theirs = {"": codes, **state.as_dict(packed=True)}
                assert sorted(ours) == sorted(theirs)
                for key in theirs:
                    assert same(ours[key], theirs[key]), (shape, name, block_size, key)
                decoded = pack.unpack_nf4(ours)
                assert same(decoded, plainly_decoded(codes, state)), (shape, name, block_size)
                # bitsandbytes compiles a slow fallback for odd widths, and its AVX-512 kernel takes a wrong scale where
                # a block is wider than a row and flushes subnormal results to zero.
                if shape[-1] % 2 == 0 and block_size <= shape[-1]:
                    theirs = bnb.dequantize_4bit(codes, state)
                    normal = decoded.float().abs() >= torch.finfo(torch.float32).tiny
                    assert same(decoded[normal], theirs[normal]), (shape, name, block_size)
                    assert (theirs[~normal].abs() <= torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_midpoints_and_their_neighbours_are_bit_equal(bnb, quant_type):
    """The values at which a lookup table without the exact search would fail."""
    table = pack.fourbit._table_4bit(quant_type)
    middle = table.midpoints
    near = torch.cat([middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))])
    near = torch.cat([near, torch.tensor([0.0, 1e-44, -1e-44]), torch.ones(16)])  # 64 values, absmax 1
    weight = torch.stack([near, near * 4, near * 0.37])
    assert weight.shape == (3, 64)
    codes, state = bnb.quantize_4bit(weight, quant_type=quant_type)
    ours = pack.pack_nf4(weight, quant_type=quant_type)
    assert same(ours[""], codes)
    assert same(ours["absmax"], state.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rowwise_is_bit_equal_to_bitsandbytes(bnb, dtype):
    for shape in [(64, 64), (30, 70), (7, 13), (1, 31), (1, 1)]:
        for name, weight in samples(shape, dtype).items():
            levels, scales, _ = bnb.int8_vectorwise_quant(weight)
            ours = pack.pack_int8_rowwise(weight)
            assert same(ours[""], levels), (shape, name)
            assert same(ours["SCB"], scales), (shape, name)
            assert same(pack.unpack_int8_rowwise(ours), bnb.int8_vectorwise_dequant(levels, scales)), (shape, name)


@pytest.mark.parametrize(
    "packed,expected",
    [
        (lambda w: pack.unpack_nf4(pack.pack_nf4(w)), 0.0909),
        (lambda w: pack.unpack_nf4(pack.pack_nf4(w, quant_type="fp4")), 0.122),
        (lambda w: pack.unpack_int8_rowwise(pack.pack_int8_rowwise(w)), 0.0079),
    ],
)
def test_errors_of_gaussian_weights_are_the_known_ones(packed, expected):
    weight = gauss(256, 1024)
    assert pack.relative_rms(weight, packed(weight)) == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
def test_packing_needs_no_bitsandbytes():
    code = (
        "import sys, torch; from moeconv.plan.kernels import pack; w = torch.randn(8, 64);"
        "pack.unpack_nf4(pack.pack_nf4(w)); pack.pack_int8_rowwise(w); pack.pack_int(w, bits=4, group_size=32);"
        "assert not {'bitsandbytes', 'compressed_tensors', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ----------------------------------------------------------------------------------------------------------- errors


def test_nan_and_infinity_are_refused():
    for bad in (math.nan, math.inf, -math.inf):
        weight = gauss(4, 96)
        weight[3, 95] = bad
        for action in (
            lambda w: pack.pack_int(w, bits=4, group_size=32),
            lambda w: pack.pack_int(w, bits=8, group_size=None),
            lambda w: pack.pack_int(w, bits=4, group_size=32, fit=True),
            lambda w: pack.pack_nf4(w),
            lambda w: pack.pack_nf4(w, quant_type="fp4", block_size=128),
            lambda w: pack.pack_int8_rowwise(w),
        ):
            with pytest.raises(InputError, match="NaN or infinity"):
                action(weight)


def test_what_does_not_fit_is_refused():
    weight = gauss(4, 96)
    for action, words in (
        (lambda: pack.pack_int(weight, bits=5, group_size=32), "2, 3, 4, 8 bits"),
        (lambda: pack.pack_int(weight, bits=4, group_size=64), "does not divide"),
        (lambda: pack.pack_int(gauss(4, 20), bits=4, group_size=10), "whole 32-bit words"),
        (lambda: pack.pack_int(weight.view(2, 2, 96), bits=4, group_size=32), "not a matrix"),
        (lambda: pack.pack_int(weight.to(torch.int8), bits=4, group_size=32), "cannot be quantized"),
        (lambda: pack.pack_int(weight, bits=4, group_size=32, scales=torch.ones(4, 2)), "do not fit"),
        (lambda: pack.pack_nf4(weight, block_size=48), "no block size"),
        (lambda: pack.pack_nf4(weight, quant_type="int4"), "nf4 and fp4"),
        (lambda: pack.relative_rms(weight, weight[:2]), "shapes differ"),
    ):
        with pytest.raises(UsageError, match=words):
            action()


def test_damaged_4bit_states_are_refused():
    good = pack.pack_nf4(gauss(4, 96))
    key = "quant_state.bitsandbytes__nf4"

    def with_state(text: str) -> dict[str, torch.Tensor]:
        return {**good, key: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    fields = '"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 96]'
    assert same(pack.unpack_nf4(with_state("{" + fields + "}")), pack.unpack_nf4(good))
    for damaged in (
        {k: v for k, v in good.items() if k != "absmax"},
        {k: v for k, v in good.items() if k != key},
        {**good, "absmax": good["absmax"][:-1]},
        with_state("no json"),
        with_state("{}"),
        with_state("{" + fields.replace("64", "63") + "}"),
        with_state("{" + fields.replace("[4, 96]", "[4, -96]") + "}"),
        with_state("{" + fields.replace("[4, 96]", "[400, 96]") + "}"),
        with_state("{" + fields + ', "nested_blocksize": 256}'),
        with_state("{" + fields + ', "nested_blocksize": 64, "nested_dtype": "float32", "nested_offset": 0.5}'),
        with_state("{" + fields + ', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}'),
    ):
        with pytest.raises(InputError):
            pack.unpack_nf4(damaged)


def test_relative_rms():
    weight = gauss(100, 100)
    assert pack.relative_rms(weight, weight) == 0.0
    assert pack.relative_rms(weight, torch.zeros_like(weight)) == 1.0
    assert pack.relative_rms(torch.zeros(3), torch.zeros(3)) == 0.0
    assert pack.relative_rms(torch.zeros(3), torch.ones(3)) == math.inf
    other = gauss(100, 100, seed=1)
    expected = ((weight.double() - other.double()).norm() / weight.double().norm()).item()
    assert pack.relative_rms(weight, other) == pytest.approx(expected, rel=1e-12)
