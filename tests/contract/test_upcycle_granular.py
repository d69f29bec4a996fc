"""Contract: virtual groups and shared experts compute what the dense model does, in every target that can hold them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from moeconv.errors import InputError
from moeconv.families import pairs
from moeconv.families.model import open_model
from moeconv.families.node import fill
from moeconv.families.registry import tables
from moeconv.plan.execute import execute
from moeconv.plan.kernels import layout
from moeconv.upcycle.check import step as equivalence
from moeconv.upcycle.methods import METHODS, Method
from moeconv.upcycle.planner import plan_upcycle
from tests.contract.stock import (
    CASES,
    DENSE_CASES,
    STOCK_PAIRS,
    load,
    logits,
    relative_difference,
    save_stock,
    skip_where_stock_is_broken,
)

torch.set_num_threads(1)
# one case of each source family, the first that has the pair
FIRST = {
    (pair.source, pair.target): (case, pair)
    for case, (model_type, _, targets) in reversed(CASES.items())
    for pair in tables().pairs
    if pair.source == model_type and (not targets or pair.target in targets)
}.values()
CAN = [pytest.param(c, p, id=f"{c}->{p.target}") for c, p in FIRST if tables().moe[p.target].experts.routing.equal]
SHARED = [pytest.param(c, p, id=f"{c}->{p.target}") for c, p in FIRST if tables().moe[p.target].experts.shared_width]
PARTS = [param for param in SHARED if not tables().moe[param.values[1].target].experts.routed_norm]


def _difference(dense, case, pair, out, **parameters):
    source, before = dense(case)
    model = open_model(source)
    plan = plan_upcycle(model, to=pair.target, **parameters)
    execute(plan, source=model.checkpoint, out=out, jobs=1)
    assert plan.block["exact"]
    assert plan.promise == plan.changed
    return relative_difference(before, logits(load(out))), plan


def test_every_pair_but_those_of_unequal_weights_is_cut_below():
    assert len(CAN) == len(STOCK_PAIRS) - sum(p.target == "phimoe" for p in STOCK_PAIRS)
    assert len(SHARED) >= 25


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize(("case", "pair"), CAN)
def test_virtual_groups_are_exact(tmp_path, dense, case, pair):
    parameters = {"method": "granular", "granularity": 4, "experts": 8, "top_k": 4}
    difference, plan = _difference(dense, case, pair, tmp_path / "moe", **parameters)
    assert difference <= pair.tolerance
    assert plan.block["expert_width"] == open_model(dense(case)[0]).ffn_width // 4


@pytest.mark.parametrize("granularity", [2, 4, 8])
@pytest.mark.parametrize(("case", "target"), [("llama", "mixtral"), ("qwen3", "dots1"), ("llama", "granitemoe")])
def test_two_copies_of_any_granularity_are_exact(tmp_path, dense, case, target, granularity):
    pair = next(p for p in tables().pairs if (p.source, p.target) == (case, target))
    parameters = {"method": "granular", "granularity": granularity, "experts": 4 * granularity}
    difference, _ = _difference(dense, case, pair, tmp_path / "moe", top_k=2 * granularity, **parameters)
    assert difference <= 1e-5


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize(("case", "pair"), PARTS)
def test_a_shared_expert_of_one_piece_is_exact(tmp_path, dense, case, pair):
    parameters = {"granularity": 4, "shared_experts": "1", "experts": 6, "top_k": 3}
    difference, plan = _difference(dense, case, pair, tmp_path / "moe", **parameters)
    assert difference <= pair.tolerance
    assert (plan.block["expert_width"], plan.block["shared_width"]) == (24, 24)


@pytest.mark.parametrize(("case", "pair"), SHARED)
def test_a_shared_expert_of_the_whole_ffn_is_exact_and_the_others_start_at_zero(tmp_path, dense, case, pair):
    difference, _ = _difference(dense, case, pair, tmp_path / "moe", shared_experts="full", experts=4, method="drop")
    assert difference <= pair.tolerance
    written = open_model(tmp_path / "moe")
    nothing = written.family.experts.routed_norm or "expert.down"  # what makes the routed experts add nothing
    for name, role in written.roles.items():
        data = written.checkpoint.read(name) if role.group == "expert" or role.key == nothing else b""
        assert not data or any(data) == (role.key != nothing), name


def test_parts_that_are_normalised_apart_are_refused(tmp_path, dense):
    for shared in ("1", "0.25"):
        with pytest.raises(InputError, match=r"post_feedforward_layernorm_2.*do not add up"):
            plan_upcycle(open_model(dense("gemma4_text")[0]), granularity=4, shared_experts=shared)


@pytest.mark.parametrize("target", ["qwen2_moe", "granitemoeshared"])
def test_a_share_of_the_ffn_may_be_any_where_the_width_is_free(tmp_path, dense, target):
    pair = next(p for p in tables().pairs if (p.source, p.target) == ("llama", target))
    difference, plan = _difference(dense, "llama", pair, tmp_path / "moe", shared_experts="0.29", experts=4)
    assert difference <= 1e-5
    assert (plan.block["shared_width"], plan.block["expert_width"]) == (28, 68)


def test_some_dense_layers_keep_their_width_beside_narrow_experts(tmp_path, dense):
    for case, target in (("cohere2", "cohere2_moe"), ("qwen3", "qwen3_moe"), ("ernie4_5", "ernie4_5_moe")):
        pair = next(p for p in tables().pairs if (p.source, p.target) == (case, target))
        parameters = {"method": "granular", "granularity": 2, "layers": "1,2"}
        assert _difference(dense, case, pair, tmp_path / target, **parameters)[0] <= 1e-5


def test_groups_of_the_router_are_the_virtual_groups(tmp_path, dense):
    for case, target in (("llama", "glm4_moe"), ("qwen3", "dots1"), ("youtu", "deepseek_v3")):
        source, _ = dense(case)
        plan = plan_upcycle(open_model(source), to=target, method="granular", granularity=2, experts=8, top_k=4)
        assert (plan.config["n_group"], plan.config["topk_group"]) == (4, 2)
        assert plan.config["routed_scaling_factor"] == 2.0
        assert not any("logits" in text for text in plan.warnings)


@pytest.mark.parametrize(("target", "said"), [("mixtral", True), ("glm4_moe", False), ("ernie4_5_moe", False)])
def test_ties_of_rounded_logits_are_warned_of(tmp_path, target, said):
    source = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.bfloat16)
    plan = plan_upcycle(open_model(source), to=target, method="granular")
    assert any("rounds the logits of its router" in text for text in plan.warnings) == said


def test_the_default_target_has_a_shared_expert_where_one_is_asked_for(tmp_path):
    for case, target in (
        ("llama", "glm4_moe"),
        ("qwen3", "dots1"),
        ("qwen2", "qwen2_moe"),
        ("granite", "granitemoeshared"),
    ):
        source = save_stock(tmp_path / case, *DENSE_CASES[case], dtype=torch.float32)
        plan = plan_upcycle(open_model(source), shared_experts="full")
        assert plan.block["to"] == target


@pytest.mark.parametrize(
    ("code", "words", "flags"),
    [
        (2, "multiple of the 4 pieces", ("--granularity", 4, "--top-k", 6)),
        (2, "equal pieces", ("--granularity", 7, "--experts", 14, "--top-k", 7)),
        (2, "at least 1", ("--granularity", 0)),
        (2, "neither a number", ("--shared-experts", "half")),
        (2, "cut into 2 pieces", ("--shared-experts", "3", "--granularity", 2)),
        (3, "mixtral has no shared expert", ("--shared-experts", "full", "--to", "mixtral")),
        (3, "whole number of routed experts", ("--shared-experts", "0.25", "--to", "glm4_moe")),
    ],
)
def test_cuts_that_do_not_come_out_are_refused(tmp_path, cli, dense, code, words, flags):
    done = cli("upcycle", dense("llama")[0], tmp_path / "moe", *flags, "--no-check", "--json")
    assert done.code == code, done.out
    assert words in done.json["error"]["message"]
    assert not (tmp_path / "moe").exists()


def test_sparsemixer_cannot_be_cut(tmp_path, cli, dense):
    done = cli("upcycle", dense("stablelm")[0], tmp_path / "moe", "--method", "granular", "--no-check", "--json")
    assert done.code == 3
    assert "equal logits unequal weights" in done.json["error"]["message"]


def test_shuffle_permutes_each_copy_alike_in_all_three_matrices(tmp_path, dense):
    source, _ = dense("llama")
    model = open_model(source)
    plan = plan_upcycle(model, method="shuffle", drop_ratio=0.0, experts=4, top_k=2)
    assert not plan.block["exact"]
    execute(plan, source=model.checkpoint, out=tmp_path / "moe", jobs=1)
    mlp, experts = load(source).model.layers[0].mlp, load(tmp_path / "moe").model.layers[0].mlp.experts
    orders = []
    for copy in range(2):
        gate, up = torch.cat([experts.gate_up_proj[2 * copy + i].chunk(2)[0] for i in range(2)]), None
        order = torch.cdist(gate, mlp.gate_proj.weight).argmin(1)
        up = torch.cat([experts.gate_up_proj[2 * copy + i].chunk(2)[1] for i in range(2)])
        down = torch.cat([experts.down_proj[2 * copy + i] for i in range(2)], 1)
        assert sorted(order.tolist()) == list(range(96))
        assert torch.equal(up, mlp.up_proj.weight[order])
        assert torch.equal(down, 2 * mlp.down_proj.weight[:, order])
        orders.append(order.tolist())
    assert orders[0] != orders[1] != list(range(96))
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["intermediate_size"] == 48


# -- the check before the commit ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("case", "target"), [("llama", "mixtral"), ("llama", "glm4_moe"), ("phi3", "granitemoe")])
def test_the_check_runs_at_the_chosen_k_and_with_all_experts_on(tmp_path, cli, dense, case, target):
    skip_where_stock_is_broken(target)
    case = "llama" if target == "granitemoe" else case
    flags = ("--method", "granular", "--granularity", 2, "--experts", 8, "--top-k", 4, "--to", target)
    done = cli("upcycle", dense(case)[0], tmp_path / "moe", *flags, "--json")
    assert done.code == 0, done.out
    check = done.json["upcycle"]["equivalence"]
    assert check["checked"] and check["top_k"] == 4 and check["dtype"] == "float64"
    assert max(check["relative"], check["all_on"]["relative"]) <= 1e-5


@pytest.mark.slow
def test_a_method_that_breaks_its_promise_exits_5_and_leaves_nothing(tmp_path, cli, dense, monkeypatch):
    monkeypatch.setitem(METHODS, "copy", replace(METHODS["drop"], exact=True))
    done = cli("upcycle", dense("llama")[0], tmp_path / "moe", "--experts", 4, "--json")
    assert done.code == 5
    assert "differs from its source by" in done.json["error"]["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_kernel_that_breaks_a_promise_exits_5_and_leaves_nothing(tmp_path, cli, dense, monkeypatch):
    monkeypatch.setitem(layout._MOVES, "cut", lambda of, params: layout._cut(of, params)[:, ::-1])
    done = cli("upcycle", dense("llama")[0], tmp_path / "moe", "--method", "granular", "--json")
    assert done.code == 5
    assert "differs from its source by" in done.json["error"]["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_promise_that_holds_at_the_chosen_k_alone_is_broken(tmp_path, cli, dense, monkeypatch):
    """Without renormalisation a zero router and down_proj x E/k are exact at top-k, and E/k too much with all on."""
    rows = [replace(p, config=p.config | {"norm_topk_prob": False}) for p in tables().pairs if p.target == "qwen3_moe"]
    known = replace(tables(), pairs=tuple(rows))
    monkeypatch.setattr(pairs, "tables", lambda: known)
    zero = Method(exact=True, scale=lambda cut, _options: cut.experts / cut.top_k, router=lambda *_: fill(0.0))
    monkeypatch.setitem(METHODS, "copy", zero)
    done = cli("upcycle", dense("qwen3")[0], tmp_path / "moe", "--experts", 4, "--json")
    assert done.code == 5
    assert "with all experts on" in done.json["error"]["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_check_fits_its_dtype_to_the_memory_or_says_why_not(tmp_path, cli, dense, monkeypatch):
    source = dense("llama")[0]
    for free, dtype in ((equivalence._needed, "float32"), (lambda _plan, _width: 0, None)):
        model = open_model(source)
        plan = plan_upcycle(model)
        memory = int(free(plan, 4) / 0.8) + 1 if dtype else 0
        monkeypatch.setattr(equivalence, "free_memory", lambda memory=memory: memory)
        done = cli("upcycle", source, tmp_path / str(dtype), "--json")
        assert done.code == 0, done.out
        found = done.json["upcycle"]["equivalence"]
        assert found["checked"] == (dtype is not None) and found.get("dtype") == dtype
        assert any("not checked" in text for text in done.json["warnings"]) == (dtype is None)
