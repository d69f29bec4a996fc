"""tune: the straight-through gradient, the objectives, the balance loss, and the overlay that comes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from contract.stock import DENSE_CASES, load, logits, relative_difference, save_stock
from words import WORDS, add_tokenizer, text

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.data.windows import load_tokens
from moeconv.errors import InputError, OutputError, UsageError
from moeconv.families.model import Model, open_model
from moeconv.families.records import Routing
from moeconv.plan.execute import execute
from moeconv.quantize.planner import plan_quantize
from moeconv.stream.layers import LayerStream
from moeconv.stream.skeleton import Skeleton
from moeconv.tune import losses
from moeconv.tune.losses import RoutingLoad, balance_loss, counts_of
from moeconv.tune.network import fill_block, load_network
from moeconv.tune.optimise import Schedule
from moeconv.tune.parameters import pieces_of, written
from moeconv.tune.planner import plan_overlay
from moeconv.tune.routing import Routed, recording, straight_through_weights
from moeconv.tune.run import tune
from moeconv.tune.windows import batches
from moeconv.upcycle.planner import plan_upcycle

EXPERTS, HIDDEN, SEQ_LEN = 4, 32, 16
ROUTED = {
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {"norm_topk_prob": True}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe-plain": ("qwen3_moe", {"norm_topk_prob": False}),
    "olmoe": ("olmoe", {"norm_topk_prob": False}),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def scale(path: Path, factor: float, *, only: str = "") -> Path:
    """Multiply matrices, so that a random model's FFNs and logits say something."""
    tensors = tiny.read_tensors(path)
    for name, (dtype, shape, data) in tensors.items():
        if len(shape) == 2 and only in name:
            tensors[name] = (dtype, shape, tiny.encode(tiny.decode(data, dtype, shape) * factor, dtype))
    tiny.write_shards(path, tensors)
    return path


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return add_tokenizer(scale(tiny.make_dense(tmp_path / "dense", "llama"), 5))


def upcycled(dense: Path, out: Path, **parameters: Any) -> Path:
    model = open_model(dense)
    plan = plan_upcycle(model, **({"experts": EXPERTS, "top_k": 2, "method": "drop"} | parameters))
    execute(plan, source=model.checkpoint, out=out)
    return out


@pytest.fixture
def moe(dense: Path, tmp_path: Path) -> Path:
    return upcycled(dense, tmp_path / "moe")


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "text.txt").write_text(text(2000))
    return (str(tmp_path / "text.txt"),)


def overlay_of(path: Path) -> SafetensorsFile:
    return SafetensorsFile(path)


def train(moe: Path, out: Path, data: tuple[str, ...], **parameters: Any) -> dict[str, Any]:
    return tune(moe, out, **({"data": data, "seq_len": SEQ_LEN, "batch_size": 4, "steps": 12} | parameters))


# -- the gradient ------------------------------------------------------------------------------------------------------


def dense_reference(block: Any, x: torch.Tensor, slope: torch.Tensor, *, top_k: int, renormalise: bool) -> np.ndarray:
    """d<slope, y>/d(router weight) in float64, y the mixture of all experts with the weights that the top-k gives them.

    Weights are probabilities, over the chosen experts' sum where the family renormalises. That sum has no gradient:
    straight through the top-k it is the sum over all experts, which is one.
    """
    router = block.router.weight.detach().double().requires_grad_()
    x, slope = x.double(), slope.double()
    p = torch.softmax(x @ router.T, -1)
    weights = p / p.detach().topk(top_k, -1).values.sum(-1, keepdim=True) if renormalise else p
    made = []
    for e in range(EXPERTS):
        gate, up = (x @ block.experts.gate_up_proj[e].double().T).chunk(2, -1)
        made.append((torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[e].double().T)
    y = torch.einsum("te,eth->th", weights, torch.stack(made))
    (y * slope).sum().backward()
    assert router.grad is not None
    return router.grad.numpy()


@pytest.mark.parametrize(("family", "config"), ROUTED.values(), ids=ROUTED)
def test_straight_through_gradient_is_that_of_the_dense_mixture(tmp_path, family, config):
    path = scale(tiny.make_moe(tmp_path / "moe", family, experts=EXPERTS, dtype="F32", **config), 4)
    model = open_model(path)
    filled = fill_block(Skeleton(model, dtype=torch.float32), 1)
    torch.manual_seed(0)
    x, slope = torch.randn(40, HIDDEN), torch.randn(40, HIDDEN)
    stock = filled.module(x[None])[0]
    filled.block.router.weight.requires_grad_(True)
    assert model.family.experts.routing is not None
    with recording(
        [filled.block], model.family.experts.routing, renormalise=model.renormalises, straight_through=True
    ) as take:
        out = filled.module(x[None])[0]
        assert [r.layer for r in take()] == [1]
    torch.testing.assert_close(out, stock, rtol=1e-5, atol=1e-6)
    (out * slope).sum().backward()
    wanted = dense_reference(filled.block, x, slope, top_k=2, renormalise=model.renormalises)
    found = filled.block.router.weight.grad.numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())


