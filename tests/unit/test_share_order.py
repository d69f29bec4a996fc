"""arrange: shares of equal load, experts that fire together side by side, groups that stay whole; the command."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from words import add_tokenizer, text

from moeconv.arrangement.order import check_shares, even_order, share_load
from moeconv.calibrate.run import calibrate
from moeconv.errors import UsageError
from moeconv.families.model import open_model
from moeconv.stream.layers import LayerStream
from tests.contract.stock import MOE_CASES, save_stock

pytestmark = pytest.mark.usefixtures("one_thread")


def _used(experts: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of each expert, of each pair), as of a router that prefers some experts."""
    draw = np.random.default_rng(seed)
    load = np.sort(draw.exponential(size=experts))[::-1] * 1000
    together = np.outer(load, load) * draw.uniform(size=(experts, experts)) / load.sum()
    together = together + together.T
    np.fill_diagonal(together, load)
    return load, together


@pytest.mark.parametrize("seed", range(3))
def test_the_shares_are_nearly_as_even_as_any_order_makes_them(seed: int) -> None:
    load, together = _used(8, seed=seed)
    order = even_order(load, together, 2)
    assert sorted(order.tolist()) == list(range(8))
    most = share_load(load, together, order, 2).max_over_mean
    best = min(
        share_load(load, together, np.array([*some, *(set(range(8)) - set(some))]), 2).max_over_mean or 9
        for some in itertools.combinations(range(8), 4)
    )
    assert most is not None and most <= max(best, 1.0) * 1.05
    assert most < (share_load(load, together, np.arange(8), 2).max_over_mean or 0)


def test_experts_that_fire_together_come_into_one_share() -> None:
    load, together = np.full(8, 10.0), np.ones((8, 8))
    for a, b in ((0, 7), (1, 6), (2, 5), (3, 4)):
        together[a, b] = together[b, a] = 9
    order = even_order(load, together, 4)
    assert {frozenset(of) for of in order.reshape(4, 2).tolist()} == {
        frozenset(of) for of in ((0, 7), (1, 6), (2, 5), (3, 4))
    }
    before, after = (share_load(load, together, of, 4) for of in (np.arange(8), order))
    assert after.max_over_mean == before.max_over_mean == 1
    assert after.crossing == pytest.approx(24 / 60)


@pytest.mark.parametrize(("groups", "shares"), [(4, 2), (2, 4), (4, 4)])
def test_groups_of_a_router_stay_whole(groups: int, shares: int) -> None:
    load, together = _used(16)
    order = even_order(load, together, shares, groups=groups)
    size = 16 // groups
    assert sorted(order.tolist()) == list(range(16))
    for block in order.reshape(groups, size):
        assert len({e // size for e in block}) == 1


def test_shares_that_cannot_be_are_refused() -> None:
    for shares in (0, 1, 3, 32):
        with pytest.raises(UsageError, match="equal shares"):
            check_shares(16, shares, 1)
    with pytest.raises(UsageError, match="parts of several groups"):
        check_shares(24, 4, 6)
    check_shares(24, 12, 6)


def test_unused_layers_keep_their_order_of_loads() -> None:
    order = even_order(np.zeros(8), np.zeros((8, 8)), 4)
    assert sorted(order.tolist()) == list(range(8))
    found = share_load(np.zeros(8), np.zeros((8, 8)), order, 4)
    assert found.max_over_mean is None and found.crossing is None


@pytest.mark.parametrize("case", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_the_command_evens_out_what_calibrate_counted(tmp_path: Path, cli: Any, case: str) -> None:
    kind, values = MOE_CASES[case]
    path = add_tokenizer(Path(save_stock(tmp_path / "moe", kind, values, dtype=torch.float32)))
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.txt").write_text(text(512, seed=seed))
        calibrate(path, tmp_path / f"{name}.stats", data=[str(tmp_path / f"{name}.txt")], seq_len=16, save_every=None)
    flags = ("--devices", 2, "--stats", tmp_path / "a.stats", "--held-out", tmp_path / "b.stats", "--json")
    dry = cli("arrange", path, tmp_path / "out", *flags, "--dry-run").json
    done = cli("arrange", path, tmp_path / "out", *flags)
    assert done.code == 0, done.out
    block = done.json["arrange"]
    assert dry["plan_id"] == done.json["plan_id"] and dry["arrange"] == block and dry["bytes"] == done.json["bytes"]
    assert block["after"]["max_over_mean"] <= block["before"]["max_over_mean"]
    assert {"held_out_before", "held_out_after"} <= block.keys() and len(block["layers"]) == len(block["order"])
    model, made = open_model(path), open_model(tmp_path / "out")
    assert cli("verify", tmp_path / "out", "--load", "--json").json["ok"]
    calibrate(tmp_path / "out", tmp_path / "c.stats", data=[str(tmp_path / "b.txt")], seq_len=16, save_every=None)
    again = cli("arrange", tmp_path / "out", tmp_path / "twice", "--devices", 2, "--stats", tmp_path / "c.stats",
                "--dry-run", "--json").json["arrange"]  # fmt: skip
    for name, value in again["before"].items():
        assert value == pytest.approx(block["held_out_after"][name], rel=1e-6), "what was promised for other text"
    windows = np.random.default_rng(0).integers(3, 100, (2, 16))
    one, other = (LayerStream(m, windows).run().hidden for m in (model, made))
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_arranged_is_refused(tmp_path: Path, cli: Any) -> None:
    kind, values = MOE_CASES["qwen3_moe"]
    path = save_stock(tmp_path / "moe", kind, values, dtype=torch.float32)
    for flags, says in ((["--devices", 3], "equal shares"), (["--devices", 4], "needs statistics")):
        done = cli("arrange", path, tmp_path / "out", *flags, "--json")
        assert done.code == 2 and says in done.json["error"]["message"] and done.json["error"]["hint"], done.out
    done = cli("arrange", path, tmp_path / "out", "--devices", 4, "--stats", tmp_path / "none", "--json")
    assert done.code == 3 and not (tmp_path / "out").exists()


def test_shares_are_even_on_each_source_and_not_only_on_their_sum() -> None:
    """Other text has another mixture of the sources."""
    load = np.zeros((2, 8))
    load[0, :4], load[1, 4:] = 10, 10  # each expert is used on one source
    together = np.ones((8, 8))
    together[:4, :4] = together[4:, 4:] = 2  # traffic alone would put the experts of a source into one share
    order = even_order(load, together, 2)
    for of_source in load:
        assert share_load(of_source, together, order, 2).max_over_mean == 1.0
    assert share_load(load.sum(0), together, even_order(load.sum(0), together, 2), 2).max_over_mean == 1.0
