"""Contract: more experts with the same top-k. What is exact is exact, and what is not has a bound that is checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moeconv.families.model import open_model
from moeconv.families.rule import Rule, route
from moeconv.plan.execute import execute
from moeconv.plan.kernels.arrays import to_float32
from moeconv.upcycle.check.compare import equivalence
from moeconv.upcycle.counterpart import counterpart
from moeconv.upcycle.kept_top_k import by_utility
from moeconv.upcycle.planner import plan_upcycle
from tests.contract.stock import (
    MOE_CASES,
    load,
    logits,
    relative_difference,
    save_stock,
    skip_where_stock_is_broken,
)

torch.set_num_threads(1)
DEMO = Path(__file__).parents[2] / "moeconv" / "demo_data"


# cases whose source the check of an upcycle cannot run by itself
_UNCHECKED = {"qwen4_exp", "qwen4_exp-vision", "mistral_large4", "aria"}


def _uneven(model):
    """Copies by a utility that differs by layer: the last expert of each group is the most useful."""
    experts = 2 * model.num_experts
    return {
        layer: by_utility(model, experts, [(e + layer) % model.num_experts + 0.5 for e in range(model.num_experts)])
        for layer in model.moe_layers
    }


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("case", list(MOE_CASES))
def test_copies_compute_what_their_originals_do(tmp_path, case):
    """Strict load, and with the source's choices replayed by the copies, the logits are the source's in float64."""
    skip_where_stock_is_broken(case)
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    model = open_model(source)
    plan = plan_upcycle(model, keep_top_k=True, copies=_uneven(model), copy_scale=0.5)
    execute(plan, source=model.checkpoint, out=tmp_path / "more", jobs=1)
    assert plan.changed == plan.promise
    assert (plan.block["num_experts"], plan.block["top_k"]) == (2 * model.num_experts, model.top_k)
    if case in _UNCHECKED:
        assert torch.isfinite(logits(load(tmp_path / "more"))).all()
        return
    exact = counterpart(plan)
    against = {"counterpart": exact.to_json(), "siblings": [], "partition": None}
    found = equivalence(source, tmp_path / "more", tokens=32, against=against)
    assert found["strict_load"] and found["default_run"] is None
    assert found["counterpart"]["relative"] <= 1e-5 and found["counterpart"]["difference"] is None


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    ("case", "scale"),
    [("glm4_moe", 0.0), ("dots1", 0.0), ("deepseek_v3", 0.0), ("minimax_m2", 0.0), ("llama4", 1.0), ("llama4", None)],
)
def test_what_is_promised_exact_is_exact(tmp_path, case, scale):
    """A correction bias keeps copies out, also where the router chooses groups; with top-1 any copy is the same."""
    model_type, config = MOE_CASES[case]
    top_1 = {"num_experts_per_tok": 1} if case == "llama4" else {}
    source = save_stock(tmp_path / "moe", model_type, config | top_1, dtype=torch.float32)
    model = open_model(source)
    plan = plan_upcycle(model, keep_top_k=True, copies=_uneven(model), copy_scale=scale)
    execute(plan, source=model.checkpoint, out=tmp_path / "more", jobs=1)
    assert plan.block["exact"]
    assert relative_difference(logits(load(source)), logits(load(tmp_path / "more"))) <= 1e-5


_TOP_1 = {"num_experts_per_tok": 1, "moe_k": 1, "topk_group": 1}


def _top_1(tmp_path, case, *, uneven):
    """(the plan of twice the experts of a case with top-1, the relative difference of its logits)"""
    model_type, config = MOE_CASES[case]
    known = {key: value for key, value in _TOP_1.items() if key in config}
    source = save_stock(tmp_path / "moe", model_type, config | known, dtype=torch.float32)
    model = open_model(source)
    plan = plan_upcycle(model, keep_top_k=True, copy_scale=1.0, copies=_uneven(model) if uneven else None)
    execute(plan, source=model.checkpoint, out=tmp_path / "more", jobs=1)
    return plan, relative_difference(logits(load(source)), logits(load(tmp_path / "more")))


def test_a_bias_on_softmax_scores_gets_smaller_as_the_scores_do(tmp_path):
    plan, difference = _top_1(tmp_path, "ernie4_5_moe", uneven=False)
    assert plan.block["exact"] and difference <= 1e-5


@pytest.mark.parametrize(
    ("case", "words"), [("deepseek_v3", "the choice of groups"), ("ernie4_5_moe", "its share of the softmax")]
)
def test_a_choice_that_copies_change_is_not_called_exact(tmp_path, case, words):
    """Groups that are chosen by the sum of their two best scores; softmax scores with a bias, and unequal copies."""
    plan, difference = _top_1(tmp_path, case, uneven=True)
    assert not plan.block["exact"] and any(words in text for text in plan.warnings)
    assert difference > 1e-3, "it is indeed not exact"


def test_the_default_scale_of_top_1_depends_on_the_choice(tmp_path):
    for case, scale in [("mixtral", 1.0), ("deepseek_v3", 0.5)]:
        model_type, config = MOE_CASES[case]
        known = {key: value for key, value in _TOP_1.items() if key in config}
        model = open_model(save_stock(tmp_path / case, model_type, config | known, dtype=torch.float32))
        assert plan_upcycle(model, keep_top_k=True).block["copy_scale"] == scale


@pytest.mark.parametrize("scale", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid"])
def test_a_token_without_a_copy_among_its_best_computes_what_it_did(tmp_path, scale, score):
    """In float64, with the rows that are written: where no copy is above the k-th best of the old experts, the choice
    and the weights are the old ones, for the rules that renormalise or score each expert alone."""
    source = save_stock(tmp_path / "moe", *MOE_CASES["mixtral"], dtype=torch.float32)
    model = open_model(source)
    plan = plan_upcycle(model, keep_top_k=True, copy_scale=scale, experts=3 * model.num_experts)
    execute(plan, source=model.checkpoint, out=tmp_path / "more", jobs=1)
    name = model.router_name(0)
    old, new = (
        to_float32(m.checkpoint.read(name), "F32", m.checkpoint.tensors[name].shape).astype(np.float64)
        for m in (model, open_model(tmp_path / "more"))
    )
    assert np.array_equal(new[::3], old), "the originals keep their rows"
    x = np.random.default_rng(0).standard_normal((4096, old.shape[1]))
    experts, k = len(old), 2
    rule = Rule(score, score == "softmax", k)
    before, after = x @ old.T, x @ new.T
    above = before - before.mean(1, keepdims=True)
    assert np.allclose(after[:, 1::3], before.mean(1, keepdims=True) + scale * above, atol=1e-5)
    assert np.allclose(after[:, 2::3], before.mean(1, keepdims=True) + scale**2 * above, atol=1e-5)
    best = np.sort(above, 1)[:, ::-1]
    same = scale * best[:, 0] < best[:, k - 1] - 1e-5
    assert scale == 0.9 or same.mean() > 0.1
    chosen, weights = route(rule, before, np.ones(experts, bool), bias=np.zeros(experts))
    again, found = route(rule, after, np.ones(3 * experts, bool), bias=np.zeros(3 * experts))
    order, other = np.argsort(chosen, 1), np.argsort(again, 1)
    assert (again[same] % 3 == 0).all()
    assert np.array_equal(np.take_along_axis(chosen, order, 1)[same], np.take_along_axis(again, other, 1)[same] // 3)
    gap = np.take_along_axis(weights, order, 1)[same] - np.take_along_axis(found, other, 1)[same]
    assert np.abs(gap).max() < 1e-12


def test_useful_experts_get_more_copies(tmp_path):
    model = open_model(save_stock(tmp_path / "moe", *MOE_CASES["mixtral"], dtype=torch.float32))
    experts = model.num_experts
    assert by_utility(model, 2 * experts, [1.0] * experts) == [2] * experts
    assert by_utility(model, experts + 3, [9.0] + [1.0] * (experts - 1)) == [4] + [1] * (experts - 1)
    assert by_utility(model, experts + 2, [0.0] * (experts - 1) + [1.0]) == [1] * (experts - 1) + [3]


@pytest.mark.slow
def test_the_command_measures_what_it_changes(tmp_path, cli):
    source = tmp_path / "moe"
    assert cli("upcycle", DEMO / "model", source, "--method", "drop", "--router-std", 0.5, "--no-check").code == 0
    text = DEMO / "heldout.txt"
    words = ("--keep-top-k", "--data", text, "--tokens", 1024, "--seq-len", 64, "--json")
    dry = cli("upcycle", source, tmp_path / "more", *words, "--dry-run")
    done = cli("upcycle", source, tmp_path / "more", *words)
    assert done.code == 0, done.out
    assert done.json["bytes"] == dry.json["bytes"] and done.json["changed"] == dry.json["changed"]
    block = done.json["upcycle"]
    assert not block["exact"] and any("not exact" in text for text in done.json["warnings"])
    found = block["measured"]
    assert found["loss_increase"] == found["loss"] - found["reference_loss"] and 0 < found["new_share"] < 1
    assert any(set(counts) != {2} for counts in block["copies_of"].values()), "by utility"
    assert "nats per token" in (tmp_path / "more" / "README.md").read_text()
    assert cli("calibrate", source, tmp_path / "stats", "--data", text, "--tokens", 1024, "--seq-len", 64).code == 0
    words = ("upcycle", source, tmp_path / "again", "--keep-top-k", "--stats", tmp_path / "stats", "--json")
    dry, again = cli(*words, "--dry-run"), cli(*words)
    assert dry.json["upcycle"]["copies_of"] == block["copies_of"]
    assert again.json["upcycle"]["copies_of"] == block["copies_of"] and "measured" not in again.json["upcycle"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--keep-top-k", "--top-k", 2), "exclude each other"),
        (("--keep-top-k", "--experts", 8), "must be more than the source's"),
        (("--keep-top-k", "--experts", 1 << 26), "must be at most"),
        (("--experts", 1 << 26), "must be at most"),
        (("--keep-top-k", "--router-std", 0.5), "is for dense sources"),
        (("--keep-top-k", "--ffn-only"), "is for LoRA adapters"),
        (("--keep-top-k", "--experts", 12), "Pass --stats or --data to decide"),
        (("--keep-top-k", "--copy-scale", 2), "must be from 0 to 1"),
        (("--keep-top-k", "--method", "drop"), "can only be copied"),
        (("--copy-scale", 0.5), "goes with --keep-top-k"),
    ],
)
def test_what_cannot_be_done_is_a_usage_error(tmp_path, cli, flags, words):
    source = save_stock(tmp_path / "moe", *MOE_CASES["mixtral"], dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "more", *flags, "--json")
    error = done.json["error"]
    assert (done.code, words in f"{error['message']} {error['hint']}") == (2, True), done.out


def test_a_dense_source_has_no_experts_to_copy(tmp_path, cli):
    from tests.contract.stock import DENSE_CASES

    source = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "more", "--keep-top-k", "--json")
    assert (done.code, "gives a Mixture-of-Experts more experts" in done.json["error"]["message"]) == (2, True), (
        done.out
    )
