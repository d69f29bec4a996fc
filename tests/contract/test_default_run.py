"""What a check says to run, users can run: transformers' own kernels, in the dtype that was written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch

from moeconv.families.model import open_model
from moeconv.families.widths import why_not
from moeconv.plan.execute import execute
from moeconv.upcycle.planner import plan_upcycle
from moeconv.verify.default_run import streamed_problem
from moeconv.verify.load import load_strict
from moeconv.verify.run import verify
from tests.contract.stock import MOE_CASES, WRAPPED_CASES, row_of, save_stock

torch.set_num_threads(1)
STOCK = [case for case in MOE_CASES if case not in WRAPPED_CASES]
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def moe(tmp_path, case, width, dtype):
    row, (kind, config) = row_of(case), MOE_CASES[case]
    return save_stock(
        tmp_path / f"{width}{dtype}", kind, row.config.write(config, {row.experts.width: width}), dtype=dtype
    )


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("case", STOCK)
def test_the_rule_of_widths_is_what_the_kernels_take(tmp_path, case):
    path = moe(tmp_path, case, 36, torch.bfloat16)
    model = open_model(path)
    said = why_not(model.family, width=36, hidden=model.hidden_size, dtype="BF16")
    assert streamed_problem(model) == said
    assert (said is None) == (model.family.experts.implementation == "eager")


@pytest.mark.parametrize(("width", "dtype"), [(40, "BF16"), (40, "F16"), (36, "F16"), (36, "F32"), (34, "F32")])
def test_the_rule_follows_the_dtype(tmp_path, width, dtype):
    model = open_model(moe(tmp_path, "qwen3_moe", width, _DTYPES[dtype]))
    assert streamed_problem(model) == why_not(model.family, width=width, hidden=model.hidden_size, dtype=dtype)


def test_verify_runs_what_it_loads(tmp_path):
    bad, good = (moe(tmp_path, "mixtral", width, torch.bfloat16) for width in (36, 40))
    found = verify(str(bad), load=True)
    assert not found["ok"] and found["loads"]["transformers"] is False
    assert "does not run" in found["problems"][0] and "multiples of 8" in found["problems"][0]
    assert verify(str(good), load=True)["ok"]


def test_infinite_logits_are_a_problem(tmp_path):
    path = tiny.make_moe(tmp_path / "a", "mixtral", dtype="F16")
    tensors = tiny.read_tensors(path)
    dtype, shape, _ = tensors["model.norm.weight"]
    large = np.full(shape, 6e4, np.float32)
    tensors["model.norm.weight"] = (dtype, shape, tiny.encode(large, dtype))
    tiny.write_shards(path, tensors)
    assert "NaN or infinite" in str(streamed_problem(open_model(path)))
    assert any("NaN or infinite" in text for text in load_strict(path)["problems"])


@pytest.mark.parametrize(
    ("flags", "better"),
    [
        (("--shared-experts", "0.3", "--to", "qwen2_moe"), "--shared-experts 0.31 (width 88)"),
        (("--method", "granular", "--granularity", "32", "--experts", "32", "--top-k", "32"), "--granularity 16"),
        (("--method", "split", "--experts", "31", "--shared-experts", "1"), "--experts 15"),
    ],
)
def test_a_cut_that_no_kernel_takes_is_refused_with_the_nearest_that_run(tmp_path, cli, flags, better):
    source = tiny.make_dense(tmp_path / "dense", "llama", intermediate=128)
    done = cli("upcycle", source, tmp_path / "o", *flags, "--dry-run", "--json")
    assert done.code == 2
    error = done.json["error"]
    assert "multiples of 8" in error["message"] and better in error["hint"]
    named = error["hint"].partition(": ")[2].partition(" (width")[0].split()
    flag = named[0]
    again = list(flags)
    again[again.index(flag) + 1] = named[1]
    if "granular" in again:
        again[-3] = again[-1] = named[1]
    assert cli("upcycle", source, tmp_path / "o", *again, "--dry-run", "--json").code == 0


@pytest.mark.slow
def test_widths_of_the_source_are_taken_with_a_warning(tmp_path, cli):
    source = tiny.make_dense(tmp_path / "dense", "llama", intermediate=60)
    done = cli("upcycle", source, tmp_path / "o", "--json")
    assert done.code == 0, done.out
    assert any("eager" in text for text in done.json["warnings"])
    assert "multiples of 8" in done.json["upcycle"]["equivalence"]["default_run"]


@pytest.mark.slow
def test_a_source_that_does_not_run_is_named_as_such(tmp_path, cli):
    """hidden_act is a word that only transformers looks up."""
    source = tiny.make_dense(tmp_path / "dense", "llama", hidden_act="squiggle")
    done = cli("upcycle", source, tmp_path / "o", "--to", "mixtral", "--json")
    assert done.code == 3 and not (tmp_path / "o").exists()
    assert "the source itself does not run in transformers" in done.json["error"]["message"]
    assert "squiggle" in json.dumps(done.json)


@pytest.mark.slow
def test_a_large_conversion_finds_a_source_that_does_not_run_before_it_writes(tmp_path, cli, monkeypatch):
    from moeconv.runner import run
    from moeconv.upcycle.check import step

    written = []
    monkeypatch.setattr(run, "execute", lambda *_, **__: written.append(1))
    monkeypatch.setattr(step, "LONG", 0)  # as if the result were large
    source = tiny.make_dense(tmp_path / "dense", "llama", hidden_act="squiggle")
    done = cli("upcycle", source, tmp_path / "o", "--to", "mixtral", "--json")
    assert done.code == 3 and "squiggle" in done.json["error"]["message"] and not written
    assert "the source itself does not run in transformers" in done.json["error"]["message"]
    plan = plan_upcycle(open_model(tiny.make_dense(tmp_path / "good", "llama")), experts=4)
    step.check_source(open_model(tmp_path / "good"), plan)  # raises nothing
    small = tiny.make_dense(tmp_path / "again", "llama", hidden_act="squiggle")
    monkeypatch.setattr(step, "LONG", 1 << 30)
    step.check_source(open_model(small), plan)  # nothing is asked of what is written in seconds


def test_a_duplicate_runs_by_default(tmp_path):
    source = tiny.make_moe(tmp_path / "a", "mixtral")
    plan = plan_upcycle(open_model(source), experts=8)
    execute(plan, source=open_model(source).checkpoint, out=tmp_path / "b")
    assert streamed_problem(open_model(tmp_path / "b")) is None
