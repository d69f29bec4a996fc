"""Contract: a Mixture-of-Experts with every expert copied computes what it did before."""

from __future__ import annotations

import pytest
import torch

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.upcycle.planner import plan_upcycle
from tests.contract.stock import DENSE_CASES, MOE_CASES, load, logits, relative_difference, save_stock

torch.set_num_threads(1)
_MADE = ["glm4_moe", "granitemoe", "gpt_oss", "ernie4_5_moe", "aria_text"]


def _double(source, out, **parameters):
    model = open_model(source)
    plan = plan_upcycle(model, **parameters)
    execute(plan, source=model.checkpoint, out=out, jobs=1)
    assert plan.changed == plan.promise
    return plan, relative_difference(logits(load(source)), logits(load(out)))


# cases whose routers cannot tell copies from experts, by a word of the refusal
_REFUSED = {
    "axk1": "groups", "axk2-groups": "groups", "deepseek_v3": "groups", "deepseek_v32": "groups",
    "dots3_note_text": "groups", "exaone_moe": "groups", "glm4_moe": "groups",
    "glm4_moe_lite": "groups", "llama4": "sigmoid", "phimoe": "unequal", "glm4v_moe": "groups",
    "llama4-vision": "sigmoid", "beam": "groups", "bailing_hybrid": "groups",
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(_REFUSED))
def test_routers_that_copies_would_change_are_refused(tmp_path, case):
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    with pytest.raises(InputError, match=_REFUSED[case]):
        plan_upcycle(open_model(source))


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("case", sorted(MOE_CASES.keys() - _REFUSED.keys()))
def test_twice_the_experts_and_twice_the_top_k_are_exact(tmp_path, case):
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    plan, difference = _double(source, tmp_path / "more")
    model = open_model(source)
    assert plan.block["exact"]
    assert (plan.block["num_experts"], plan.block["top_k"]) == (2 * model.num_experts, 2 * model.top_k)
    assert difference <= 1e-5


@pytest.mark.parametrize("target", _MADE)
def test_packed_experts_biases_and_corrections_are_copied_too(tmp_path, target):
    dense = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    model = open_model(dense)
    plan = plan_upcycle(model, to=target, experts=4, method="drop", router_std=0.5)
    execute(plan, source=model.checkpoint, out=tmp_path / "moe", jobs=1)
    plan, difference = _double(tmp_path / "moe", tmp_path / "more", experts=12)
    assert (plan.block["num_experts"], plan.block["top_k"]) == (12, 6)
    assert difference <= 1e-5


@pytest.mark.slow
def test_the_command_proves_it_and_says_where_another_top_k_changes_the_model(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *MOE_CASES["mixtral"], dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "more", "--experts", 16, "--json")
    assert done.code == 0, done.out
    check = done.json["upcycle"]["equivalence"]
    assert max(check["relative"], check["all_on"]["relative"]) <= 1e-5
    done = cli("upcycle", source, tmp_path / "fewer", "--experts", 16, "--top-k", 2, "--no-check", "--json")
    assert not done.json["upcycle"]["exact"] and any(
        "changes what the model computes" in text for text in done.json["warnings"]
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--experts", 12), "2, 3 or more times the source"),
        (("--experts", 8), "2, 3 or more times the source"),
        (("--method", "drop"), "the experts of this one can only be copied"),
        (("--granularity", 2), "the experts of this one can only be copied"),
    ],
)
def test_what_copying_cannot_do_is_a_usage_error(tmp_path, cli, flags, words):
    source = save_stock(tmp_path / "moe", *MOE_CASES["mixtral"], dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "more", *flags, "--json")
    assert (done.code, words in done.json["error"]["message"]) == (2, True), done.out


def test_groups_and_sparsemixer_are_refused(tmp_path, cli):
    dense = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    flags = ("--method", "granular", "--to", "glm4_moe", "--no-check", "-q")
    assert cli("upcycle", dense, tmp_path / "grouped", *flags).code == 0
    done = cli("upcycle", tmp_path / "grouped", tmp_path / "more", "--json")
    assert done.code == 3 and "by their two best experts" in done.json["error"]["message"]
    dense = save_stock(tmp_path / "stablelm", *DENSE_CASES["stablelm"], dtype=torch.float32)
    assert cli("upcycle", dense, tmp_path / "phimoe", "--no-check", "-q").code == 0
    done = cli("upcycle", tmp_path / "phimoe", tmp_path / "more", "--json")
    assert done.code == 3 and "unequal weights" in done.json["error"]["message"]
