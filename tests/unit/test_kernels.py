"""The numpy kernels: casts against exact arithmetic, draws that only their key decides, edits of chosen neurons."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from tiny import decode, encode

from moeconv.plan.kernels import _WHERE, draw, load_kernel
from moeconv.plan.kernels.arrays import all_finite, from_float, to_float32
from moeconv.plan.kernels.draw import choose_neurons
from moeconv.plan.plan import Input, TensorSpec
from moeconv.randomness import generator

FLOATS = ("F64", "F32", "F16", "BF16")
SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def run(
    kernel: str, data: list[tuple[bytes, str, tuple[int, ...]]], dtype: str, shape: tuple[int, ...], **params
) -> bytes:
    inputs = [(Input(f"x{i}", d, s, 0, len(raw)), bytearray(raw)) for i, (raw, d, s) in enumerate(data)]
    (made,) = load_kernel(kernel)(inputs, [TensorSpec("y", dtype, shape, "r", 0)], params)
    return bytes(made)


# -- arrays ------------------------------------------------------------------------------------------------------


def test_every_bfloat16_survives_the_way_to_float32_and_back():
    every = np.arange(1 << 16, dtype=np.uint16)
    values = to_float32(every.tobytes(), "BF16", (256, 256))
    assert values.shape == (256, 256) and values.dtype == np.float32
    back = np.frombuffer(from_float(values, "BF16"), np.uint16)
    nan = np.isnan(values).ravel()
    assert (back[~nan] == every[~nan]).all()
    assert np.isnan(to_float32(back[nan].tobytes(), "BF16", (nan.sum(),))).all()


def test_rounding_to_bfloat16_is_to_the_nearest_and_ties_to_even():
    rng = np.random.default_rng(0)
    low = rng.integers(0, 0x7F7F, 2000).astype(np.uint32)  # neighbours of the same sign, finite
    ends = [(n << np.uint32(16)).view(np.float32).astype(np.float64) for n in (low, low + np.uint32(1))]
    for share in (0.0, 0.25, 0.4999, 0.5, 0.5001, 0.75):
        between = ends[0] + (ends[1] - ends[0]) * share
        value = between.astype(np.float32)
        exact = value.astype(np.float64) == between
        distance = [np.abs(value.astype(np.float64) - e) for e in ends]
        nearest = np.where(distance[0] < distance[1], low, low + np.uint32(1))
        even = np.where(low % 2 == 0, low, low + np.uint32(1))
        expected = np.where(distance[0] == distance[1], even, nearest)
        for sign in (1, -1):
            bits = np.frombuffer(from_float(value * np.float32(sign), "BF16"), np.uint16) & 0x7FFF
            assert (bits == expected)[exact | (share != 0.5)].all(), share


def test_the_ends_of_the_range():
    values = np.array([np.inf, -np.inf, np.nan, -0.0, 3.4e38, 1e-45], np.float32)
    back = decode(bytes(from_float(values, "BF16")), "BF16", (6,))
    assert back[0] == np.inf and back[1] == -np.inf and np.isnan(back[2])
    assert back[3] == 0 and np.signbit(back[3]) and np.isinf(back[4]) and back[5] == 0
    sneaky = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)  # rounding these bits up leaves NaN's range
    assert np.isnan(decode(bytes(from_float(sneaky, "BF16")), "BF16", (2,))).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (0, 4)])
def test_bytes_to_array_and_back(dtype, shape):
    raw = encode(np.random.default_rng(1).standard_normal(shape).astype(np.float32), dtype)
    array = to_float32(raw, dtype, shape)
    assert array.shape == shape and array.dtype == (np.float64 if dtype == "F64" else np.float32)
    assert (array == decode(raw, dtype, shape)).all()
    assert bytes(from_float(array, dtype)) == raw


def test_an_array_is_a_copy_that_may_be_changed():
    for dtype in FLOATS:
        raw = bytearray(encode(np.ones(4, np.float32), dtype))
        to_float32(raw, dtype, (4,))[0] = 7
        assert raw == encode(np.ones(4, np.float32), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_one_bad_value_is_found_wherever_it_stands(dtype, bad):
    values = np.full(23, 60000.0, np.float32)
    assert all_finite(encode(values, dtype), dtype, block=5)
    for at in range(23):
        values[:] = 60000.0
        values[at] = bad
        assert not all_finite(encode(values, dtype), dtype, block=5)
    assert all_finite(b"", dtype)


# -- elementwise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_cast(source, target):
    values = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)
    raw = encode(values, source)
    made = run("cast", [(raw, source, (3, 4))], target, (3, 4))
    held = decode(raw, source, (3, 4))
    if target == "BF16":
        assert np.abs(decode(made, target, (3, 4)) - held).max() <= np.abs(held).max() / 256
    else:
        assert made == held.astype({"F64": "f8", "F32": "f4", "F16": "f2"}[target]).tobytes()


def test_cast_joins_rows():
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(3, dtype=np.float32).reshape(1, 3)
    made = run("cast", [(a.tobytes(), "F32", (2, 3)), (b.tobytes(), "F32", (1, 3))], "F64", (3, 3))
    assert (np.frombuffer(made, np.float64).reshape(3, 3) == np.concatenate([a, b])).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_fill(dtype):
    assert run("fill", [], dtype, (3, 2), value=0) == bytes(6 * SIZE[dtype])
    assert (decode(run("fill", [], dtype, (3, 2), value=1.5), dtype, (3, 2)) == 1.5).all()


# -- draws -------------------------------------------------------------------------------------------------------


def test_a_generator_is_its_key():
    keys = [
        [0, "router", 1],
        [0, "router", 2],
        [1, "router", 1],
        [0, "drop", 1],
        [0, "router", 1, 0],
        [0, "router", "1"],
    ]
    first = [generator(k).standard_normal(4).tobytes() for k in keys]
    assert len(set(first)) == len(keys)
    assert first == [generator(tuple(k)).standard_normal(4).tobytes() for k in keys]


def test_draws_are_the_same_on_every_machine():
    """Pinned: other bytes here would change every checkpoint that is written from the same plan."""
    made = run("draw_normal", [], "BF16", (8, 32), key=[0, "router", 0], std=0.02)
    assert hashlib.sha256(made).hexdigest().startswith(GOLDEN["router"])
    weight = encode(np.arange(-64, 64, dtype=np.float32).reshape(8, 16), "BF16")
    for kernel, params in (("add_noise", {"scale": 0.05}), ("redraw_neurons", {})):
        made = run(kernel, [(weight, "BF16", (8, 16))], "BF16", (8, 16), key=[0, "k"], neurons_key=[0], axis=0,
                   fraction=0.5, **params)  # fmt: skip
        assert hashlib.sha256(made).hexdigest().startswith(GOLDEN[kernel]), kernel


GOLDEN = {"router": "7b77f06fef274dab", "add_noise": "bb7786aa51365dc4", "redraw_neurons": "d187d8edbf75e981"}


def test_router_rows_have_the_asked_spread():
    drawn = decode(run("draw_normal", [], "F32", (64, 512), key=[3], std=0.02), "F32", (64, 512))
    assert abs(drawn.std() / 0.02 - 1) < 0.02 and abs(drawn.mean()) < 0.0005
    assert not decode(run("draw_normal", [], "F32", (4, 4), key=[3], std=0.0), "F32", (4, 4)).any()


def test_chosen_neurons():
    chosen = choose_neurons([1], 100, 0.3)
    assert len(chosen) == len(set(chosen)) == 30 and (np.diff(chosen) > 0).all()
    assert len(choose_neurons([1], 100, 0.0)) == 0 and (choose_neurons([1], 7, 1.0) == np.arange(7)).all()
    assert (choose_neurons([1], 100, 0.3) == chosen).all() and (choose_neurons([2], 100, 0.3) != chosen).any()


def edit(kernel: str, weight: np.ndarray, *, axis: int, fraction: float, dtype: str = "F32", **params) -> np.ndarray:
    params = {"key": [7, axis], "neurons_key": [7], "scale": 0.1, "axis": axis, "fraction": fraction} | params
    made = run(kernel, [(encode(weight, dtype), dtype, weight.shape)], dtype, weight.shape, **params)
    return decode(made, dtype, weight.shape)


WEIGHT = np.random.default_rng(5).normal(0.3, 2.0, (40, 60)).astype(np.float32)


@pytest.mark.parametrize("kernel", ["add_noise", "redraw_neurons"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_only_the_chosen_neurons_change(kernel, axis, fraction):
    made = edit(kernel, WEIGHT, axis=axis, fraction=fraction)
    changed = (made != WEIGHT).any(axis=1 - axis)
    assert np.flatnonzero(changed).tolist() == choose_neurons([7], WEIGHT.shape[axis], fraction).tolist()
    assert (made != WEIGHT).sum() >= 0.99 * round(fraction * WEIGHT.shape[axis]) * WEIGHT.shape[1 - axis]


@pytest.mark.parametrize("axis", [0, 1])
def test_noise_has_a_share_of_the_matrix_spread(axis):
    big = np.random.default_rng(6).normal(0, 3.0, (200, 200)).astype(np.float32)
    noise = edit("add_noise", big, axis=axis, fraction=1.0) - big
    assert abs(noise.std() / (0.1 * big.std()) - 1) < 0.03 and abs(noise.mean()) < 0.01


@pytest.mark.parametrize("axis", [0, 1])
def test_redrawn_neurons_have_the_mean_and_spread_of_those_they_replace(axis):
    big = np.random.default_rng(6).normal(0, 1.0, (200, 200)).astype(np.float32)
    chosen = choose_neurons([7], 200, 0.5)
    index = (chosen, slice(None)) if axis == 0 else (slice(None), chosen)
    big[index] = big[index] * 5 + 10  # unlike the rest
    drawn = edit("redraw_neurons", big, axis=axis, fraction=0.5)[index]
    assert abs(drawn.mean() - big[index].mean()) < 0.2 and abs(drawn.std() / big[index].std() - 1) < 0.03
    assert abs(np.corrcoef(drawn.ravel(), big[index].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("kernel", ["add_noise", "redraw_neurons"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_the_block_size_of_the_work_does_not_show(kernel, axis, dtype, monkeypatch):
    whole = edit(kernel, WEIGHT, axis=axis, fraction=0.5, dtype=dtype)
    for block in (1, 61, 350):
        monkeypatch.setattr(draw, "_BLOCK", block)
        assert (edit(kernel, WEIGHT, axis=axis, fraction=0.5, dtype=dtype) == whole).all(), block


@pytest.mark.parametrize("kernel", ["add_noise", "redraw_neurons"])
def test_an_edit_may_cast_and_leaves_its_input_alone(kernel):
    raw = encode(WEIGHT, "F32")
    data = bytearray(raw)
    (made,) = load_kernel(kernel)(
        [(Input("x", "F32", WEIGHT.shape, 0, len(raw)), data)], [TensorSpec("y", "BF16", WEIGHT.shape, "r", 0)],
        {"key": [7, 0], "neurons_key": [7], "axis": 0, "fraction": 0.5, "scale": 0.1},
    )  # fmt: skip
    assert data == raw and memoryview(made).nbytes == len(raw) // 2
    exact = edit(kernel, WEIGHT, axis=0, fraction=0.5)
    assert np.abs(decode(bytes(made), "BF16", WEIGHT.shape) - exact).max() <= np.abs(exact).max() / 256


def test_kernels_are_found_by_name():
    for name in _WHERE:
        assert callable(load_kernel(name))
    with pytest.raises(KeyError):
        load_kernel("copy")
