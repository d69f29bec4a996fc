"""Cutting an FFN: assignment and oracle against brute force, routers against what they must find, planted experts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import linear_sum_assignment
from words import WORDS, add_tokenizer, text

from moeconv.calibrate.neurons import load_neurons
from moeconv.calibrate.run import calibrate
from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.upcycle.ffn_split import Ffn, split_ffn
from moeconv.upcycle.grouping import assign, balanced_kmeans
from moeconv.upcycle.linear_router import logistic, missing, oracle, output_norms, ridge, select

torch.set_num_threads(1)


def test_the_assignment_is_the_cheapest_one():
    cost = np.random.default_rng(0).random((6, 3))
    sizes = [1, 2, 3]
    slots = np.repeat(np.arange(3), sizes)
    best = min(cost[np.arange(6), list(order)].sum() for order in set(itertools.permutations(slots.tolist())))
    group = assign(cost, sizes)
    assert np.bincount(group).tolist() == sizes
    assert cost[np.arange(6), group].sum() == pytest.approx(best)


@pytest.mark.parametrize(("items", "groups"), [(300, 7), (700, 3), (120, 40)])
def test_the_assignment_costs_what_the_hungarian_method_finds(items, groups):
    """Also where many items want the same group, and where a group has no room."""
    random = np.random.default_rng(items)
    cost = random.random((items, groups)) ** 4 * np.linspace(1, 9, groups)
    sizes = np.bincount(np.arange(items) % groups)
    sizes[0], sizes[1] = sizes[0] + sizes[1], 0
    group = assign(cost, sizes)
    assert np.array_equal(np.bincount(group, minlength=groups), sizes)
    slots = np.repeat(np.arange(groups), sizes)
    rows, columns = linear_sum_assignment(cost[:, slots])
    np.testing.assert_array_equal(group[rows], slots[columns])


def test_an_assignment_with_many_equal_costs_and_one_of_wrong_sizes():
    cost = np.random.default_rng(1).integers(0, 3, (4500, 4)).astype(float)
    sizes = [1500, 1000, 1000, 1000]
    group = assign(cost, sizes)
    assert np.bincount(group).tolist() == sizes
    assert np.array_equal(group, assign(cost, sizes))
    for wrong, costs in (([1, 2, 3, 4], cost), (sizes, np.full_like(cost, np.nan))):
        with pytest.raises(ValueError):
            assign(costs, wrong)


def test_clusters_are_equal_and_found():
    draw = np.random.default_rng(2)
    points = np.repeat(np.eye(4, 8), 5, axis=0) + 0.01 * draw.standard_normal((20, 8))
    order = draw.permutation(20)
    group = balanced_kmeans(points[order], 4, key=(0,))
    assert np.bincount(group).tolist() == [5] * 4
    assert all(len(set(group[order // 5 == c])) == 1 for c in range(4))
    assert np.bincount(balanced_kmeans(draw.random((10, 3)), 4, key=(0,))).tolist() == [3, 3, 2, 2]


def _random_ffn(n=200, hidden=6, width=12, seed=0) -> Ffn:
    draw = torch.Generator().manual_seed(seed)
    x, h, down = (torch.randn(*shape, generator=draw) for shape in ((n, hidden), (n, width), (hidden, width)))
    return Ffn(x, h, down, 0, 0)


def test_norms_and_what_is_missing_are_those_of_the_definition():
    ffn, groups = _random_ffn(), torch.arange(12).view(4, 3)
    each = torch.stack([ffn.h[:, g] @ ffn.down[:, g].T for g in groups], 1)  # [n, G, H]
    assert torch.allclose(output_norms(ffn.h, ffn.down, groups), each.norm(dim=-1), atol=1e-5)
    chosen = torch.rand(200, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    left = (each * ~chosen[:, :, None]).sum(1)
    assert torch.allclose(missing(ffn.h, ffn.down, groups, chosen), left, atol=1e-4)


def test_the_greedy_oracle_takes_the_best_group_and_is_near_the_best_pair():
    ffn, groups = _random_ffn(), torch.arange(12).view(6, 2)

    def left(chosen):
        return missing(ffn.h, ffn.down, groups, chosen).square().sum(1)

    every = {k: [torch.zeros(200, 6, dtype=torch.bool).index_fill_(1, torch.tensor(c), True)
                 for c in itertools.combinations(range(6), k)] for k in (1, 2)}  # fmt: skip
    for k, slack in ((1, 1.00001), (2, 1.2)):
        best = torch.stack([left(c) for c in every[k]]).min(0).values
        found = oracle(ffn.h, ffn.down, groups, top_k=k)
        assert found.sum(1).eq(k).all()
        assert left(found).sum() <= best.sum() * slack


def test_routers_find_a_linear_rule():
    draw = torch.Generator().manual_seed(0)
    x, rows = torch.randn(2000, 8, generator=draw), torch.randn(5, 8, generator=draw)
    wanted = select(x, rows, top_k=2)
    assert torch.allclose(ridge(x, x @ rows.T), rows, atol=1e-2)
    fitted = logistic(x, wanted, weight=torch.ones(2000))
    assert (select(x, fitted, top_k=2) == wanted).float().mean() > 0.93


def _planted(seed=0):
    """4 hidden experts of 6 neurons, one for each quarter of the plane, and 6 neurons that always work."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(1600, 8, generator=draw)
    quarter = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    on = torch.cat([torch.nn.functional.one_hot(quarter, 4).repeat_interleave(6, 1), torch.ones(1600, 6).long()], 1)
    h = torch.randn(1600, 30, generator=draw) * (on + 0.02)
    order = torch.randperm(30, generator=draw)
    down = torch.randn(8, 30, generator=draw)
    return Ffn(x, h[:, order], down[:, order], 0, 0), (torch.arange(30) // 6)[order]


def test_planted_experts_and_the_shared_one_are_found():
    ffn, truth = _planted()
    cut = split_ffn(ffn, pieces=5, active=3, always=[1])
    assert sorted(cut.neurons.flatten().tolist()) == list(range(30))
    assert set(truth[cut.neurons[0]].tolist()) == {4}
    assert all(len(set(truth[piece].tolist())) == 1 for piece in cut.neurons)
    random = split_ffn(ffn, pieces=5, active=3, always=[1], clustering="random")
    assert cut.error < 0.1 * random.error
    again = split_ffn(ffn, pieces=5, active=3, always=[1])
    assert torch.equal(again.neurons, cut.neurons) and torch.equal(again.router, cut.router)


def test_the_number_always_on_is_the_one_with_the_smallest_error():
    ffn, _ = _planted()
    errors = {n: split_ffn(ffn, pieces=5, active=2, always=[n]).error for n in (0, 1, 2)}
    assert split_ffn(ffn, pieces=5, active=2, always=[0, 1, 2]).always == min(errors, key=errors.get) == 1


def test_the_compensated_error_is_without_the_mean_of_what_is_missing():
    ffn, _ = _planted()
    moved = Ffn(ffn.x, ffn.h + 1.0, ffn.down, 0, 0)
    cut = split_ffn(moved, pieces=5, active=3, always=[3])
    assert cut.router.shape == (2, 8) and cut.compensated < 0.8 * cut.error


@pytest.fixture
def dense(tmp_path):
    path = add_tokenizer(tiny.make_dense(tmp_path / "dense", dtype="F32"))
    (tmp_path / "text.txt").write_text(text(600, words=WORDS))
    return path


def test_neuron_statistics_are_those_of_the_definition(tmp_path, dense):
    calibrate(dense, tmp_path / "stats", data=[str(tmp_path / "text.txt")], seq_len=16, sample_tokens=10**6)
    model = open_model(dense)
    found = load_neurons(tmp_path / "stats", model)
    weights = {p: torch.frombuffer(bytearray(model.checkpoint.read(model.ffn_name(p, layer=1))), dtype=torch.float32)
               .view(model.checkpoint.tensors[model.ffn_name(p, layer=1)].shape) for p in ("gate", "up")}  # fmt: skip
    x = found.field(1, "inputs")
    h = torch.nn.functional.silu(x @ weights["gate"].T) * (x @ weights["up"].T)
    assert len(x) == found.metadata["tokens"]
    assert torch.allclose(found.field(1, "mean"), h.mean(0), atol=0.02 * float(h.std()))  # inputs are kept in bfloat16
    assert torch.allclose(found.field(1, "energy"), h.square().mean(0), rtol=0.05, atol=1e-6)
    top = torch.topk(h.abs(), round(0.1 * h.shape[1]), dim=1).indices
    rate = torch.bincount(top.flatten(), minlength=h.shape[1]) / len(h)
    assert (found.field(1, "rate") - rate).abs().max() < 0.05
    with pytest.raises(InputError, match="another model"):
        load_neurons(tmp_path / "stats", open_model(tiny.make_dense(tmp_path / "other", seed=5)))


def _codes(cli, *arguments):
    done = cli("upcycle", *arguments, "--method", "split", "--json")
    return done.code, done.json


def test_a_dry_run_states_the_sizes_that_the_run_has(tmp_path, cli, dense):
    flags = ("--experts", 3, "--top-k", 1, "--no-check")
    code, planned = _codes(cli, dense, tmp_path / "moe", *flags, "--dry-run")
    assert code == 0 and planned["upcycle"]["active_share"] == 0.5
    code, done = _codes(cli, dense, tmp_path / "moe", *flags, "--data", tmp_path / "text.txt")
    assert code == 0, done
    assert (done["bytes"], done["parameters"]) == (planned["bytes"], planned["parameters"])
    assert [row["layer"] for row in done["upcycle"]["layers"]] == list(range(open_model(dense).num_layers))
    assert cli("verify", tmp_path / "moe", "--load", "--json").json["ok"]


def test_a_single_expert_is_every_tokens_own(tmp_path, cli, dense):
    flags = ("--experts", 1, "--to", "mixtral", "--data", tmp_path / "text.txt")
    code, done = _codes(cli, dense, tmp_path / "moe", *flags)
    assert code == 0 and done["upcycle"]["top_k"] == 1, done


@pytest.mark.parametrize(
    ("code", "words", "flags"),
    [
        (2, "needs --stats or --data", ()),
        (2, "data chooses the layers", ("--layers", "auto:1", "--to", "qwen2_moe", "--dry-run")),
        (2, "auto needs a number from 1", ("--layers", "auto:9", "--to", "qwen2_moe", "--dry-run")),
        (3, "cannot leave each of them dense", ("--layers", "auto:1", "--data", "x")),
        (2, "equal pieces", ("--granularity", "2", "--dry-run")),
        (2, "number of experts that are always on", ("--shared-experts", "0.25", "--dry-run")),
        (3, "does not exist", ("--stats", "nowhere")),
        (2, "--top-k 4 must be from 1", ("--top-k", "4", "--data", "nowhere")),  # before anything is read
        (2, "of the best 2 experts", ("--experts", "1", "--to", "glm4_moe", "--data", "nowhere")),
        (3, "rounds to zero", ("--dtype", "float16", "--dry-run")),
    ],
)
def test_refusals(tmp_path, cli, dense, code, words, flags):
    found, answer = _codes(cli, dense, tmp_path / "moe", "--experts", 3, "--top-k", 1, *flags)
    assert found == code and words in answer["error"]["message"], answer
    assert not (tmp_path / "moe").exists()
