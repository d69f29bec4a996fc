"""Sources that come quantized: FP8 with block, row or tensor scales, MXFP4, GPTQ and AWQ. Decoded as their library does
it, cut by prune as they lie on disk, and quantized again only on request."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.plan.kernels.pack.floats import times, unpack_mxfp4, unpack_mxfp4_rows, widened
from moeconv.prune.planner import plan_prune
from moeconv.quantize.decode import plan_decode
from moeconv.stream.layers import LayerStream
from moeconv.tensors import decode_weight
from tests import tiny
from tests.contract.stock import MOE_CASES, load, logits, save_stock
from tests.stored_words import make_awq, make_gptq

torch.set_num_threads(1)
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
_CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        }
    },
}


def test_fp8_blocks_decode_as_transformers_does() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    for shape, block in (((256, 384), (128, 128)), ((64, 96), (64, 96)), ((64, 96), (32, 32))):
        codes = torch.randn(shape).to(torch.float8_e4m3fn)
        scales = torch.rand(shape[0] // block[0], shape[1] // block[1]) + 0.01
        for dtype in (torch.float32, torch.bfloat16):
            stock = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
            assert torch.equal(times(codes.float(), scales, block).to(dtype), stock)


def test_fp8_blocks_are_cut_off_at_the_edge() -> None:
    codes = torch.ones(576, 130)
    scales = torch.arange(10, dtype=torch.float32).reshape(5, 2)
    weight = times(codes, scales, (128, 128))
    assert weight[127, 0] == 0 and weight[128, 0] == 2 and weight[575, 129] == 9 and weight[0, 128] == 1
    with pytest.raises(ValueError, match="for blocks"):
        times(codes, torch.ones(400, 2), (128, 128))


def test_mxfp4_decodes_as_transformers_does() -> None:
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=draw)
    exponents = torch.randint(100, 140, (3, 8, 2), dtype=torch.uint8, generator=draw)
    stock = _convert_moe_packed_tensors(blocks.clone(), exponents.clone())
    assert torch.equal(unpack_mxfp4(blocks, exponents), stock.reshape(3, 64, 8) if stock.shape[1] == 64 else stock)


def test_every_code_of_four_bits_with_every_exponent() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).contiguous()
    exponents = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.bfloat16)
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(2)
    expected = torch.ldexp(values[nibbles.int()], exponents[..., None].int() - 127).flatten(1)
    found = unpack_mxfp4_rows(codes.flatten(1), exponents)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(unpack_mxfp4(codes[None], exponents[None])[0].T, found)


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_code_of_eight_bits(codes: torch.dtype, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(codes)
    for given in (every, every[1:], every.view(2, 128).T):
        found, expected = widened(given, dtype), given.to(dtype)
        assert found.shape == expected.shape and found.dtype == dtype
        assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def _rewrite(path: Path, change, quantization: dict) -> None:
    """Pass every tensor of a checkpoint through `change(name, tensor) -> {name: tensor}`; set quantization_config."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors |= change(name, tensor)
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    tiny.edit_json(path / "config.json", quantization_config=quantization)