RULES = {
    "softmax": (Routing("softmax"), False, 1.0),
    "softmax renormalised": (Routing("softmax"), True, 1.0),
    "softmax of the chosen": (Routing("softmax_topk"), True, 1.0),
    "sigmoid": (Routing("sigmoid"), False, 2.5),
    "sigmoid renormalised and scaled": (Routing("sigmoid"), True, 2.5),
}


@pytest.mark.parametrize(("rule", "renormalise", "scale"), RULES.values(), ids=RULES)
def test_straight_through_weights_have_the_gradient_of_their_rule(rule, renormalise, scale):
    """Against the derivative by hand: of w_i = c u_i / sum(u) by u_j it is c (delta_ij - w_i / c) / sum(u)."""
    rng = np.random.default_rng(0)
    z, slope = rng.standard_normal((5, 6)), rng.standard_normal((5, 6))
    s = 1 / (1 + np.exp(-z)) if rule.score == "sigmoid" else np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    chosen = np.argsort(-s, -1)[:, :2]
    u = np.zeros_like(s)
    np.put_along_axis(u, chosen, np.take_along_axis(s, chosen, -1), -1)
    total = u.sum(-1, keepdims=True)
    w = scale * (u / total if renormalise else u)
    by_u = (scale * slope - (slope * w).sum(-1, keepdims=True)) / total if renormalise else scale * slope
    by_z = by_u * s * (1 - s) if rule.score == "sigmoid" else s * (by_u - (by_u * s).sum(-1, keepdims=True))

    logits = torch.tensor(z, requires_grad=True)
    weights = torch.tensor(np.take_along_axis(w, chosen, -1))
    made = straight_through_weights(logits, torch.tensor(chosen), weights, rule, renormalise)
    np.testing.assert_allclose(made.detach().numpy(), w, rtol=1e-12)
    (made * torch.tensor(slope)).sum().backward()
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), by_z, rtol=1e-9, atol=1e-12)


def test_without_straight_through_gradients_are_those_of_the_stock_model(tmp_path):
    path = scale(tiny.make_moe(tmp_path / "moe", "mixtral", experts=EXPERTS, dtype="F32"), 4)
    model = open_model(path)
    filled = fill_block(Skeleton(model, dtype=torch.float32), 0)
    filled.module.requires_grad_(True)
    x = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = []
    for watched in (False, True):
        filled.module.zero_grad()
        x.grad = None
        if watched:
            with recording([filled.block], Routing(), renormalise=True, straight_through=False):
                filled.module(x[None])[0].square().sum().backward()
        else:
            filled.module(x[None])[0].square().sum().backward()
        assert x.grad is not None
        found.append([x.grad.clone(), *(p.grad.clone() for p in filled.module.parameters())])
    for stock, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(filled.block.experts)  # the class's own is back


def test_experts_get_a_gradient_only_from_tokens_that_chose_them(tmp_path):
    path = scale(tiny.make_moe(tmp_path / "moe", "mixtral", experts=EXPERTS, dtype="F32"), 4)
    filled = fill_block(Skeleton(open_model(path), dtype=torch.float32), 0)
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(2))
    filled.module.requires_grad_(True)
    with recording([filled.block], Routing(), renormalise=True, straight_through=True) as take:
        out = filled.module(x[None])[0]
        (routed,) = take()
    out.sum().backward()
    moved = filled.block.experts.gate_up_proj.grad.abs().sum((1, 2)) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(routed.chosen[0].tolist())


