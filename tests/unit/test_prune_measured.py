"""Pruning by what was measured: reap on whole models, masked variants against files, refit, merge, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from words import add_tokenizer, text

from moeconv.calibrate.artifact import load_statistics
from moeconv.calibrate.run import calibrate
from moeconv.data.heldout import held_out
from moeconv.data.windows import load_tokens, split_windows
from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.families.rule import route, rule_of
from moeconv.plan.execute import execute
from moeconv.prune.criteria import CRITERIA, Evidence, sample_of
from moeconv.prune.planner import plan_prune
from moeconv.prune.repair.pruned import masked, pruned_pass
from moeconv.prune.repair.refit import Refit, Routes, refit_layer
from moeconv.prune.repair.variant import Variant
from moeconv.stream.experts import activations, down_projections
from moeconv.stream.layers import LayerStream
from tests.contract.stock import MOE_CASES, save_stock

NONE: frozenset[int] = frozenset()
SEQ_LEN = 16
ROUTERS = {
    "softmax": ("olmoe", {}),
    "renormalised": ("mixtral", {}),
    "sigmoid-bias": ("dots1", {}),
    "grouped": ("deepseek_v3", {}),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def make(path: Path, case: str = "mixtral", **config: Any) -> Path:
    kind, values = MOE_CASES[case]
    return add_tokenizer(Path(save_stock(path, kind, values | config, dtype=torch.float32)))


def texts(folder: Path) -> list[str]:
    (folder / "common.txt").write_text(text(400, seed=1))
    (folder / "rare.txt").write_text(" ".join(reversed(text(200, seed=2).split())))
    return [str(folder / "common.txt"), str(folder / "rare.txt")]


def measured(path: Path, folder: Path) -> Evidence:
    stats = folder / "stats.safetensors"
    calibrate(path, stats, data=texts(folder), seq_len=SEQ_LEN)
    model = open_model(path)
    return Evidence(statistics=load_statistics(stats), rule=rule_of(model), num_experts=model.num_experts)


# -- criteria on whole models ------------------------------------------------------------------------------------------


def reap_by_hand(path: Path, windows: np.ndarray) -> dict[int, np.ndarray]:
    """Mean of g |f| over the tokens of each expert, on the whole stock model in float64, its experts one by one."""
    from transformers import AutoModelForCausalLM

    model = open_model(path)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    total = {index: np.zeros(model.num_experts) for index in model.moe_layers}
    count = {index: np.zeros(model.num_experts) for index in model.moe_layers}

    def look(index: int):
        def hook(module, args, kwargs):
            x, chosen, weights = (*args, *kwargs.values())[:3]
            for t in range(len(x)):
                for e, g in zip(chosen[t].tolist(), weights[t].tolist()):
                    gate, up = (module.gate_up_proj[e] @ x[t]).chunk(2)
                    f = module.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
                    total[index][e] += g * float(f.norm())
                    count[index][e] += 1

        return hook

    for index in model.moe_layers:
        found = [
            m for m in stock.model.layers[index].modules() if isinstance(getattr(m, "gate_up_proj", 0), torch.Tensor)
        ]
        found[0].register_forward_pre_hook(look(index), with_kwargs=True)
    with torch.no_grad():
        stock(torch.tensor(windows))
    return {index: total[index] / np.maximum(count[index], 1) for index in model.moe_layers}


@pytest.mark.parametrize("router", list(ROUTERS))
def test_reap_is_the_formula_on_a_whole_model(tmp_path: Path, router: str) -> None:
    case, config = ROUTERS[router]
    path = make(tmp_path / "model", case, **config)
    evidence, model = measured(path, tmp_path), open_model(path)
    data = load_tokens(texts(tmp_path), path, tokens=65536, seq_len=SEQ_LEN, seed=0)
    by_hand = reap_by_hand(path, data.windows)
    assert (rule_of(model).groups > 1) == (router == "grouped")
    for layer in model.moe_layers:
        order = CRITERIA["reap"].order(evidence, layer, NONE)
        assert np.allclose(order.scores, by_hand[layer], rtol=1e-4)
    for left in (6, 4):
        if left % model.groups[0] or left // model.groups[0] < 2:
            continue
        plan = plan_prune(model, keep=left, criterion="reap", evidence=evidence)
        for layer in model.moe_layers:
            groups, size = model.groups[0], model.num_experts // model.groups[0]
            want = set()
            for g in range(groups):
                members = sorted(range(g * size, (g + 1) * size), key=lambda e: (-by_hand[layer][e], e))
                want |= set(members[: left // groups])
            assert set(plan.block["keep"][str(layer)]) == want


def test_the_power_family_and_easy_ep_read_their_sums(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    evidence = measured(path, tmp_path)
    assert evidence.statistics is not None

    def field(name: str) -> np.ndarray:
        return evidence.statistics.layer(0, name).sum(axis=0)  # type: ignore[union-attr]

    n = np.maximum(field("count"), 1)
    want = {
        "utilization": field("count"), "saliency": field("gate_norm_sum"), "ean-sum": field("norm_sum"),
        "man": field("norm_sum") / n, "msan": field("norm_sq_sum") / n, "seer-soft": field("gate_sum"),
        "half-saliency": field("gate_norm_sum") / n * n**0.5, "easy-ep": field("easy_ep_sum"),
    }  # fmt: skip
    for name, scores in want.items():
        order = CRITERIA[name].order(evidence, 0, NONE)
        assert np.allclose(order.scores, scores), name
        assert order.experts[0] == int(np.argmin(scores)), name


# -- the routing rule and reconstruction -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["olmoe", "mixtral", "dots1", "deepseek_v3", "gpt_oss", "lfm2_moe", "ernie4_5_moe"])
def test_the_rule_routes_as_the_stock_code_with_experts_masked(tmp_path: Path, case: str) -> None:
    path = make(tmp_path / "model", case)
    evidence, model = measured(path, tmp_path), open_model(path)
    layer_index = model.moe_layers[0]
    sample = sample_of(evidence, layer_index)  # it is there only where the rule reproduces the stock weights
    data = load_tokens(texts(tmp_path), path, tokens=65536, seq_len=SEQ_LEN, seed=0)
    kept = [0, 1, 2, 3, 5, 6] if model.groups[0] == 1 else [e for e in range(8) if e % 4 != 3]
    stream = LayerStream(model, data.windows)
    for layer in stream.layers():
        if layer.index != layer_index:
            continue
        free = next(iter(layer.batches(advance=False, hidden=stream.hidden)))
        with masked(stream, layer, kept):
            batch = next(iter(layer.batches(advance=False, hidden=stream.hidden)))
        logits = free.router_logits.double().numpy()
        allowed = np.isin(np.arange(model.num_experts), kept)
        index, weights = route(sample.rule, logits, allowed, bias=sample.bias, factor=sample.factor)
        mine, stock = np.zeros(logits.shape), np.zeros(logits.shape)
        np.put_along_axis(mine, index, weights, 1)
        np.put_along_axis(stock, batch.top_k_index.numpy(), batch.top_k_weights.double().numpy(), 1)
        assert not stock[:, ~allowed].any()
        assert (np.abs(mine - stock).max(axis=1) < 1e-4).mean() > 0.99
        break


def test_reconstruction_is_the_loss_of_the_masked_layer(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "olmoe")  # hidden 64: the projection is the identity
    evidence, model = measured(path, tmp_path), open_model(path)
    sample = sample_of(evidence, 0)
    data = load_tokens(texts(tmp_path), path, tokens=65536, seq_len=SEQ_LEN, seed=0)
    assert len(sample.logits) == data.tokens, "the sample is all tokens, so that the two losses are of the same ones"
    stream = LayerStream(model, data.windows)
    layer = next(iter(stream.layers()))
    kept = [0, 2, 3, 5, 7]
    whole = [(b.ffn_output, b.residual) for b in layer.batches(advance=False, hidden=stream.hidden)]
    with masked(stream, layer, kept):
        cut = [b.ffn_output for b in layer.batches(advance=False, hidden=stream.hidden)]
    error = torch.cat([(a - b).square().sum(1) / r.square().sum(1) for (a, r), b in zip(whole, cut)]).mean()
    assert sample.loss(kept) == pytest.approx(float(error), rel=5e-3)
    removal = sample.removals([0, 1, 2, 3, 4, 5, 6, 7], NONE)
    for e in (1, 4):
        assert removal[e] == pytest.approx(sample.loss(set(range(8)) - {e}), rel=1e-6)
    experts, after = sample.order(frozenset({6}))
    assert 6 not in experts and len(experts) == 7
    assert after[2] == pytest.approx(sample.loss(set(range(8)) - set(experts[:3])), rel=1e-6)
    start = [0, 1, 2, 3]
    better = sample.refine(start, frozenset({0}))
    assert sample.loss(better) <= sample.loss(start) and 0 in better and len(better) == 4
    assert sample.scale(kept) == pytest.approx(_least_squares(sample, kept), rel=1e-6)


def _least_squares(sample: Any, kept: list[int]) -> float:
    rows = np.arange(len(sample.logits))
    mask = np.isin(np.arange(8), kept)
    mixed = sample.mixture(rows, mask)[0] * np.sqrt(sample.importance)[:, None]
    whole = sample.whole * np.sqrt(sample.importance)[:, None]
    return float((mixed * whole).sum() / (mixed * mixed).sum())


# -- variants beside the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "lfm2_moe"])
def test_a_masked_and_refitted_variant_is_the_pruned_file(tmp_path: Path, case: str) -> None:
    path = make(tmp_path / "model", case)
    model = open_model(path)
    (tmp_path / "a.txt").write_text(text(4096, seed=1))
    data = load_tokens([str(tmp_path / "a.txt")], path, tokens=2048, seq_len=SEQ_LEN, seed=0)
    groups = model.groups[0]
    size = 8 // groups
    kept = {at: [e for e in range(8) if e % size < size * 3 // 4 or (groups == 1 and e < 6)] for at in model.moe_layers}
    left = len(kept[model.moe_layers[0]])
    kept = {at: k[:left] for at, k in kept.items()}
    from moeconv.checkpoint.overlay import Overlay
    from moeconv.prune.repair.run import repair

    refitted, plain = Variant(keep=dict(kept), refit=Refit(0.1, 2)), Variant(keep=dict(kept))
    repair(LayerStream(model, data.windows), data, refitted, tmp_path / "overlay", left=left)
    overlay = Overlay(tmp_path / "overlay")
    stream = LayerStream(model, data.windows)
    pruned_pass(stream, [plain])
    for variant, overlays in ((plain, {}), (refitted, {"refit": overlay})):
        out = tmp_path / f"out{len(overlays)}"
        plan = plan_prune(model, keep=left, keep_experts=kept, overlays=overlays or None, rescale=False)
        execute(plan, source=model.checkpoint, out=out, origins=overlays or None, jobs=1)
        written = LayerStream(open_model(out), data.windows).run()
        assert torch.allclose(written.hidden, variant.hidden, rtol=1e-3, atol=1e-4)

    def apart(variant: Variant) -> float:
        return float((variant.hidden - stream.hidden).norm())

    assert apart(refitted) < 0.9 * apart(plain)


def test_a_refit_is_never_worse_on_the_held_out_tokens(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "olmoe", num_hidden_layers=1)
    model, kept = open_model(path), []
    (tmp_path / "a.txt").write_text(text(32 * SEQ_LEN))
    for windows, strength in ((1, 1e-6), (2, 1e-6), (3, 1e-6), (16, 1e-6), (32, 0.3)):
        data = load_tokens([str(tmp_path / "a.txt")], path, tokens=windows * SEQ_LEN, seq_len=SEQ_LEN, seed=0)
        held = torch.from_numpy(held_out(windows, SEQ_LEN))
        keep = {0: [0, 2, 5]}
        refitted, plain = Variant(keep=dict(keep), refit=Refit(strength, 2)), Variant(keep=dict(keep))
        stream = LayerStream(model, data.windows)
        pruned_pass(stream, [plain, refitted])
        new, old = (float((v.hidden - stream.hidden)[held].double().norm()) for v in (refitted, plain))
        (fitted,) = refitted.fitted
        assert new <= old and (fitted.error_after < fitted.error_before or not fitted.kept)
        assert new / old == pytest.approx(fitted.error_after / fitted.error_before if fitted.kept else 1, rel=1e-3)
        kept.append(fitted.kept)
    assert not all(kept) and kept[-1], "fits without a ridge on so few tokens err more, one on many less"


def test_a_refit_on_too_little_text_says_so(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model", "olmoe")
    (tmp_path / "a.txt").write_text(text(SEQ_LEN))
    flags = ("--ratio", 0.5, "--criterion", "random", "--data", tmp_path / "a.txt", "--seq-len", SEQ_LEN, "--json")
    done = cli("prune", path, tmp_path / "out", "--refit", "--refit-strength", 1e-6, *flags)
    assert done.code == 0, done.out
    layers = done.json["prune"]["refit"]["layers"]
    back = [row["layer"] for row in layers if not row["kept"]]
    assert len(back) == len(layers) and all(row["tokens_per_expert"] < row["tokens_needed"] for row in layers)
    assert sum("tokens per expert on average" in w for w in done.json["warnings"]) == 1
    assert sum("the text is too little to fit anything to" in w for w in done.json["warnings"]) == 1
    assert cli("prune", path, tmp_path / "plain", *flags, "--no-check").code == 0
    one, other = open_model(tmp_path / "out"), open_model(tmp_path / "plain")
    for name, role in one.roles.items():
        if role.layer in back:
            assert one.checkpoint.read(name) == other.checkpoint.read(name)


def test_a_refit_of_experts_that_miss_nothing_changes_nothing(tmp_path: Path) -> None:
    model = open_model(make(tmp_path / "model"))
    layer = next(iter(LayerStream(model, np.zeros((1, SEQ_LEN), np.int64)).layers()))
    hidden, index = torch.randn(64, 64), torch.arange(64)[:, None] % 2
    before, routes = down_projections(layer.experts, [0, 1]), Routes(hidden, index, torch.ones(64, 1))
    assert torch.equal(refit_layer(layer.experts, routes, torch.zeros(64, 64), [0, 1], before, Refit(0.1, 3)), before)


def test_refit_is_the_ridge_solution(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    model = open_model(path)
    data = load_tokens(texts(tmp_path), path, tokens=512, seq_len=SEQ_LEN, seed=0)
    layer = next(iter(LayerStream(model, data.windows).layers()))
    batch = next(iter(layer.batches(advance=False, hidden=torch.randn(8, SEQ_LEN, 64))))
    hidden, missing = batch.ffn_input, torch.randn(len(batch.ffn_input), 64)
    index, weights = torch.zeros(len(hidden), 1, dtype=torch.int64), torch.full((len(hidden), 1), 0.7)
    before = down_projections(layer.experts, [0])
    made = refit_layer(layer.experts, Routes(hidden, index, weights), missing, [0], before, Refit(0.1, 3))[0]
    a = 0.7 * activations(layer.experts, hidden, 0).double()
    gram = a.T @ a
    want = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram)), a.T @ missing.double())
    assert torch.allclose(made.double(), before[0].double() + want.T, rtol=1e-4, atol=1e-5)


def test_what_a_criterion_without_sample_says(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    evidence = measured(path, tmp_path)

    class NoSample:
        def layer(self, layer: int, field: str) -> np.ndarray:
            if field.startswith("sample_"):
                raise InputError("has no sample")
            return evidence.statistics.layer(layer, field)  # type: ignore[union-attr]

    from dataclasses import replace

    without = replace(evidence, statistics=NoSample(), samples={})
    with pytest.raises(InputError, match="no token sample of layer 0"):
        CRITERIA["reconstruction"].order(without, 0, NONE)
    plan = plan_prune(open_model(path), keep=4, evidence=without)
    assert plan.block["criterion"] == "saliency", "the default is what the evidence allows"
    assert plan_prune(open_model(path), keep=4, evidence=evidence).block["criterion"] == "reconstruction"


def test_a_router_whose_rule_is_not_known_is_pruned_by_saliency(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model", "phimoe")
    done = run(cli, path, tmp_path / "out", tmp_path, "--keep", 4)
    assert done.code == 0, done.out
    assert done.json["prune"]["criterion"] == "saliency" and "token sample" in " ".join(done.json["warnings"])


def test_half_a_split_judges(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    data = load_tokens(texts(tmp_path), path, tokens=None, seq_len=SEQ_LEN, seed=0)
    fit, judge = split_windows(data, every=4)
    assert len(judge.windows) == len(data.windows) // 4 and fit.tokens + judge.tokens == data.tokens
    assert sum(s.tokens for s in judge.sources) == judge.tokens
    with pytest.raises(InputError, match="at least 100 are needed, of which one is held out"):
        split_windows(data, every=100)


# -- the command -------------------------------------------------------------------------------------------------------


def run(cli: Any, path: Path, out: object, folder: Path, *flags: object) -> Any:
    data = [w for f in texts(folder) for w in ("--data", f)]
    return cli("prune", path, *([out] if out else []), *data, "--seq-len", SEQ_LEN, "--json", *flags)


@pytest.mark.slow
def test_merging_a_permuted_twin_changes_nothing(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model")
    import tiny

    tensors = tiny.read_tensors(path)
    order = np.random.default_rng(0).permutation(96)
    model = open_model(path)
    for layer in model.moe_layers:
        for e in range(4, 8):  # the second half is the first with its neurons in another order
            for part in ("gate", "up", "down"):
                dtype, shape, data = tensors[model.expert_name(part, layer=layer, expert=e - 4)]
                values = tiny.decode(data, dtype, shape)
                moved = values[:, order] if part == "down" else values[order]
                name = model.expert_name(part, layer=layer, expert=e)
                tensors[name] = (dtype, shape, tiny.encode(moved, dtype))
    for file in path.glob("model*"):
        file.unlink()
    tiny.write_shards(path, tensors)
    protect = ",".join(f"*:{e}" for e in range(4))
    done = run(cli, path, tmp_path / "out", tmp_path, "--keep", 4, "--merge", "--protect", protect,
               "--similarity", "aligned")  # fmt: skip
    assert done.code == 0, done.out
    groups = done.json["prune"]["groups"]
    assert all(len(g) == 4 and sorted(e for into in g.values() for e in into) == [4, 5, 6, 7] for g in groups.values())
    assert all(into in ([], [int(kept) + 4]) for g in groups.values() for kept, into in g.items())
    before, after = tiny.read_tensors(path), tiny.read_tensors(tmp_path / "out")
    for layer in model.moe_layers:
        for e in range(4):
            name = model.expert_name("down", layer=layer, expert=e)
            dtype, shape, data = before[name]
            assert np.allclose(tiny.decode(data, dtype, shape), tiny.decode(after[name][2], dtype, shape), atol=1e-6)
    raw = run(cli, path, tmp_path / "out2", tmp_path, "--criterion", "redundancy", "--similarity", "aligned",
              "--threshold", 0.99, "--protect", protect)  # fmt: skip
    assert raw.code == 0 and raw.json["prune"]["experts_after"] == 4, raw.out
    assert set(map(tuple, raw.json["prune"]["keep"].values())) == {(0, 1, 2, 3)}
    none = run(cli, path, tmp_path / "out3", tmp_path, "--criterion", "redundancy", "--similarity", "raw",
               "--threshold", 0.99)  # fmt: skip
    assert none.code == 2 and "so similar to it" in none.json["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--refit"], ["--sequential"], ["--sequential", "--refit", "--criterion", "reap"]])
def test_repaired_models_load(tmp_path: Path, cli: Any, flags: list[str]) -> None:
    path = make(tmp_path / "model", "olmoe")
    done = run(cli, path, tmp_path / "out", tmp_path, "--ratio", 0.5, *flags)
    assert done.code == 0, done.out
    assert all(len(k) == 4 for k in done.json["prune"]["keep"].values())
    verified = cli("verify", tmp_path / "out", "--load", "--json")
    assert verified.json["ok"] and verified.json["loads"]["transformers"]
    again = run(cli, path, tmp_path / "again", tmp_path, "--ratio", 0.5, *flags)
    assert again.json["files"] == done.json["files"], "same command, same bytes"


@pytest.mark.slow
def test_distillation_is_chained(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model", "olmoe")
    done = run(cli, path, tmp_path / "out", tmp_path, "--ratio", 0.5, "--refit", "--distill", 2, "--batch-size", 4)
    assert done.code == 0, done.out
    found = done.json["prune"]["distill"]
    assert found["steps"] == 2 and found["kl_after"] <= found["kl_before"]
    assert cli("verify", tmp_path / "out", "--load", "--json").json["ok"]


def test_distilled_routers_stand_beside_the_experts_that_they_were_trained_with(tmp_path: Path, cli: Any) -> None:
    """Where a router does not renormalise, the kept experts are scaled; distillation changes the routers alone."""
    path = make(tmp_path / "model", "olmoe")
    plain = run(cli, path, tmp_path / "plain", tmp_path, "--ratio", 0.5, "--batch-size", 4)
    done = run(cli, path, tmp_path / "out", tmp_path, "--ratio", 0.5, "--distill", 1, "--batch-size", 4)
    assert done.code == 0 and done.json["prune"]["scale"] == plain.json["prune"]["scale"] != {}
    before, after = (open_model(tmp_path / name) for name in ("plain", "out"))
    for name, role in before.roles.items():
        if role.group == "expert":
            assert after.checkpoint.read(name) == before.checkpoint.read(name), name


@pytest.mark.slow
def test_a_gate_finds_the_largest_prune(tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "model", "olmoe")
    shown = run(cli, path, tmp_path / "curve.json", tmp_path, "--curve", "--criterion", "saliency")
    assert shown.code == 0, shown.out
    rows = shown.json["curve"]
    assert [r["experts"] for r in rows] == [7, 6, 5, 4, 3, 2] and json.loads((tmp_path / "curve.json").read_text())
    assert all(0 <= r["stability"] <= 1 and r["kl"] > 0 for r in rows)
    assert [r["bytes"] for r in rows] == sorted((r["bytes"] for r in rows), reverse=True)
    rising = [r["loss_increase"] for r in rows]
    limit = sorted(rising)[3] + 1e-6
    done = run(cli, path, tmp_path / "out", tmp_path, "--max-loss-increase", limit, "--criterion", "saliency")
    assert done.code == 0, done.out
    assert done.json["prune"]["measured"]["loss_increase"] <= limit
    by_left = {r["experts"]: r["loss_increase"] for r in rows}
    left = done.json["prune"]["experts_after"]
    assert done.json["prune"]["measured"]["loss_increase"] == pytest.approx(by_left[left], abs=1e-5)
    passing = [r["experts"] for r in rows if r["loss_increase"] <= limit]
    assert left == min(passing) or rising != sorted(rising), "the largest prune within the gate"
    monkeypatch.setattr("moeconv.prune.gates.increase", lambda _score: 1.0)
    refused = run(cli, path, tmp_path / "out2", tmp_path, "--max-loss-increase", 0.5, "--criterion", "saliency")
    assert refused.code == 2 and "already raises the loss" in refused.json["error"]["message"]
    assert not (tmp_path / "out2").exists()


@pytest.mark.slow
def test_top_k_alone_and_with_experts(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model", "olmoe", num_experts_per_tok=4)
    done = cli("prune", path, tmp_path / "out", "--top-k", 2, "--json")
    assert done.code == 0, done.out
    assert done.json["prune"] | {"top_k_before": 4, "top_k_after": 2, "experts_after": 8} == done.json["prune"]
    assert open_model(tmp_path / "out").top_k == 2
    assert done.json["parameters"]["active"] < open_model(path).checkpoint.nbytes
    assert done.json["prune"]["criterion"] is None and done.json["warnings"] == []
    alone = run(cli, path, tmp_path / "out1", tmp_path, "--top-k", 2)
    assert alone.code == 0, alone.out
    data = [w for f in texts(tmp_path) for w in ("--data", f)]
    told = cli("evaluate", tmp_path / "out1", "--reference", path, *data, "--seq-len", SEQ_LEN, "--json").json
    figures = alone.json["prune"]["measured"]
    assert figures["loss"] == pytest.approx(told["loss"], abs=1e-4)
    assert figures["kl"] == pytest.approx(told["kl"], abs=1e-4) and figures["kl"] > 0
    judged = run(cli, path, tmp_path / "out2", tmp_path, "--top-k", 2, "--keep", 4)
    assert judged.code == 0 and open_model(tmp_path / "out2").num_experts == 4, judged.out
    assert judged.json["prune"]["measured"]["kl"] > 0
    for wrong in (0, 9, 4):
        assert cli("prune", path, tmp_path / "no", "--top-k", wrong, "--json").code == 2


@pytest.mark.slow
def test_refusals_before_any_calibration(tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "model")
    monkeypatch.setattr("moeconv.calibrate.run.load_tokens", lambda *_a, **_k: pytest.fail("it began to measure"))
    cases: list[tuple[list[object], str]] = [
        (["--keep", 1], "fewer than the 2"), (["--ratio", 0.01], "rounds to 0 experts"),
        (["--threshold", 1.5], "between 0 and 1"), (["--max-loss-increase", "nan"], "number of nats"),
        (["--keep", 4, "--refit-strength", 0], "above 0"), (["--keep", 4, "--merge", "--refit"], "exclude"),
        (["--keep", 4, "--protect-coverage", 2], "between 0 and 1"), (["--keep", 4, "--distill", -1], "at least 0"),
        (["--sequential", "--max-loss-increase", 1], "how many experts are kept"),
         (["--curve", "--keep", 4], "takes no budget"),
    ]  # fmt: skip
    for flags, says in cases:
        out = tmp_path / "out" if "--curve" not in flags else None
        done = run(cli, path, out, tmp_path, *flags)
        assert done.code == 2 and says in done.json["error"]["message"], (flags, done.out)
    for flags in (["--top-k", 1, "--merge"], ["--top-k", 1, "--sequential"], ["--top-k", 1, "--protect-coverage", 0.5],
                  ["--keep", 4, "--refit-strength", 1], ["--keep", 4, "--refit-sweeps", 3]):  # fmt: skip
        done = run(cli, path, tmp_path / "out", tmp_path, *flags)
        assert done.code == 2 and done.json["error"]["hint"], (flags, done.out)
    done = cli("prune", path, tmp_path / "out", "--keep", 4, "--protect-coverage", 0.5, "--json")
    assert done.code == 2 and "needs statistics" in done.json["error"]["message"]
    for flags in (["--refit"], ["--distill", 3], ["--sequential"], ["--max-loss-increase", 1]):
        budget = [] if "--max-loss-increase" in flags else ["--keep", 4]
        done = cli("prune", path, tmp_path / "out", *budget, *flags, "--json")
        assert done.code == 2 and "runs the model on text" in done.json["error"]["message"]
    for flags in (["--threshold", 0.5], ["--max-loss-increase", 1]):
        done = cli("prune", path, tmp_path / "out", *flags, "--dry-run", "--criterion", "aimer", "--json")
        assert done.code == 2 and done.json["error"]["hint"]
    assert cli("prune", path, "--keep", 4, "--json").code == 2
    assert not (tmp_path / "out").exists()


def test_coverage_protects_what_a_rare_source_relies_on(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    evidence, model = measured(path, tmp_path), open_model(path)
    assert evidence.statistics is not None
    plan = plan_prune(model, keep=4, criterion="utilization", evidence=evidence, protect_coverage=0.25)
    for layer in model.moe_layers:
        for of_source in evidence.statistics.layer(layer, "gate_norm_sum"):
            best = np.argsort(-of_source)
            need = int(np.searchsorted(np.cumsum(of_source[best]) / of_source.sum(), 0.25)) + 1
            assert set(best[:need].tolist()) <= set(plan.block["keep"][str(layer)])


@pytest.mark.slow
def test_stability_falls_where_experts_are_alike(tmp_path: Path) -> None:
    from moeconv.prune.bootstrap import stability

    path = make(tmp_path / "model")
    evidence, model = measured(path, tmp_path), open_model(path)
    for name in ("saliency", "reconstruction", "utilization"):
        orders = {at: CRITERIA[name].order(evidence, at, NONE) for at in model.moe_layers}
        none = dict.fromkeys(model.moe_layers, NONE)
        found = stability(evidence, name, orders, [1, 4, 7], protected=none)
        assert set(found) == {1, 4, 7} and all(0 <= share <= 1 for share in found.values())
        assert found == stability(evidence, name, orders, [1, 4, 7], protected=none), "the seed decides"
        assert max(found.values()) > 0.6, "most of a keep set comes back"


@pytest.mark.slow
def test_a_plot_is_drawn_where_matplotlib_is(tmp_path: Path, cli: Any) -> None:
    pytest.importorskip("matplotlib")
    path = make(tmp_path / "model")
    done = run(cli, path, tmp_path / "curve.svg", tmp_path, "--curve", "--criterion", "random", "--refit")
    assert done.code == 0, done.out
    assert (tmp_path / "curve.svg").read_text().lstrip().startswith("<?xml")
    again = run(cli, path, tmp_path / "curve.svg", tmp_path, "--curve", "--criterion", "random")
    assert again.code == 4 and "exists already" in again.json["error"]["message"]
    wrong = run(cli, path, tmp_path / "model.bin", tmp_path, "--curve")
    assert wrong.code == 2 and "ends in none of" in wrong.json["error"]["message"]


def test_added_statistics_keep_the_sample(tmp_path: Path) -> None:
    from moeconv.calibrate.merge import merge_statistics

    path = make(tmp_path / "model")
    for i, file in enumerate(texts(tmp_path)):
        calibrate(path, tmp_path / f"part{i}", data=[file], seq_len=SEQ_LEN)
    merge_statistics(path, tmp_path / "sum", [tmp_path / "part0", tmp_path / "part1"])
    added, parts = load_statistics(tmp_path / "sum"), [load_statistics(tmp_path / f"part{i}") for i in range(2)]
    rows = [len(p.layer(0, "sample_logits")) for p in parts]
    assert len(added.layer(0, "sample_logits")) == sum(rows) == len(added.layer(0, "sample_outputs"))
    for part, at in zip(parts, (slice(0, rows[0]), slice(rows[0], None))):
        mine = added.layer(0, "sample_outputs")[at].astype(np.float64) * added.layer(0, "sample_unit")[0]
        theirs = part.layer(0, "sample_outputs").astype(np.float64) * part.layer(0, "sample_unit")[0]
        assert np.allclose(mine, theirs, atol=2e-3 * np.abs(theirs).max())


@pytest.mark.slow
def test_the_manifest_names_what_decided_without_a_path(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model")
    measured(path, tmp_path)
    made = {}
    for name, flags in (("stats", ["--stats", tmp_path / "stats.safetensors"]), ("data", None)):
        out = tmp_path / name
        flags = flags or [w for f in texts(tmp_path) for w in ("--data", f)] + ["--seq-len", SEQ_LEN]
        assert cli("prune", path, out, "--keep", 4, *flags, "--json").code == 0
        written = (out / "moeconv_manifest.json").read_text()
        assert str(tmp_path) not in written and "stats.safetensors" not in written
        made[name] = json.loads(written)["steps"][-1]["parameters"]
    by = made["stats"]["decided_by"]
    assert len(made["stats"]["stats"]) == 64 and made["data"]["stats"] is None
    assert by == made["data"]["decided_by"] and by["criterion"] == "reconstruction"
    assert len(by["data_sha256"]) == 2 and len(by["keep_sha256"]) == 64 and by["seq_len"] == SEQ_LEN