def make_fp8(path: Path, case: str = "minimax_m2", *, channel: bool = False) -> Path:
    """A stock checkpoint with every projection in FP8, in 32 x 32 blocks or with a scale a row."""
    save_stock(path, *MOE_CASES[case], dtype=torch.bfloat16)

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not ("experts." in name or "_proj.weight" in name) or tensor.ndim != 2 or any(n % 32 for n in tensor.shape):
            return {name: tensor}
        if channel:
            scale = (tensor.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
            return {name: (tensor / scale).to(torch.float8_e4m3fn), name + "_scale": scale}
        rows, columns = (size // 32 for size in tensor.shape)
        blocks = tensor.float().reshape(rows, 32, columns, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        return {name: codes, name + "_scale_inv": scale}

    _rewrite(path, change, _CHANNEL if channel else _FP8 | {"weight_block_size": [32, 32]})
    return path


def make_mxfp4(path: Path) -> Path:
    """A stock gpt_oss checkpoint with random MXFP4 experts."""
    save_stock(path, *MOE_CASES["gpt_oss"], dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(0)

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        experts, width, out = tensor.shape
        blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8, generator=draw)
        exponents = torch.randint(120, 125, (experts, out, width // 32), dtype=torch.uint8, generator=draw)
        return {name + "_blocks": blocks, name + "_scales": exponents}

    _rewrite(path, change, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return path


MAKERS = {
    "fp8": make_fp8,
    "fp8-channel": lambda path: make_fp8(path, channel=True),
    "fp8-shared": lambda path: make_fp8(path, "deepseek_v3"),
    "mxfp4": make_mxfp4,
    "gptq": make_gptq,
    "awq": make_awq,
}


@pytest.fixture(params=list(MAKERS))
def stored(request, tmp_path: Path) -> Path:
    return MAKERS[request.param](tmp_path / "stored")


def test_inspect_knows_it(stored: Path, cli) -> None:
    found = cli("inspect", stored, "--json").json
    assert "expert" in found["quantization"]["roles"]
    assert (
        found["quantization"]["format"]
        == json.loads((stored / "config.json").read_text())["quantization_config"]["quant_method"]
    )
    plain = plan_decode(open_model(stored))
    assert found["parameters"]["total"] == plain.params_total


def test_it_streams_as_what_it_decodes_to(stored: Path, tmp_path: Path) -> None:
    source = open_model(stored)
    execute(plan_decode(source), source=source.checkpoint, out=tmp_path / "plain")
    plain = open_model(tmp_path / "plain")
    for name in plain.checkpoint.tensors:
        assert torch.equal(decode_weight(source, name, torch.bfloat16), decode_weight(plain, name, torch.bfloat16))
    ids = np.random.default_rng(0).integers(3, 128, (2, 16))
    both = []
    for model in (source, plain):
        stream = LayerStream(model, ids, dtype=torch.bfloat16, batch_size=2).run()
        both.append(torch.cat([out for _, out in stream.logits(batch_size=2)]))
    assert torch.equal(*both)
    stock = load(tmp_path / "plain", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(stock(torch.tensor(ids)).logits, both[0])


def test_prune_cuts_it_as_it_lies(stored: Path, tmp_path: Path, cli) -> None:
    """Pruning and decoding give the same bytes in either order."""
    kept = {layer: [1, 2, 4, 5] for layer in open_model(stored).moe_layers}
    source = open_model(stored)
    execute(plan_decode(source), source=source.checkpoint, out=tmp_path / "plain")
    for name, path in (("a", stored), ("b", tmp_path / "plain")):
        model = open_model(path)
        plan = plan_prune(model, keep=4, keep_experts=kept)
        execute(plan, source=model.checkpoint, out=tmp_path / name)
    pruned = open_model(tmp_path / "a")
    assert not [i for i in plan_prune(source, keep=4, keep_experts=kept).items() if i.kernel != "copy"]
    sizes = [sum(m.checkpoint.tensors[n].nbytes for n, r in m.roles.items() if r.group == "expert")
             for m in (source, pruned)]  # fmt: skip
    assert sizes[0] == 2 * sizes[1]
    execute(plan_decode(pruned), source=pruned.checkpoint, out=tmp_path / "c")
    assert torch.equal(logits(load(tmp_path / "c")), logits(load(tmp_path / "b")))
    assert cli("prune", stored, tmp_path / "d", "--keep", 4, "--json").code == 0
    assert cli("prune", stored, tmp_path / "e", "--keep", 4, "--dtype", "float16").code == 2


@pytest.mark.slow
def test_quantize_asks_before_it_decodes(tmp_path: Path, cli) -> None:
    source = make_fp8(tmp_path / "stored")
    refused = cli("quantize", source, tmp_path / "out", "--json")
    assert refused.code == 3 and "--requantize" in refused.json["error"]["hint"]
    promised = cli("quantize", source, tmp_path / "out", "--requantize", "--dry-run", "--json").json
    done = cli("quantize", source, tmp_path / "out", "--requantize", "--json")
    assert done.code == 0, done.out
    assert promised["bytes"] == done.json["bytes"]
    model = open_model(source)
    execute(plan_decode(model), source=model.checkpoint, out=tmp_path / "plain")
    assert cli("quantize", tmp_path / "plain", tmp_path / "out2", "--json").code == 0
    assert tiny.read_tensors(tmp_path / "out") == tiny.read_tensors(tmp_path / "out2")
    load(tmp_path / "out", dtype=torch.bfloat16)


def test_what_prune_refuses_of_a_quantized_source(tmp_path: Path) -> None:
    path = make_fp8(tmp_path / "stored")
    tiny.edit_json(
        path / "config.json",
        quantization_config=_FP8 | {"weight_block_size": [32, 32], "ignore": ["model.layers.0.mlp.experts.3.w1"]},
    )
    with pytest.raises(InputError, match="names an expert that has no tensor"):
        plan_prune(open_model(path), keep=4)
