"""--format mxfp4: gpt-oss in the layout that it is published in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.plan.kernels.pack.floats import unpack_mxfp4
from moeconv.quantize.decode import plan_decode
from moeconv.quantize.gpt_oss import GPT_OSS
from moeconv.quantize.targets import loads_of
from moeconv.tensors import decode_weight, read_tensor
from tests.contract.stock import MOE_CASES, load, row_of, save_stock
from tests.contract.test_multimodal import _rewrite, _tensors
from tests.unit.test_stored_floats import make_mxfp4

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = ("--format", "mxfp4")


def full(source: Path) -> Path:
    """The MXFP4 checkpoint with a code of 6 in every block, as an encoder leaves it that uses all of its range."""
    tensors = _tensors(source)
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            tensor[..., 0] = 0x7 | (tensor[..., 0] & 0xF0)
    _rewrite(source, tensors)
    return source


def decoded(source: Path, out: Path) -> Path:
    model = open_model(source)
    execute(plan_decode(model), source=model.checkpoint, out=out)
    return out


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save_stock(tmp_path / "plain", *MOE_CASES["gpt_oss"], dtype=torch.bfloat16)


def test_transformers_loads_what_it_decodes_to(tmp_path: Path, cli: Any, plain: Path) -> None:
    promised = cli("quantize", plain, tmp_path / "out", *FLAGS, "--dry-run", "--json").json
    done = cli("quantize", plain, tmp_path / "out", *FLAGS, "--json")
    assert done.code == 0 and done.json["bytes"] == promised["bytes"], done.out
    assert done.json["quantize"]["loads"]["transformers"] == "dequantized"
    assert 0.05 < done.json["quantize"]["error"]["relative_rms"]["max"] < 0.2
    assert cli("verify", tmp_path / "out", "--load").code == 0
    before, after = open_model(plain), open_model(tmp_path / "out")
    for name in (n for n, role in before.roles.items() if role.key in ("expert.gate_up", "expert.down")):
        experts, width, out = before.checkpoint.tensors[name].shape
        blocks, scales = (read_tensor(after.checkpoint, name + end) for end in ("_blocks", "_scales"))
        assert blocks.shape == (experts, out, width // 32, 16) and scales.shape == blocks.shape[:-1]
        wanted, found = read_tensor(before.checkpoint, name).float(), unpack_mxfp4(blocks, scales).float()
        assert all(float((f - w).norm() / w.norm()) < 0.2 for f, w in zip(found, wanted)), "another expert's, or turned"
        assert torch.equal(decode_weight(after, name).float(), found)
    rest = {n for n, r in before.roles.items() if r.key not in ("expert.gate_up", "expert.down")}
    assert any(name.endswith("_bias") for name in rest)
    assert all(before.checkpoint.read(name) == after.checkpoint.read(name) for name in rest)
    ids = torch.randint(0, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    flat = load(decoded(tmp_path / "out", tmp_path / "flat"), dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out", dtype=torch.bfloat16)(ids).logits, flat(ids).logits)


def test_weights_that_came_from_mxfp4_have_the_same_blocks_again(tmp_path: Path, cli: Any) -> None:
    source = full(make_mxfp4(tmp_path / "source"))
    flat = decoded(source, tmp_path / "flat")
    assert cli("quantize", flat, tmp_path / "two", *FLAGS).code == 0
    assert cli("quantize", source, tmp_path / "one", "--requantize", *FLAGS).code == 0
    for out in ("one", "two"):
        assert tiny.read_tensors(tmp_path / out) == tiny.read_tensors(source)
    assert open_model(tmp_path / "two").quantization == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    }  # fmt: skip


def test_other_codes_for_the_same_numbers_decode_to_them(tmp_path: Path, cli: Any) -> None:
    """A block without a large code, and one of zeros, have several pairs of codes and exponent. Those of a source that
    is in MXFP4 pass untouched."""
    source = make_mxfp4(tmp_path / "source")
    tensors = _tensors(source)
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            tensor[:, :8] &= 0x33  # codes up to 1.5
            tensor[:, 8:16] = 0
    _rewrite(source, tensors)
    flat = decoded(source, tmp_path / "flat")
    done = cli("quantize", source, tmp_path / "same", "--requantize", *FLAGS, "--json")
    assert done.code == 0 and done.json["quantize"]["error"]["relative_rms"]["max"] == 0, done.out
    assert tiny.read_tensors(tmp_path / "same") == tiny.read_tensors(source)
    assert cli("quantize", flat, tmp_path / "out", *FLAGS).code == 0
    assert tiny.read_tensors(decoded(tmp_path / "out", tmp_path / "again")) == tiny.read_tensors(flat)


def test_it_is_pruned_as_it_lies(tmp_path: Path, cli: Any, plain: Path) -> None:
    assert cli("quantize", plain, tmp_path / "out", *FLAGS).code == 0
    done = cli("prune", tmp_path / "out", tmp_path / "cut", "--keep", 4, "--criterion", "magnitude", "--json")
    assert done.code == 0, done.out
    load(tmp_path / "cut", dtype=torch.bfloat16)


def test_only_gpt_oss_and_only_its_experts(tmp_path: Path, cli: Any, plain: Path) -> None:
    other = save_stock(tmp_path / "other", *MOE_CASES["granitemoe"], dtype=torch.bfloat16)
    refused = cli("quantize", other, tmp_path / "out", *FLAGS, "--dry-run", "--json")
    assert refused.code == 3 and "no class of transformers reads a granitemoe" in refused.json["error"]["message"]
    refused = cli("quantize", plain, tmp_path / "out", *FLAGS, "--scope", "all-linear", "--dry-run", "--json")
    assert refused.code == 3 and "--scope experts" in refused.json["error"]["hint"]


def test_what_no_engine_loads_is_refused_with_the_reason(tmp_path: Path, cli: Any, plain: Path) -> None:
    refused = cli("quantize", plain, tmp_path / "out", "--format", "compressed-tensors", "--dry-run", "--json")
    assert refused.code == 3 and "silently skips tensors with any other name" in refused.json["error"]["message"]
    assert "--format mxfp4" in refused.json["error"]["hint"]


def test_the_engines_that_read_the_published_layout_are_not_ruled_out() -> None:
    assert "no" not in loads_of(GPT_OSS, "mxfp4", row_of("gpt_oss")).values()
