"""Contract: every MoE row with its experts in another order computes the same in its stock class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.arrangement.planner import check_arrangement, plan_arrangement
from moeconv.families.model import open_model
from moeconv.options import PlanOptions
from moeconv.plan.execute import execute
from tests.contract.stock import (
    MOE_CASES,
    load,
    logits,
    relative_difference,
    save_stock,
    skip_where_stock_is_broken,
)

torch.set_num_threads(1)


def another_order(model, *, seed=0):
    """{layer: a random order}; a router with groups keeps each group's experts together."""
    draw, groups = np.random.default_rng(seed), model.groups[0]
    each = np.arange(model.num_experts).reshape(groups, -1)
    return {
        layer: np.concatenate([draw.permutation(each[g]) for g in draw.permutation(groups)]).tolist()
        for layer in (*model.moe_layers, *model.mtp_layers)
    }


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("case", list(MOE_CASES))
def test_experts_in_another_order_compute_the_same(tmp_path, case):
    """In float32 the outputs of a token's experts are added in the order of their numbers, so only that may round."""
    skip_where_stock_is_broken(case)
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    model, common = open_model(source), PlanOptions()
    check_arrangement(model, common)
    order = another_order(model)
    assert any(of != sorted(of) for of in order.values())
    plan = plan_arrangement(model, order, common, parameters={}, block={})
    execute(plan, source=model.checkpoint, out=tmp_path / "out", jobs=1)
    made = open_model(tmp_path / "out")
    assert {name: ref.shape for name, ref in made.checkpoint.tensors.items()} == {
        name: ref.shape for name, ref in model.checkpoint.tensors.items()
    }
    assert {item.kernel for item in plan.items()} == {"copy"}, "no byte of a weight changes"
    assert relative_difference(logits(load(source)), logits(load(tmp_path / "out"))) <= 1e-5
    back = {layer: np.argsort(of).tolist() for layer, of in order.items()}
    again = plan_arrangement(made, back, common, parameters={}, block={})
    execute(again, source=made.checkpoint, out=tmp_path / "back", jobs=1)
    one, other = model.checkpoint, open_model(tmp_path / "back").checkpoint
    for name in one.tensors:
        assert one.read(name) == other.read(name), name