def test_balance_loss_is_taken_per_layer_and_not_pooled():
    """Four layers that each collapse on another expert pool to a perfect balance, and are none."""
    logits = [torch.full((8, 4), -20.0).index_fill_(1, torch.tensor([e]), 20.0) for e in range(4)]
    routed = [Routed(e, x, x.topk(1).indices) for e, x in enumerate(logits)]
    assert float(balance_loss(routed, Routing(), counts_of(routed))) == pytest.approx(4.0)
    even = Routed(0, torch.eye(4).repeat(2, 1) * 50, torch.arange(4).repeat(2)[:, None])
    assert float(balance_loss([even], Routing(), counts_of([even]))) == pytest.approx(1.0)
    load = RoutingLoad(0, 4, Routing())
    load.add(even)
    load.add(Routed(0, logits[1], routed[1].chosen))
    share = np.array([2, 10, 2, 2]) / 16  # 8 tokens spread evenly, 8 on expert 1
    assert load.balance() == pytest.approx(4 * (share * share).sum(), rel=1e-5)
    assert load.to_json()["max_over_mean"] == pytest.approx(2.5)


def test_losses_in_slices_are_the_losses_at_once(monkeypatch):
    torch.manual_seed(0)
    hidden, target = torch.randn(11, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    head, teacher = torch.nn.Linear(8, 5, dtype=torch.float64), torch.nn.Linear(8, 5, dtype=torch.float64)
    found = []
    for logits_at_once in (1, 15, 1 << 20):  # one row, three rows, all rows
        monkeypatch.setattr(losses, "_LOGITS", logits_at_once)
        rows = losses.divergence(head, teacher, target)
        value, gradient = losses.mean_and_gradient(hidden, rows, vocabulary=5)
        assert losses.total(hidden, rows, vocabulary=5) == pytest.approx(11 * value, rel=1e-5)
        found.append((value, gradient))
    leaf = hidden.clone().requires_grad_()
    wanted = torch.nn.functional.kl_div(
        head(leaf).log_softmax(-1), teacher(target).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    wanted.backward()
    for value, gradient in found:
        assert value == pytest.approx(wanted.item(), rel=1e-5)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-6)


# -- objectives --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("words", ["router", "router,experts", "norms"])
def test_distill_lowers_the_divergence_from_the_teacher(moe, dense, data, tmp_path, words):
    block = train(
        moe, tmp_path / "o", data, objective="distill", teacher=str(dense), train=words, learning_rate=3e-3, steps=20
    )  # fmt: skip
    assert block["improved"] and block["kl_after"] < block["kl_before"]
    assert block["tokens"]["held_out"] >= 4 * SEQ_LEN
    assert [row["layer"] for row in block["layers"]] == [0, 1]
    for row in (*block["layers"], *(row["before"] for row in block["layers"])):
        assert sum(row["load"]) == pytest.approx(1) and 0 < row["entropy"] <= np.log(EXPERTS) + 1e-6


def test_lm_lowers_the_next_token_loss(moe, data, tmp_path):
    block = train(moe, tmp_path / "o", data, objective="lm", train="router,experts", learning_rate=3e-3, z_loss=1e-3)
    assert block["improved"] and block["loss_after"] < block["loss_before"]
    assert block["kl_before"] is None and block["objective"] == "lm"


@pytest.mark.slow
def test_layerwise_lowers_every_layers_error(moe, dense, data, tmp_path, monkeypatch):
    monkeypatch.setattr("moeconv.stream.need._PROCESS", 0)  # a budget that the activations do not fit into
    block = train(
        moe, tmp_path / "o", data, objective="layerwise", teacher=str(dense), train="router,experts",
        learning_rate=1e-2, max_memory="1MB",
    )  # fmt: skip
    for row in block["layers"]:
        assert row["improved"] and row["error"] < 0.8 * row["before"]["error"], row
    assert block["error_after"] < block["error_before"] and block["loss_after"] is None
    whole = train(
        applied(moe, tmp_path / "o", tmp_path / "fitted"), tmp_path / "o2", data, objective="distill",
        teacher=str(dense), steps=1,
    )  # fmt: skip
    before = train(moe, tmp_path / "o3", data, objective="distill", teacher=str(dense), steps=1)
    assert whole["kl_before"] < before["kl_before"]


def test_layerwise_takes_an_unedited_moe_as_teacher(tmp_path, data):
    teacher = add_tokenizer(scale(tiny.make_moe(tmp_path / "t", "qwen2_moe", experts=EXPERTS, dtype="F32"), 4))
    student = add_tokenizer(scale(tiny.make_moe(tmp_path / "s", "qwen2_moe", experts=EXPERTS, dtype="F32"), 4))
    scale(student, 0.5, only="mlp.experts.1.down")
    block = train(
        student, tmp_path / "o", data, objective="layerwise", teacher=str(teacher), train="router,experts,shared",
        learning_rate=3e-3,
    )  # fmt: skip
    assert block["improved"] and block["error_after"] < block["error_before"]


# dense case of the contract suite -> target, and whether the FFN means the same in both
FAMILIES = {
    "qwen2->glm4_moe": ("qwen2", "glm4_moe", True),
    "lfm2->lfm2_moe": ("lfm2", "lfm2_moe", True),
    "cohere->cohere2_moe": ("cohere", "cohere2_moe", True),
    "stablelm->phimoe": ("stablelm", "phimoe", True),
    "granite->mixtral": ("granite", "mixtral", False),
    "olmo->mixtral": ("olmo", "mixtral", False),
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "target", "same"), FAMILIES.values(), ids=FAMILIES)
def test_families(tmp_path, data, case, target, same):
    """Router score functions, shared experts, scaled logits, and FFNs that a conversion rescaled."""
    dense = add_tokenizer(save_stock(tmp_path / "dense", *DENSE_CASES[case], dtype=torch.float32))
    moe = upcycled(dense, tmp_path / "moe", to=target)
    for path in (dense, moe):
        network = load_network(open_model(path), device=torch.device("cpu"))
        tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            made = network.head(network.hidden(tokens).flatten(0, 1)).view(2, 24, -1)
        assert relative_difference(logits(load(path)), made) < 1e-5
    parameters = {"teacher": str(dense), "train": "router,experts", "learning_rate": 1e-3, "steps": 20}
    assert train(moe, tmp_path / "a", data, objective="distill", **parameters)["improved"]
    if same:
        block = train(moe, tmp_path / "b", data, objective="layerwise", **parameters)
        assert block["error_after"] < 0.8 * block["error_before"]
    else:
        with pytest.raises(InputError, match="are no targets for this model"):
            train(moe, tmp_path / "b", data, objective="layerwise", **parameters)


