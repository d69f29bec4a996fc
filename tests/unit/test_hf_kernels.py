"""What decodes 4-bit codes: bitsandbytes' kernel on CUDA, once it has given our bits there; our own code elsewhere."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from packed import load, make, tokens

from moeconv.hf import kernels
from moeconv.plan.kernels import pack

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def theirs(monkeypatch):
    """bitsandbytes' functions, where its CPU kernels are asked as those of CUDA are; `asked` counts the calls."""
    functional = pytest.importorskip("bitsandbytes.functional")
    asked: list[torch.dtype] = []
    decode = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda a, s: (asked.append(s.dtype), decode(a, s))[1])
    monkeypatch.setattr(kernels, "KERNELS_ON", {"cpu"})
    kernels.theirs.cache_clear()
    yield SimpleNamespace(functional=functional, asked=asked)
    kernels.theirs.cache_clear()


@pytest.mark.parametrize("block_size", (32, 64, 512))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("kind", ("nf4", "fp4"))
def test_their_kernel_gives_our_bits(theirs, kind, dtype, block_size):
    weight = torch.randn(96, 1024, generator=torch.Generator().manual_seed(3))
    parts = pack.pack_nf4(weight, quant_type=kind, block_size=block_size)
    kernels.theirs(CPU)
    theirs.asked.clear()
    found = kernels.decode_four(
        parts[""].view(-1), absmax=parts["absmax"], quant_map=parts["quant_map"], count=weight.numel(),
        block_size=block_size, dtype=dtype,
    )  # fmt: skip
    assert theirs.asked == [dtype]
    assert torch.equal(found.view(weight.shape), pack.unpack_nf4(parts, dtype=dtype))


def test_their_int8_decode_gives_our_bits():
    """There is nothing to gain: theirs are the same products of plain torch, in float32 for the whole weight."""
    functional = pytest.importorskip("bitsandbytes.functional")
    parts = pack.pack_int8_rowwise(torch.randn(64, 96, generator=torch.Generator().manual_seed(3)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        decoded = functional.int8_vectorwise_dequant(parts[""], parts["SCB"]).to(dtype)
        assert torch.equal(decoded, pack.unpack_int8_rowwise(parts, dtype=dtype))


@pytest.mark.parametrize("scheme", ("nf4", "fp4", "nf4-nested"))
def test_a_model_computes_the_same_with_their_kernel(theirs, scheme, tmp_path):
    packed, plain = make(tmp_path, "qwen3_moe", scheme)
    ids = tokens(2, 7)
    with torch.no_grad():
        found, expected = load(packed)(ids).logits, load(plain)(ids).logits
    assert theirs.asked.count(torch.bfloat16) > 2  # beyond the sample
    assert torch.equal(found, expected)


@pytest.mark.parametrize("change", ("another bit", "no kernel", "another version"))
def test_a_kernel_that_differs_or_fails_is_not_used(theirs, monkeypatch, change):
    original = theirs.functional.dequantize_4bit

    def decode(octets, state):
        if change == "no kernel":
            raise RuntimeError("no kernel image is available")
        if change == "another version":
            raise AttributeError("QuantState")
        values = original(octets, state).view(-1)
        values[5] = torch.nextafter(values[5], torch.tensor(9.0, dtype=values.dtype))
        return values

    monkeypatch.setattr(theirs.functional, "dequantize_4bit", decode)
    assert kernels.theirs(CPU) is None


def test_without_bitsandbytes_the_code_is_ours(theirs, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert kernels.theirs(CPU) is None


def test_on_a_cpu_bitsandbytes_is_not_asked():
    kernels.theirs.cache_clear()
    assert kernels.theirs(CPU) is None


def test_other_types_and_short_blocks_are_ours(theirs):
    kernels.theirs(CPU)
    theirs.asked.clear()
    table = torch.linspace(-1, 1, 16)
    octets = torch.arange(64, dtype=torch.uint8)
    scales = torch.ones(2)
    own = kernels.decode_four(
        octets, absmax=scales, quant_map=table, count=128, block_size=64, dtype=torch.float32
    )  # fmt: skip
    assert torch.equal(own[1::2], table[octets.int() & 15])
    assert kernels.type_of(table) is None
    table.copy_(pack.pack_nf4(torch.zeros(1, 64))["quant_map"])
    assert kernels.type_of(table) == "nf4"  # a change in place is seen
    kernels.decode_four(octets, absmax=scales, quant_map=table, count=100, block_size=64, dtype=torch.float32)
    assert not theirs.asked


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ("nf4", "fp4", "nf4-nested"))
def test_on_a_gpu_their_kernel_decodes_our_bits(scheme, device, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes.functional")
    assert kernels.theirs(device) is not None
    packed, plain = make(tmp_path, "qwen3_moe", scheme)
    ids = tokens(2, 7).to(device)
    ours, stock = load(packed).to(device), load(plain).to(device)
    with torch.no_grad():
        found = ours(ids).logits
        assert torch.equal(found, stock(ids).logits)
        monkeypatch.setattr(kernels, "theirs", lambda _device: None)
        assert torch.equal(found, ours(ids).logits)
