"""Two processes choose the weights that one chooses: codes by data, refitted and healed experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from distributed.launch import launch
from words import add_tokenizer, text

# groups of two experts, as large models have several groups
TWO_EXPERTS = """
import sys
from moeconv.cli.app import run
from moeconv.quantize.gptq import need
need.ROWS_PER_CALL = 128
sys.exit(run(sys.argv[1:]))
"""
COMMON = ("--seq-len", 16, "--batch-size", 4, "--json")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Experts of 32 neurons and decided routers, with a dense first layer."""
    path = tiny.make_moe(
        tmp_path / "model", "qwen3_moe", experts=6, dtype="F32", layers=3, norm_topk_prob=True, mlp_only_layers=[0],
        moe_intermediate_size=32,
    )  # fmt: skip
    tensors = tiny.read_tensors(path)
    for name, (dtype, shape, data) in tensors.items():
        if len(shape) == 2 and "norm" not in name:
            tensors[name] = (dtype, shape, tiny.encode(tiny.decode(data, dtype, shape) * 6, dtype))
    tiny.write_shards(path, tensors)
    (tmp_path / "text").write_text(text(6000, seed=1))
    return add_tokenizer(path)


def both(verb: str, model: Path, folder: Path, *flags: object) -> tuple[Any, Any]:
    """The JSON of a command run by one process into `one`, and by two into `two`."""
    data = ("--data", folder / "text", "--tokens", 4096, *COMMON)
    (one,) = launch("-c", TWO_EXPERTS, verb, model, folder / "one", *flags, *data, processes=1)
    done = launch("-c", TWO_EXPERTS, verb, model, folder / "two", *flags, *data)
    assert one.code == 0, one.err
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    assert (done[1].out, done[1].err) == ("", ""), "the first process alone prints"
    return one.json, json.loads(done[0].out)


def tensors(path: Path) -> dict[str, bytes]:
    return {name: data for name, (_, _, data) in tiny.read_tensors(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "auto"])
def test_two_processes_choose_the_codes_of_one(model: Path, tmp_path: Path, method: str) -> None:
    one, two = both("quantize", model, tmp_path, "--scheme", "int4", "--group-size", 32, "--method", method)
    rows = [found["quantize"]["error"]["output"]["layers"] for found in (one, two)]
    assert [row["method"] for row in rows[0]] == [row["method"] for row in rows[1]] != ["rtn", "rtn"]
    for a, b in zip(*rows):
        assert b["output_rms"] == pytest.approx(a["output_rms"], rel=1e-6)
    a, b = (tensors(tmp_path / name) for name in ("one", "two"))
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--refit",), ("--heal", 20, "--sequential")], ids=str)
def test_two_processes_refit_and_heal_the_experts_of_one(
    model: Path, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    """Windows that do not fill whole batches for both; the sums over tokens are in another order."""
    one, two = both("prune", model, tmp_path, "--keep", 4, *flags)
    assert one["prune"]["keep"] == two["prune"]["keep"]
    repairs = [name for name in ("refit", "heal") if f"--{name}" in flags]
    for name in repairs:
        rows = list(zip(one["prune"][name]["layers"], two["prune"][name]["layers"], strict=True))
        assert any(a["kept"] for a, _ in rows) and all(b == pytest.approx(a, rel=1e-3) for a, b in rows)
    a, b = (tiny.read_tensors(tmp_path / name) for name in ("one", "two"))
    assert a.keys() == b.keys()
    plain = tiny.read_tensors(model)
    for name, (dtype, shape, data) in a.items():
        x, y = tiny.decode(data, dtype, shape), tiny.decode(b[name][2], dtype, shape)
        assert np.abs(x - y).max() < 1e-3 * np.abs(x).max(), name
        if "attn" in name or "embed" in name:
            assert data == plain[name][2]


@pytest.mark.slow
def test_what_one_process_does_is_refused_by_several(model: Path, tmp_path: Path) -> None:
    for verb, flags in (("prune", ("--keep", 4, "--criterion", "magnitude")), ("quantize", ("--scheme", "int4"))):
        done = launch("-m", "moeconv", verb, model, tmp_path / "out", *flags)
        assert [d.code for d in done] == [2, 2] and "runs in one process" in done[0].err, done