def test_packed_experts_are_refused(tmp_path, data):
    dense = add_tokenizer(save_stock(tmp_path / "dense", *DENSE_CASES["granite"], dtype=torch.float32))
    with pytest.raises(InputError, match="one tensor"):
        train(upcycled(dense, tmp_path / "moe", to="granitemoe"), tmp_path / "o", data, objective="lm")


def test_a_routing_rule_without_straight_through_says_so_when_asked(tmp_path, data):
    dense = add_tokenizer(save_stock(tmp_path / "dense", *DENSE_CASES["stablelm"], dtype=torch.float32))
    moe = upcycled(dense, tmp_path / "moe", to="phimoe")
    asked = train(moe, tmp_path / "a", data, objective="lm", straight_through=True, steps=1)
    assert any("--straight-through" in text for text in asked["warnings"])
    assert not any(
        "--straight-through" in text for text in train(moe, tmp_path / "b", data, objective="lm", steps=1)["warnings"]
    )


def collapse(path: Path) -> None:
    """Make every token of a layer choose two experts, others in each layer: a direction that all inputs share leads
    to them."""
    tensors, layer = tiny.read_tensors(path), 0
    for name, (dtype, shape, data) in tensors.items():
        values = tiny.decode(data, dtype, shape).copy()
        if name.endswith("embed_tokens.weight"):
            values[:, 0] = 3
        elif shape == (EXPERTS * 2, HIDDEN):
            values *= 2
            values[:, 0] = 0
            values[2 * layer : 2 * layer + 2, 0] = 1
            layer += 1
        else:
            continue
        tensors[name] = (dtype, shape, tiny.encode(values, dtype))
    tiny.write_shards(path, tensors)
    (path / "moeconv_manifest.json").unlink()


