"""What tune does to the routing while it trains: noise, temperature, capacity, the bias that balances, early stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from contract.stock import DENSE_CASES, save_stock
from words import add_tokenizer, text

from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.errors import InputError, UsageError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.tune.disturb import Disturbance, disturbed
from moeconv.tune.network import load_network
from moeconv.tune.optimise import Schedule, optimise
from moeconv.tune.parameters import Piece
from moeconv.tune.rebalance import rebalancing
from moeconv.tune.routing import Block, recording
from moeconv.tune.run import tune
from moeconv.upcycle.planner import plan_upcycle

SEQ_LEN = 16
# dense case of the contract suite -> target: routers that are modules of their own, plain linear layers, or in a gate
TARGETS = {"qwen2": "glm4_moe", "lfm2": "lfm2_moe", "stablelm": "phimoe", "cohere": "cohere2_moe"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(text(2000))
    return [str(tmp_path / "text.txt")]


def upcycled(folder: Path, case: str, target: str, **parameters: Any) -> Path:
    dense = add_tokenizer(save_stock(folder / "dense", *DENSE_CASES[case], dtype=torch.float32))
    model = open_model(dense)
    plan = plan_upcycle(model, **({"experts": 4, "top_k": 2, "method": "drop", "to": target} | parameters))
    execute(plan, source=model.checkpoint, out=folder / "moe")
    return folder / "moe"


# -- disturbances ------------------------------------------------------------------------------------------------------


def test_capacity_keeps_the_heaviest_tokens_of_each_expert():
    rng = np.random.default_rng(0)
    scores = rng.random((40, 5)) + np.array([0.5, 0, 0, 0, 0])  # the first expert is crowded
    chosen = np.argsort(-scores, -1)[:, :2]
    weights = np.take_along_axis(scores, chosen, -1)
    d = Disturbance(capacity_factor=1.1)
    assert d.kept(torch.tensor(chosen), torch.tensor(weights), experts=5) is None  # not training
    with d.training(0, rows=np.arange(40), total=40):
        kept = d.kept(torch.tensor(chosen), torch.tensor(weights), experts=5)
    assert kept is not None
    room = math.ceil(1.1 * 40 * 2 / 5)
    for expert in range(5):
        mine = [(weights[t, s], t, s) for t, s in zip(*np.nonzero(chosen == expert))]
        wanted = {(t, s) for _, t, s in sorted(mine, reverse=True)[:room]}
        assert {(t, s) for _, t, s in mine if kept[t, s]} == wanted, expert
    assert not kept.all() and kept.sum() >= 60


@pytest.mark.parametrize(("case", "target"), TARGETS.items(), ids=TARGETS.values())
def test_noise_and_temperature_reach_the_choice_in_training_alone(tmp_path, case, target):
    model = open_model(upcycled(tmp_path, case, target))
    network = load_network(model, device=torch.device("cpu"))
    tokens = torch.randint(3, 60, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    rule = model.family.experts.routing
    assert rule is not None
    d = Disturbance(noise=0.5, temperature=2.0, seed=3)

    def routed(step: int | None) -> list[Any]:
        with torch.no_grad():
            if step is None:
                network.hidden(tokens)
            else:
                with d.training(step, rows=np.arange(tokens.numel()), total=tokens.numel()):
                    network.hidden(tokens)
        return take()

    with recording(network.blocks, rule, renormalise=False, straight_through=False) as take:
        plain = routed(None)
    with recording(network.blocks, rule, renormalise=False, straight_through=False, disturbance=d) as take:
        measured, first, again, other = routed(None), routed(0), routed(0), routed(1)
    for a, b in zip(plain, measured):
        assert torch.equal(a.logits, b.logits) and torch.equal(a.chosen, b.chosen)
    assert torch.equal(first[0].logits, again[0].logits) and not torch.equal(first[0].logits, other[0].logits)
    noise = first[0].logits - plain[0].logits / 2  # the first layer: what is in front of it is undisturbed
    assert 0.35 < float(noise.std()) < 0.65
    assert (first[0].chosen.sort().values != plain[0].chosen.sort().values).any()
    if rule.score != "sparsemixer" and network.blocks[0].bias is None:
        assert torch.equal(first[0].chosen.sort().values, first[0].logits.topk(2).indices.sort().values)
    assert "forward" not in vars(network.blocks[0].router)


def test_noise_does_not_depend_on_how_a_batch_is_shared():
    d = Disturbance(noise=1.0, seed=5)
    with d.training(7, rows=np.arange(6), total=6):
        whole = d.logits(2, torch.zeros(6, 3))
    for rank in range(2):
        with d.training(7, rows=np.arange(rank, 6, 2), total=6):
            assert torch.equal(d.logits(2, torch.zeros(3, 3)), whole[rank::2])


def test_a_router_without_a_linear_layer_is_refused():
    with pytest.raises(InputError, match="so that they cannot be changed"):
        disturbed(lambda x: x @ torch.ones(3, 4), lambda x: x, experts=4)(torch.ones(2, 3))


@pytest.mark.slow
def test_training_goes_on_under_all_of_them(tmp_path, data):
    moe = upcycled(tmp_path, "qwen2", "glm4_moe")
    block = tune(
        moe, tmp_path / "o", data=data, seq_len=SEQ_LEN, batch_size=4, steps=20, objective="distill",
        teacher=str(tmp_path / "dense"), train="router,experts", router_noise=0.1, temperature=1.5, capacity_factor=1.0,
        schedule="linear", warmup=0.0, learning_rate=1e-3,
    )  # fmt: skip
    assert block["improved"] and block["kl_after"] < block["kl_before"]


# -- the bias ----------------------------------------------------------------------------------------------------------


def test_the_bias_falls_where_the_load_is_above_the_mean():
    bias = torch.tensor([0.0, 0.1, 0.2, 0.3])
    rebalancing([Block(0, None, None, bias)], step=0.05)(torch.tensor([[10.0, 2.0, 4.0, 0.0]]))
    assert bias.tolist() == pytest.approx([-0.05, 0.15, 0.2, 0.35])


@pytest.mark.slow
@pytest.mark.parametrize(("case", "target"), [("qwen2", "glm4_moe"), ("lfm2", "lfm2_moe")])
def test_bias_balancing_opens_a_router_that_its_bias_collapsed(tmp_path, data, case, target):
    moe = upcycled(tmp_path, case, target)
    model = open_model(moe)
    names = [n for n, role in model.roles.items() if role.key == "router.correction"]
    tensors = tiny.read_tensors(moe)
    for name in names:
        dtype, shape, _ = tensors[name]
        tensors[name] = (dtype, shape, tiny.encode(np.array([0.2, 0.2, 0, 0], np.float32), dtype))
    tiny.write_shards(moe, tensors)
    (moe / "moeconv_manifest.json").unlink()
    block = tune(
        moe, tmp_path / "o", data=data, seq_len=SEQ_LEN, batch_size=8, steps=60, balance_only=True, bias_update=0.004,
        learning_rate=1e-6,
    )  # fmt: skip
    assert block["improved"] and set(block["learning_rate"]) == {"router"}
    for row in block["layers"]:
        assert row["before"]["max_over_mean"] == 2 and row["max_over_mean"] < 1.5, row
    overlay = SafetensorsFile(tmp_path / "o")
    assert set(overlay.tensors) == {*names, *(model.router_name(layer) for layer in model.moe_layers)}
    moved = np.frombuffer(overlay.read(names[0]), np.float32)
    assert moved[:2].max() < 0.2 and moved[2:].min() > 0


def test_a_family_without_a_bias_says_so(tmp_path, data):
    moe = add_tokenizer(tiny.make_moe(tmp_path / "moe", "mixtral"))
    with pytest.raises(UsageError, match="--bias-update: not every router of this mixtral"):
        tune(moe, tmp_path / "o", data=data, objective="lm", bias_update=0.001)


# -- early stop, values --------------------------------------------------------------------------------------------


def falling(scores: list[float], schedule: Schedule) -> Any:
    """Optimise one number whose held-out scores are given, the first one before training."""
    piece = Piece("x", "F32", "router", torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    told = iter(scores)

    def step(i: int) -> float:
        piece.parameter.grad = -torch.ones(1)  # upwards
        return 0.0

    outcome = optimise(
        [piece], schedule=schedule, step=step, measure=lambda: next(told), score=float,
        note=lambda _done, _loss, _measured: None,
        not_finite=lambda: InputError("NaN"),
    )  # fmt: skip
    return outcome, float(piece.parameter.detach())


def test_patience_ends_training_and_the_best_look_stays():
    schedule = Schedule(100, {"router": 0.1}, "constant", 0.0, look_every=10, patience=2)
    outcome, value = falling([5, 4, 3, 3.5, 3.2, 1], schedule)
    assert (outcome.before, outcome.after, outcome.stopped_at, outcome.improved) == (5, 3, 40, True)
    assert value == pytest.approx(2.0, rel=1e-3)  # the twentieth step's, not the fortieth's
    outcome, value = falling([5, 6, 7], schedule)
    assert (outcome.after, outcome.stopped_at, outcome.improved, value) == (5, 20, False, 0.0)
    outcome, _ = falling([5, 6, 4, 6, 3, *[9] * 6], Schedule(100, {"router": 0.1}, look_every=10))
    assert (outcome.after, outcome.stopped_at) == (3, None)


def test_an_early_stop_is_said_and_the_source_kept(tmp_path, data):
    moe = upcycled(tmp_path, "qwen2", "glm4_moe")
    block = tune(
        moe, tmp_path / "o", data=data, seq_len=SEQ_LEN, objective="distill", teacher=str(tmp_path / "dense"),
        learning_rate=30.0, steps=20, look_every=2, patience=1, train="router,experts", warmup=0.0,
    )  # fmt: skip
    assert any("stopped early at step 2" in text for text in block["warnings"]), block["warnings"]
    assert any("did not improve" in text for text in block["warnings"]) and not block["improved"]
    overlay, source = SafetensorsFile(tmp_path / "o"), open_model(moe).checkpoint
    assert all(overlay.read(name) == source.read(name) for name in overlay.tensors)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [({"look_every": 0}, "--look-every 0"), ({"patience": 0}, "--patience 0"), ({"warmup": 1.5}, "--warmup 1.5"),
     ({"temperature": 0.0}, "--temperature 0"), ({"capacity_factor": float("nan")}, "--capacity-factor nan"),
     ({"router_noise": -1.0}, "--router-noise -1"), ({"bias_update": float("inf")}, "--bias-update inf"),
     ({"schedule": "step"}, "--schedule step")],
    ids=str,
)  # fmt: skip
def test_values_that_make_no_sense(tmp_path, data, parameters, said):
    with pytest.raises(UsageError, match=said):
        tune(tmp_path / "nowhere", tmp_path / "o", data=data, objective="lm", **parameters)
