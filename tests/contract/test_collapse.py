"""Contract: every Mixture-of-Experts row with a dense twin collapses to it, and what it then computes is what was
decided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.checkpoint.overlay import Overlay
from moeconv.collapsing.fit.measure import collapse_on_data
from moeconv.collapsing.planner import collapse_of, collapse_plan
from moeconv.data.windows import Source, TokenData
from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.options import CollapseOptions, PlanOptions
from moeconv.plan.execute import execute
from moeconv.stream.layers import LayerStream
from tests.contract.stock import CASES, STOCK_PAIRS, VOCAB, load, logits, relative_difference, save_stock

torch.set_num_threads(1)
# rows that no dense family of transformers can express, and a word of the reason
WITHOUT_TWIN = {"gpt_oss": "biases", "gemma4_text": "norm.post_shared", "dbrx": "norm"}
FIRST_CASE = {model_type: (name, config) for name, (model_type, config, _) in reversed(CASES.items())}
ROWS = {pair.target: pair for pair in sorted(STOCK_PAIRS, key=lambda pair: bool(pair.folds), reverse=True)}


def test_every_target_of_a_pair_is_collapsed_below():
    assert set(ROWS) == {pair.target for pair in STOCK_PAIRS}


@pytest.mark.slow(keep=4)
@pytest.mark.parametrize("target", sorted(ROWS))
def test_copies_collapse_to_the_dense_model(tmp_path, cli, target):
    pair = ROWS[target]
    name, config = FIRST_CASE[pair.source]
    source = save_stock(tmp_path / "dense", pair.source, config, dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--to", target, "--no-check", "--json")
    assert done.code == 0, done.out
    done = cli("collapse", tmp_path / "moe", tmp_path / "back", "--json")
    if target in WITHOUT_TWIN:
        assert done.code == 3 and WITHOUT_TWIN[target] in done.json["error"]["message"]
        return
    assert done.code == 0, done.out
    back = load(tmp_path / "back")
    assert back.config.model_type == done.json["collapse"]["to"]
    assert tables().dense[back.config.model_type].kind == "dense"
    difference = relative_difference(logits(load(source)), logits(back))
    print(f"{name} -> {target} -> {back.config.model_type}: {difference:.1e}")
    assert difference <= max(1e-5, pair.tolerance)


def other_experts(path, model, *, seed=0):
    """Give the experts of a checkpoint weights of their own, so that no two neurons are equal, and its routers rows by
    which they choose."""
    draw = torch.Generator().manual_seed(seed)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            role = model.roles.get(name)
            if role is not None and role.group in ("expert", "shared", "router") and tensor.is_floating_point():
                size = 1.0 if role.group == "router" else 0.08
                tensors[name] = (torch.randn(tensor.shape, generator=draw) * size).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("target", sorted(set(ROWS) - set(WITHOUT_TWIN)))
def test_what_is_written_is_what_was_fitted(tmp_path, cli, target):
    """The logits of the dense model that the stream computed while it fitted the FFNs, shared experts and weights of
    the router included, are those of the stock class with the written weights."""
    pair = ROWS[target]
    _, config = FIRST_CASE[pair.source]
    source = save_stock(tmp_path / "dense", pair.source, config, dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--to", target, "--no-check", "--json")
    assert done.code == 0, done.out
    other_experts(tmp_path / "moe", open_model(tmp_path / "moe"))
    model, common, options = open_model(tmp_path / "moe"), PlanOptions(), CollapseOptions(width=64)
    made = collapse_of(model, options, common)
    ids = np.random.default_rng(0).integers(3, VOCAB, (24, 24))
    read = TokenData(ids, np.zeros(24, np.int64), (Source("text", "0", ids.size),))
    stream = LayerStream(model, ids)
    rows, flow = collapse_on_data(made, stream, read, tmp_path / "overlay", how="surgeon", seed=0)
    fitted = torch.cat([made for _, (made,) in stream.tails([flow])])
    plan = collapse_plan(made, options, common, neurons="surgeon", overlay=Overlay(tmp_path / "overlay"))
    execute(plan, source=model.checkpoint, out=tmp_path / "out", origins={"overlay": Overlay(tmp_path / "overlay")})
    with torch.no_grad():
        written = load(tmp_path / "out")(input_ids=torch.from_numpy(ids)).logits
    assert relative_difference(fitted, written) <= 1e-4
    assert all(row["distinct"] > 64 and row["error"] <= row["mean_error"] for row in rows)