def pooled_loss(path: Path, data: tuple[str, ...]) -> float:
    """transformers' auxiliary loss, which pools the layers; its minimum is top_k."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    windows = load_tokens(data, path, tokens=None, seq_len=SEQ_LEN, seed=0).windows
    stream = LayerStream(open_model(path), windows, batch_size=len(windows))
    logits = tuple(batch.router_logits for layer in stream.layers() for batch in layer.batches())
    return float(load_balancing_loss_func(logits, EXPERTS * 2, 2))


@pytest.mark.slow
def test_balance_alone_spreads_collapsed_routers_that_a_pooled_loss_takes_for_balanced(tmp_path):
    """Four layers, each collapsed on two other experts of eight, which all are copies."""
    dense = add_tokenizer(scale(tiny.make_dense(tmp_path / "dense", "llama", layers=4), 5))
    (tmp_path / "text.txt").write_text(text(6000))
    data = (str(tmp_path / "text.txt"),)
    moe = upcycled(dense, tmp_path / "moe", experts=EXPERTS * 2, method="copy")
    collapse(moe)
    assert pooled_loss(moe, data) < 2.1  # 2 is perfect
    block = train(moe, tmp_path / "o", data, balance_only=True, batch_size=16, learning_rate=3e-3, steps=120)
    assert block["objective"] == "balance" and block["improved"]
    for row in block["layers"]:
        assert row["before"]["max_over_mean"] > 3.7 and row["before"]["dead"] >= 2
        assert row["max_over_mean"] < 1.5 and row["dead"] == 0, row
    assert block["loss_after"] == pytest.approx(block["loss_before"], abs=1e-3)  # the experts are the same
    assert pooled_loss(applied(moe, tmp_path / "o", tmp_path / "out"), data) < 2.1


@pytest.mark.slow
def test_the_command_shows_every_layer_before_and_after_and_counts_training_as_time(moe, dense, data, tmp_path, cli):
    asked = ("--data", data[0], "--teacher", dense, "--seq-len", SEQ_LEN, "--steps", 3, "--train", "router,experts")
    done = cli("tune", moe, tmp_path / "out", *asked)
    assert done.code == 0, done.err
    head, *rows = [line for line in done.out.splitlines() if line][-3:]
    assert head.split()[:2] == ["layer", "error"] and "max/mean load" in head
    assert [row.split()[0] for row in rows] == ["0", "1"] and all(row.count(" -> ") == 4 for row in rows)
    said = cli("tune", moe, tmp_path / "out", *asked, "--overwrite", "--json").json
    assert said["seconds"] > said["tune"]["seconds"] > 0
    assert [r["layer"] for r in said["tune"]["layers"]] == [0, 1]


# -- guards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters",
    [{"objective": "lm"}, {"objective": "distill"}, {"objective": "layerwise"},
     {"objective": "distill", "train": "router,experts"}],
    ids=str,
)  # fmt: skip
def test_identical_experts_stop_before_the_data_is_read(dense, tmp_path, parameters):
    moe = upcycled(dense, tmp_path / "copies", method="copy")
    if parameters["objective"] != "lm":
        parameters = parameters | {"teacher": str(dense)}
    with pytest.raises(InputError, match="identical copies") as caught:
        train(moe, tmp_path / "o", ("/nowhere/text.txt",), **parameters)
    for remedy in ("noise", "drop", "--balance-only"):
        assert remedy in caught.value.hint
    assert not (tmp_path / "o").exists()


def test_next_token_loss_tells_copies_apart_when_experts_train(dense, data, tmp_path):
    moe = upcycled(dense, tmp_path / "copies", method="copy")
    block = train(moe, tmp_path / "o", data, objective="lm", train="router,experts", learning_rate=3e-3)
    assert block["improved"]
    overlay, model = overlay_of(tmp_path / "o"), open_model(moe)
    names = [model.expert_name("gate", layer=0, expert=e) for e in range(2)]
    assert overlay.read(names[0]) != overlay.read(names[1])


def test_one_layer_of_copies_is_a_warning(moe, dense, data, tmp_path):
    tensors = tiny.read_tensors(moe)
    model = open_model(moe)
    for part in ("gate", "up", "down"):
        first = tensors[model.expert_name(part, layer=0, expert=0)]
        for e in range(EXPERTS):
            tensors[model.expert_name(part, layer=0, expert=e)] = first
    tiny.write_shards(moe, tensors)
    block = train(moe, tmp_path / "o", data, objective="distill", teacher=str(dense), learning_rate=3e-3)
    assert any("layer 0" in text and "identical" in text for text in block["warnings"])


def test_top_1_renormalised_without_straight_through_has_no_gradient(dense, data, tmp_path):
    moe = upcycled(dense, tmp_path / "one", top_k=1)
    with pytest.raises(InputError, match="always 1"):
        train(moe, tmp_path / "o", data, objective="lm", straight_through=False)
    with_it = train(moe, tmp_path / "o", data, objective="distill", teacher=str(dense), learning_rate=3e-3, steps=30)
    assert with_it["improved"]


def test_default_rates_follow_width_objective_and_what_trains(moe, dense, data, tmp_path):
    def rates(name: str, **parameters: Any) -> dict[str, float]:
        return train(moe, tmp_path / name, data, steps=1, **parameters)["learning_rate"]

    assert rates("a", objective="lm") == {"router": 0.01}  # 1.28 / 32, and at most 0.01
    assert rates("b", objective="lm", train="experts,router,norms") == {
        "router": 0.004, "experts": 0.008, "norms": 0.001,
    }  # fmt: skip
    assert rates("c", teacher=str(dense), train="router,experts") == {"router": 0.004, "experts": 0.01}
    assert rates("d", objective="lm", learning_rate=0.5) == {"router": 0.5}
    assert rates("e", objective="distill", teacher=str(moe)) == {"router": 0.004}  # it has learned already


@pytest.mark.parametrize("rate", [1e4, 1e30])
def test_never_worse(moe, dense, data, tmp_path, rate):
    block = train(
        moe, tmp_path / "o", data, objective="distill", teacher=str(dense), train="router,experts", learning_rate=rate
    )  # fmt: skip
    assert not block["improved"] and block["kl_after"] == block["kl_before"]
    assert any("did not improve" in text for text in block["warnings"])
    overlay, source = overlay_of(tmp_path / "o"), open_model(moe).checkpoint
    assert len(overlay.tensors) == 2 * (1 + 3 * EXPERTS)
    assert all(overlay.read(name) == source.read(name) for name in overlay.tensors)


def test_refusals(moe, dense, data, tmp_path):
    out = tmp_path / "o"
    with pytest.raises(UsageError, match="teacher"):
        train(moe, out, data)
    with pytest.raises(UsageError, match="--train"):
        train(moe, out, data, objective="lm", train="router,head")
    with pytest.raises(UsageError, match="--steps"):
        train(moe, out, data, objective="lm", steps=0)
    with pytest.raises(UsageError, match="--balance-only"):
        train(moe, out, data, train="experts", balance_only=True)
    with pytest.raises(UsageError, match="norms"):
        train(moe, out, data, train="norms", teacher=str(dense))
    with pytest.raises(InputError, match="no tensor that --train"):
        train(moe, out, data, objective="lm", train="shared")
    with pytest.raises(InputError, match="dense"):
        train(dense, out, data, objective="lm")
    other = add_tokenizer(tiny.make_dense(tmp_path / "other", "llama", layers=3))
    with pytest.raises(InputError, match="3 layers"):
        train(moe, out, data, teacher=str(other))
    foreign = add_tokenizer(tiny.make_dense(tmp_path / "foreign", "llama"), words=WORDS[::-1])
    with pytest.raises(InputError, match="tokenizer"):
        train(moe, out, data, objective="distill", teacher=str(foreign))
    out.write_bytes(b"here")
    with pytest.raises(OutputError, match="exists"):
        train(moe, out, data, objective="lm")


@pytest.mark.slow
def test_a_quantized_student_is_refused_and_a_quantized_teacher_is_not(dense, data, tmp_path):
    wide = add_tokenizer(scale(tiny.make_dense(tmp_path / "wide", "llama", hidden=64, intermediate=64), 2))
    copies, moe = open_model(upcycled(wide, tmp_path / "copies", method="copy")), upcycled(wide, tmp_path / "moe")
    packed = tmp_path / "int8"
    execute(plan_quantize(copies, scheme="int8"), source=copies.checkpoint, out=packed)
    with pytest.raises(InputError, match="quantized"):
        train(packed, tmp_path / "o", data, objective="lm")
    parameters = {"teacher": str(packed), "learning_rate": 1e-3, "train": "router,experts"}
    for objective in ("distill", "layerwise"):
        assert train(moe, tmp_path / objective, data, objective=objective, **parameters)["improved"]


# -- the overlay -------------------------------------------------------------------------------------------------------


def applied(moe: Path, overlay_path: Path, out: Path, **parameters: Any) -> Path:
    model, overlay = open_model(moe), overlay_of(overlay_path)
    plan = plan_overlay(model, overlay, **parameters)
    execute(plan, source=model.checkpoint, out=out, origins={"overlay": overlay})
    return out


def test_applying_an_overlay_changes_its_tensors_and_no_others(moe, dense, data, tmp_path):
    train(moe, tmp_path / "o", data, objective="distill", teacher=str(dense), learning_rate=3e-3)
    overlay, before = overlay_of(tmp_path / "o"), tiny.read_tensors(moe)
    assert set(overlay.tensors) == {open_model(moe).router_name(layer) for layer in range(2)}
    after = tiny.read_tensors(applied(moe, tmp_path / "o", tmp_path / "out"))
    assert list(after) == list(before)
    for name, (dtype, shape, value) in after.items():
        assert (dtype, shape) == before[name][:2]
        assert value == (bytes(overlay.read(name)) if name in overlay.tensors else before[name][2])
    assert after != before
    plan = plan_overlay(open_model(moe), overlay)
    assert plan.promise == plan.changed == {"router": 2} and plan.command == "tune"
    with torch.no_grad():  # what was measured is what the applied model computes
        tokens = torch.arange(2, 50).reshape(3, 16)
        loaded = load_network(open_model(tmp_path / "out"), device=torch.device("cpu"))
        assert bool(loaded.hidden(tokens).isfinite().all())


def test_measured_after_is_measured_before_of_the_applied_model(moe, dense, data, tmp_path):
    first = train(moe, tmp_path / "o", data, objective="distill", teacher=str(dense), train="router,experts,norms",
                  learning_rate=3e-3)  # fmt: skip
    tuned = applied(moe, tmp_path / "o", tmp_path / "out")
    second = train(tuned, tmp_path / "o2", data, objective="distill", teacher=str(dense), steps=12)
    assert second["kl_before"] == pytest.approx(first["kl_after"], rel=1e-5)
    assert second["loss_before"] == pytest.approx(first["loss_after"], rel=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe"])
def test_pieces_are_the_tensors_on_disk(tmp_path, family):
    path = tiny.make_moe(tmp_path / "moe", family, experts=EXPERTS, norm_topk_prob=True)
    model = open_model(path)
    network = load_network(model, device=torch.device("cpu"))
    words = ("router", "experts", "shared", "norms")
    pieces = pieces_of(model, words, blocks=network.blocks, named=network.named)
    stored = tiny.read_tensors(path)
    wanted = {n for n, r in model.roles.items() if r.group in ("router", "expert", "shared", "norm")}
    assert {p.name for p in pieces} == wanted
    for name, value in written(pieces):
        assert value.contiguous().view(torch.uint8).numpy().tobytes() == stored[name][2], name


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(moe, dense, data, tmp_path):
    def overlay(name: str, **parameters: Any) -> bytes:
        train(moe, tmp_path / name, data, objective="distill", teacher=str(dense), learning_rate=3e-3, **parameters)
        return (tmp_path / name).read_bytes()

    assert overlay("a", seed=1) == overlay("b", seed=1) != overlay("c", seed=2)


def write_overlay(path: Path, model: Model, **tensors: tuple[str, tuple[int, ...], bytes]) -> SafetensorsFile:
    metadata = artifact_metadata("overlay", identity=model.identity, objective="lm")
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    path.write_bytes(tiny.safetensors_bytes(named, **metadata))
    return overlay_of(path)


def test_overlays_that_do_not_fit_are_refused(moe, dense, data, tmp_path):
    train(moe, tmp_path / "o", data, objective="distill", teacher=str(dense))
    other = open_model(upcycled(dense, tmp_path / "other", seed=5))
    with pytest.raises(InputError, match="another checkpoint"):
        plan_overlay(other, overlay_of(tmp_path / "o"))
    model = open_model(moe)
    router = model.router_name(0)
    with pytest.raises(InputError, match="no tensor 'nothing'"):
        plan_overlay(model, write_overlay(tmp_path / "1", model, nothing=("F32", (1,), bytes(4))))
    with pytest.raises(InputError, match=r"\[2, 32\]"):
        plan_overlay(model, write_overlay(tmp_path / "2", model, **{router: ("BF16", (2, HIDDEN), bytes(128))}))
    with pytest.raises(InputError, match="U8"):
        plan_overlay(model, write_overlay(tmp_path / "3", model, **{router: ("U8", (EXPERTS, HIDDEN), bytes(128))}))
    with pytest.raises(InputError, match="not a moeconv overlay"):
        plan_overlay(model, SafetensorsFile(moe / "model.safetensors"))
    with pytest.raises(UsageError, match="unknown parameter"):
        plan_overlay(model, overlay_of(tmp_path / "o"), steps=3)


def test_dtype_casts_overlay_and_source_alike_and_the_plan_follows_the_overlays_bytes(moe, tmp_path):
    model = open_model(moe)
    router = model.router_name(0)
    half = np.arange(EXPERTS * HIDDEN, dtype=np.float32).reshape(EXPERTS, HIDDEN) / 8
    overlays = [
        write_overlay(tmp_path / str(i), model, **{router: ("F32", half.shape, tiny.encode(half + i, "F32"))})
        for i in range(2)
    ]
    plans = [plan_overlay(model, overlay) for overlay in overlays]
    assert plans[0].plan_id != plans[1].plan_id and plans[0].promise == {"router": 1}
    out = applied(moe, tmp_path / "0", tmp_path / "out", dtype="float16")
    tensors = tiny.read_tensors(out)
    assert {dtype for dtype, _, _ in tensors.values()} == {"F16"}
    np.testing.assert_array_equal(tiny.decode(tensors[router][2], "F16", half.shape), half.astype(np.float16))
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_schedule_warms_up_and_ends_at_a_tenth():
    shares = [Schedule(100, {}).rate_at(i) for i in range(100)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and max(shares) == 1
    assert shares[10:] == sorted(shares[10:], reverse=True) and shares[-1] == pytest.approx(0.1, abs=1e-3)
    linear, constant = (Schedule(100, {}, schedule, warmup=0.0) for schedule in ("linear", "constant"))
    assert [linear.rate_at(i) for i in (0, 50, 100)] == pytest.approx([1, 0.55, 0.1])
    assert {constant.rate_at(i) for i in range(100)} == {1.0}
    assert (
        Schedule(100, {}).evaluations() == {25, 50, 75, 100}
        and Schedule(1, {}).evaluations() == {1}
        and Schedule(2, {}).evaluations() >= {1, 2}
    )
    assert Schedule(10, {}, look_every=4).evaluations() == {4, 8, 10}


def test_batches_visit_everything_once_before_anything_twice():
    order = batches(10, 4, key=(0, "x"))
    drawn = np.concatenate([next(order) for _ in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    again = batches(10, 4, key=(0, "x"))
    np.testing.assert_array_equal(drawn[:4], next(again))


def test_routers_that_were_written_small_train_as_if_they_were_not(tmp_path: Path) -> None:
    """The manifest says the scale: logits, gradients and what is written are then those of the unscaled router."""
    scale = 2.0**-16
    models = {}
    for name in ("plain", "small"):
        models[name] = add_tokenizer(tiny.make_moe(tmp_path / name, "mixtral", experts=4, top_k=2, dtype="F32"))
    routers = {}
    tensors = tiny.read_tensors(models["small"])
    for name, (dtype, shape, data) in tensors.items():
        if shape[0] == 4:
            routers[name] = tiny.decode(data, dtype, shape)
            tensors[name] = (dtype, shape, tiny.encode(routers[name] * scale, dtype))
    tiny.write_shards(models["small"], tensors)
    manifest = {
        "manifest_version": 1,
        "steps": [{"parameters": {"router_scale": scale}}, {"parameters": {}}],
        "files": {},
    }
    (models["small"] / "moeconv_manifest.json").write_text(json.dumps(manifest))
    small, plain = (load_network(open_model(models[n]), device=torch.device("cpu")) for n in ("small", "plain"))
    tokens = torch.arange(4, 12)[None]
    for block, other in zip(small.blocks, plain.blocks):
        assert torch.equal(block.router.weight, other.router.weight) and block.scale == scale
        x = torch.randn(5, block.router.weight.shape[1], generator=torch.Generator().manual_seed(0))
        got, want = block.router(x), other.router(x)
        assert torch.allclose(got[0] / scale, want[0], atol=1e-5) and torch.equal(got[2], want[2])
    rule = open_model(models["small"]).family.experts.routing
    with recording(small.blocks, rule, renormalise=True, straight_through=True) as take:
        small.blocks[0].router.weight.requires_grad_(True)
        small.hidden(tokens).square().sum().backward()
        assert take()[0].logits.abs().max() > 1e-3
    assert small.blocks[0].router.weight.grad.abs().max() > 1e-6
    pieces = pieces_of(open_model(models["small"]), ("router",), blocks=small.blocks, named={})
    for name, value in written(pieces):
        assert np.array_equal(value.numpy(), routers[name] * np.float32(scale))
