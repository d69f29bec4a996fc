"""The check of a staged upcycle has power: whatever is damaged beside the drawn values fails, for every method."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from moeconv.errors import CheckError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.upcycle.check import compare as child
from moeconv.upcycle.check import step
from moeconv.upcycle.methods import METHODS
from moeconv.upcycle.planner import origins_of, plan_upcycle
from tests.contract.stock import DENSE_CASES, save_stock, skip_where_stock_is_broken

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The child's work without a process for each: it would spend its time on imports."""

    def run(command, *, input, **_):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(input))
            child.main(command[3:])
        return SimpleNamespace(stdout=out.getvalue(), stderr="", returncode=0)

    monkeypatch.setattr(step.subprocess, "run", run)


class Made:
    """An upcycle, and what the check says of it."""

    partition: Path | None = None

    def __init__(self, folder: Path, source: Path, siblings: tuple[Path, ...] = (), **parameters):
        self.model, self.out = open_model(source), folder / "moe"
        self.siblings = [open_model(path) for path in siblings]
        self.plan = plan_upcycle(self.model, siblings=self.siblings, **parameters)
        execute(self.plan, source=self.model.checkpoint, out=self.out, origins=origins_of(self.siblings))

    def check(self, path: Path | None = None):
        given = {"siblings": self.siblings, "partition": self.partition}
        return step.equivalence(self.model, path or self.out, self.plan, **given)["equivalence"]

    def damaged(self, change):
        """A copy that `change` was let loose on."""
        bad = self.out.with_name("bad")
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(self.out, bad)
        (bad / "moeconv_manifest.json").unlink()
        change(bad)
        return bad

    def assert_fails(self, change, *words):
        with pytest.raises(CheckError) as caught:
            self.check(self.damaged(change))
        assert not words or any(word in caught.value.message for word in words), caught.value.message


def scaled(name, factor):
    def change(path):
        tensors = tiny.read_tensors(path)
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, tiny.encode(tiny.decode(data, dtype, shape) * np.float32(factor), dtype))
        tiny.write_shards(path, tensors)

    return change


def config(**said):
    return lambda path: tiny.edit_json(path / "config.json", **said)


# every method of the registry; those that measure a partition have tests of their own (test_upcycle_split.py)
MADE = sorted(name for name, method in METHODS.items() if not method.partition)
METHOD_CASES = {  # options beside the defaults
    "granular": {"granularity": 4, "experts": 8, "top_k": 4},
    "shuffle": {"granularity": 2, "experts": 8, "top_k": 3},
}
BESIDE = (
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.embed_tokens.weight",
)


@pytest.fixture(scope="module", params=[*MADE, "bfloat16"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bounds")
    source = tiny.make_dense(folder / "dense", "llama", dtype="F32")
    method = request.param
    if method == "bfloat16":  # inexact by rounding alone
        return Made(folder, source, dtype="bfloat16")
    siblings = (source, tiny.make_dense(folder / "b", "llama", dtype="F32", seed=1)) * (
        METHODS[method].siblings == "must"
    )
    return Made(folder, source, siblings, method=method, **METHOD_CASES.get(method, {}))


@pytest.mark.slow(keep=3)
def test_what_was_written_passes(made):
    found = made.check()
    assert (found.get("counterpart") is None) == made.plan.block["exact"]
    assert found["default_run"] is None
    if exact := found.get("counterpart"):
        assert exact["relative"] <= 1e-5 and exact["difference"] is None
        assert found["relative"] > 1e-4


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("name", BESIDE)
def test_a_damaged_tensor_beside_the_experts_fails(made, name):
    made.assert_fails(scaled(name, 1.05), name, "differs from its source")


@pytest.mark.parametrize("said", [{"rope_theta": 500.0}, {"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}])
def test_a_damaged_config_fails(made, said):
    if "rope_theta" in said and "rope_parameters" in made.plan.config:
        said = {"rope_parameters": {**made.plan.config["rope_parameters"], **said}}
    made.assert_fails(config(**said), "differs from its source")


def test_damaged_experts_fail(made):
    name = next(n for n, r in open_model(made.out).roles.items() if r.key == "expert.down" and r.expert == 1)
    made.assert_fails(scaled(name, 1.3), name, "differs from its source")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "target"), [("gemma", "mixtral"), ("granite", "mixtral"), ("olmo", "mixtral"), ("minicpm3", "deepseek_v3")]
)
def test_a_pair_that_rounds_has_a_bound(tmp_path, case, target):
    """Folds in bfloat16: not exact by design, and yet no other model than its source's, rounded."""
    source = save_stock(tmp_path / "dense", *DENSE_CASES[case], dtype=torch.bfloat16)
    made = Made(tmp_path, source, to=target, experts=2)
    assert not made.plan.block["exact"]
    assert made.check()["counterpart"]["relative"] <= 1e-5
    names = {r.key: n for n, r in open_model(made.out).roles.items()}
    for key in ("norm.final", "embedding.tokens", "attention.o"):
        made.assert_fails(scaled(names[key], 1.02), names[key])


def test_more_experts_at_another_top_k_have_a_bound(tmp_path):
    source = tiny.make_moe(tmp_path / "moe0", "mixtral", dtype="F32")
    made = Made(tmp_path, source, experts=8, top_k=3)
    assert made.check()["counterpart"]["relative"] <= 1e-5
    made.assert_fails(scaled("lm_head.weight", 1.05), "lm_head")
    made.assert_fails(config(rms_norm_eps=0.1), "differs from its source")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [("llama", torch.float32), ("granite", torch.bfloat16)])
def test_a_split_has_a_bound(tmp_path, case, dtype):
    """All pieces of the one FFN, forced on, are the source; so no piece may be lost, doubled or changed."""
    from tests.contract.test_upcycle_split import convert

    source = save_stock(tmp_path / "dense", *DENSE_CASES[case], dtype=dtype)
    target = {"llama": "qwen2_moe", "granite": "granitemoeshared"}[case]
    skip_where_stock_is_broken(target)
    plan, partition = convert(source, tmp_path / "split", experts=5, shared_experts="1", top_k=2, to=target)
    made = Made.__new__(Made)
    made.model, made.out, made.plan = open_model(source), tmp_path / "split" / "moe", plan
    made.siblings, made.partition = [], partition.file.path
    assert made.check()["counterpart"]["relative"] <= 1e-5
    names = {r.key: n for n, r in open_model(made.out).roles.items()}
    for key in ("norm.final", "attention.q", "shared.down" if "shared.down" in names else "router.weight"):
        made.assert_fails(scaled(names[key], 1.05), names[key], "differs from its source")
    made.assert_fails(config(rms_norm_eps=0.1), "differs from its source")
