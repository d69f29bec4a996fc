"""prune --width: what data decides, against float64 and against the written file; healing; rounding; refusals."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from words import add_tokenizer, text

from moeconv.calibrate.neurons import activations as neuron_activations
from moeconv.checkpoint.overlay import Overlay
from moeconv.data.heldout import held_out
from moeconv.data.windows import load_tokens
from moeconv.errors import Interrupted
from moeconv.families.model import open_model
from moeconv.families.neurons import Narrow
from moeconv.options import PlanOptions, PruneOptions
from moeconv.plan.execute import execute
from moeconv.plan.planned import planned_model
from moeconv.prune.limits import planned_bytes
from moeconv.prune.planner import plan_prune
from moeconv.prune.points import points, points_within
from moeconv.prune.repair.heal import Heal
from moeconv.prune.repair.healed import write_healed
from moeconv.prune.repair.narrow import moments, narrow_layer
from moeconv.prune.repair.neurons import write_neurons
from moeconv.prune.repair.pruned import pruned_pass
from moeconv.prune.repair.refit import Refit, Routes
from moeconv.prune.repair.run import repair
from moeconv.prune.repair.variant import Variant
from moeconv.prune.repair.wanted import Wanted
from moeconv.stream.experts import activations, down_projections
from moeconv.stream.layers import LayerStream
from tests.contract.stock import CASES, MOE_CASES, save_stock

SEQ_LEN = 16

pytestmark = pytest.mark.usefixtures("one_thread")


def make(path: Path, case: str = "qwen3_moe", **config: Any) -> Path:
    kind, values = MOE_CASES[case]
    return add_tokenizer(Path(save_stock(path, kind, values | config, dtype=torch.float32)))


def data_of(path: Path, folder: Path, *, tokens: int = 2048) -> Any:
    (folder / "a.txt").write_text(text(4096, seed=1))
    return load_tokens([str(folder / "a.txt")], path, tokens=tokens, seq_len=SEQ_LEN, seed=0)


def written(model: Any, keep: dict[int, list[int]], variant: Variant, out: Path, folder: Path, **overlay: Path) -> Any:
    """The narrower model on disk, as the command writes it."""
    assert variant.width is not None
    neurons = {at: found.numpy() for at, found in variant.neurons.items()}
    write_neurons(Narrow(model, variant.width), keep, folder / "neurons", chosen=neurons)
    overlays = {name: Overlay(path) for name, path in {**overlay, "neurons": folder / "neurons"}.items()}
    left = len(next(iter(keep.values()))) if keep else None
    plan = plan_prune(model, keep=left, width=variant.width, keep_experts=keep or None, overlays=overlays)
    execute(plan, source=model.checkpoint, out=out, origins=overlays, jobs=1)
    return open_model(out)


@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss", pytest.param("granitemoe", marks=pytest.mark.slow)])
def test_a_narrowed_and_refitted_variant_is_the_written_file(tmp_path: Path, case: str) -> None:
    path = make(tmp_path / "model", case)
    model, data = open_model(path), data_of(path, tmp_path)
    keep, width = {at: [0, 1, 3, 4, 6, 7] for at in model.moe_layers}, model.expert_width // 2
    variant = Variant(keep=dict(keep), refit=Refit(), width=width)
    stream = LayerStream(model, data.windows)
    repair(stream, data, variant, tmp_path / "width", left=6, narrow=Narrow(model, width))
    made = written(model, keep, variant, tmp_path / "out", tmp_path, width=tmp_path / "width")
    assert made.expert_width == width and made.num_experts == 6
    found = LayerStream(made, data.windows).run()
    assert torch.allclose(found.hidden, variant.hidden, rtol=1e-3, atol=1e-4)
    assert any(row.kept for row in variant.fitted), "no layer was refitted"
    by_weights = Variant(keep=dict(keep), width=width)
    write_neurons(Narrow(model, width), keep, tmp_path / "neurons", chosen={})
    overlays = {"neurons": Overlay(tmp_path / "neurons")}
    plan = plan_prune(model, keep=6, width=by_weights.width, keep_experts=keep, overlays=overlays)
    execute(plan, source=model.checkpoint, out=tmp_path / "plain", origins=overlays, jobs=1)
    plain = LayerStream(open_model(tmp_path / "plain"), data.windows).run()
    assert (variant.hidden - stream.hidden).norm() < (plain.hidden - stream.hidden).norm()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
def test_a_healed_narrow_variant_is_the_written_file(tmp_path: Path, case: str) -> None:
    path = make(tmp_path / "model", case)
    model, data = open_model(path), data_of(path, tmp_path)
    keep, width = {at: [0, 1, 3, 4, 6, 7] for at in model.moe_layers}, model.expert_width // 2
    variant = Variant(keep=dict(keep), width=width, heal=Heal(40))
    stream = LayerStream(model, data.windows, dtype=torch.float32)
    write_healed(stream, data, variant, tmp_path / "heal", left=6, settings={}, narrow=Narrow(model, width))
    made = written(model, keep, variant, tmp_path / "out", tmp_path, heal=tmp_path / "heal")
    found = LayerStream(made, data.windows).run()
    assert torch.allclose(found.hidden, variant.hidden, rtol=1e-3, atol=1e-4)
    assert any(row.kept for row in variant.healed), "no layer was healed"


def _one_expert(tmp_path: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(the experts of a layer, inputs [T, H], the weighted activations [T, I] of expert 0 in float64)."""
    path = make(tmp_path / "model", num_hidden_layers=1)
    model = open_model(path)
    layer = next(iter(LayerStream(model, data_of(path, tmp_path).windows).layers()))
    hidden = torch.cat([batch.expert_input for batch in layer.batches(advance=False)])
    return layer.experts, hidden, 0.7 * activations(layer.experts, hidden, 0).double()


def test_one_expert_keeps_what_brute_force_keeps_in_float64(tmp_path: Path) -> None:
    experts, hidden, a = _one_expert(tmp_path)
    index, weights = torch.zeros(len(hidden), 1, dtype=torch.int64), torch.full((len(hidden), 1), 0.7)
    routes, before = Routes(hidden, index, weights), down_projections(experts, [0])
    nothing = torch.zeros(len(hidden), 64)
    wanted = Wanted(routes, nothing, routes, nothing, 1.0)
    width = a.shape[1] - 3
    made = narrow_layer(0, experts, wanted, [0], before, width, None)
    gram = a.T @ a
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    left, down = list(range(a.shape[1])), before[0].double()

    def fit(some: list[int]) -> torch.Tensor:
        return torch.linalg.solve(gram[some][:, some], gram[some] @ down.T).T

    def error(some: list[int]) -> float:
        off = down.clone()
        off[:, some] -= fit(some)
        return float(((off @ gram) * off).sum())

    for _ in range(3):
        left.remove(min(left, key=lambda j: error([i for i in left if i != j])))
    assert made.neurons[0].tolist() == left
    assert torch.allclose(made.down[0][:, left].double(), fit(left), rtol=1e-4, atol=1e-6)
    gone = [j for j in range(a.shape[1]) if j not in left]
    assert not made.down[0][:, gone].any()


def test_an_expert_with_few_tokens_leans_on_the_tokens_of_the_layer(tmp_path: Path) -> None:
    experts, hidden, a = _one_expert(tmp_path)
    index = torch.full((len(hidden), 1), 1)
    index[:5] = 0
    routes = Routes(hidden, index, torch.full((len(hidden), 1), 0.7))
    gram, few = moments(experts, routes, torch.tensor([0, 1]), a.shape[1], 100)
    own, pool = a[:5].T @ a[:5], torch.arange(0, len(hidden), len(hidden) // 100)[:100]
    assert few == 1
    assert torch.allclose(gram[0], own + 0.95 * a[pool].T @ a[pool], rtol=1e-4, atol=1e-6)


def test_a_layer_whose_experts_are_cut_one_at_a_time_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "model")
    model, data = open_model(path), data_of(path, tmp_path)
    found = []
    for size in (1 << 29, 1):
        monkeypatch.setattr("moeconv.prune.repair.refit.REFIT_BYTES", size)
        variant = Variant(width=model.expert_width // 2)
        pruned_pass(LayerStream(model, data.windows), [variant])
        found.append(variant)
    for layer, neurons in found[0].neurons.items():
        assert torch.equal(neurons, found[1].neurons[layer])
    assert torch.allclose(found[0].hidden, found[1].hidden, rtol=1e-4, atol=1e-5)


def test_a_refit_where_nothing_is_missing_keeps_the_neurons_and_their_weights(tmp_path: Path) -> None:
    """With all experts, the first layer computes what it should before it loses neurons."""
    path = make(tmp_path / "model")
    model, data = open_model(path), data_of(path, tmp_path)
    plain, refitted = (Variant(width=model.expert_width // 2, refit=refit) for refit in (None, Refit()))
    pruned_pass(LayerStream(model, data.windows), [plain, refitted])
    first = model.moe_layers[0]
    assert torch.equal(plain.neurons[first], refitted.neurons[first])
    assert refitted.fitted[0].error_before == plain.narrowed[0].error
    assert all(math.isfinite(row.error_after) for row in refitted.fitted)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--width", 16], ["--ratio", 0.25, "--width-ratio", 0.5, "--refit"],
                                   ["--width-ratio", 0.5, "--heal", 3], ["--width", 16, "--distill", 2]])  # fmt: skip
def test_narrower_models_load_and_the_same_command_gives_the_same_bytes(tmp_path: Path, cli: Any, flags: list) -> None:
    path = make(tmp_path / "model")
    (tmp_path / "a.txt").write_text(text(1024, seed=1))
    run = (*flags, "--data", tmp_path / "a.txt", "--seq-len", SEQ_LEN, "--batch-size", 4, "--json")
    done = cli("prune", path, tmp_path / "out", *run)
    assert done.code == 0, done.out
    assert done.json["prune"]["width_after"] == 16 and open_model(tmp_path / "out").expert_width == 16
    assert cli("verify", tmp_path / "out", "--load", "--json").json["ok"]
    again = cli("prune", path, tmp_path / "again", *run)
    assert again.json["files"] == done.json["files"]


def test_a_ratio_is_rounded_to_a_multiple_and_says_so(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model")
    done = cli("prune", path, tmp_path / "out", "--width-ratio", 0.3, "--multiple", 8, "--dry-run", "--json")
    block = done.json["prune"]
    assert (block["width_before"], block["width_after"], block["multiple"]) == (32, 24, 8)
    assert any("22.4 of 32 neurons were asked for, but 24 are kept" in w for w in done.json["warnings"])
    plain = cli("prune", path, tmp_path / "out", "--width", 24, "--dry-run", "--json").json
    assert plain["bytes"] == done.json["bytes"] and plain["parameters"] == done.json["parameters"]
    assert not [w for w in plain["warnings"] if "asked for" in w]
    before = cli("inspect", path, "--json").json["parameters"]
    assert plain["parameters"]["active"] < before["active"] and plain["parameters"]["total"] < before["total"]


def test_what_cannot_be_cut_is_refused(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model")
    for flags, says in (
        (["--width", 32], "expected 1 to 31"), (["--width", 0], "expected 1 to 31"),
        (["--width", 30], "multiples of 4"), (["--width", 16, "--width-ratio", 0.5], "exclude each other"),
        (["--width-ratio", 1.5], "between 0 and 1"), (["--width-ratio", 0.01], "rounds to 32"),
        (["--width", 16, "--multiple", 8], "goes with --width-ratio"),
        (["--width-ratio", 0.5, "--multiple", 6], "a multiple of 4"),
        (["--width", 16, "--curve"], "exclude each other"),
        (["--keep", 4, "--mix", "auto"], "--keep is given"), (["--mix", "auto"], "none of them is given"),
        (["--threshold", 0.5, "--mix", "auto"], "--threshold is given"),
        (["--max-bytes", "1KB", "--mix", "auto"], "too small for any number"),
        (["--max-bytes", "1GB", "--mix", "auto"], "already has at most this size"),
        (["--ratio", 0.5, "--max-bytes", "1GB", "--mix", "auto"], "exactly one"),
        (["--ratio", 0.5, "--mix", "auto", "--width", 16], "exclude"),
        (["--width", 16, "--threshold", 0.5], "exclude each other"),
        (["--keep", 4, "--width", 16, "--rescale"], "--width and --rescale exclude each other"),
        (["--width", 16, "--protect", "0:1"], "--protect is about which experts are kept"),
        (["--keep", 4, "--refit", "--rescale"], "--rescale and --refit exclude each other"),
    ):  # fmt: skip
        out = [] if "--curve" in flags else [tmp_path / "out"]
        reads = {"--curve", "--threshold", "--mix", "--refit"} & set(flags)
        data = ["--data", tmp_path / "none.txt"] if reads else []
        done = cli("prune", path, *out, *flags, *data, "--json")
        assert done.code == 2 and says in done.json["error"]["message"], (flags, done.out)
    assert cli("quantize", path, tmp_path / "packed", "--json").code == 0
    done = cli("prune", tmp_path / "packed", tmp_path / "out", "--width", 16, "--json")
    assert done.code == 3 and "quantized" in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_the_output_of_a_step_that_is_only_planned_takes_a_width(tmp_path: Path) -> None:
    """As in the dry run of a recipe."""
    planned = planned_model(plan_prune(open_model(make(tmp_path / "model")), keep=6))
    plan = plan_prune(planned, width=16)
    assert plan.config["moe_intermediate_size"] == 16 and plan.config["num_experts"] == 6


# -- dense models ------------------------------------------------------------------------------------------------------


def make_plain(path: Path, case: str = "llama") -> Path:
    name, config, _ = CASES[case]
    return add_tokenizer(Path(save_stock(path, name, config, dtype=torch.float32)))


@pytest.mark.parametrize("case", ["llama", pytest.param("phi3", marks=pytest.mark.slow)])
def test_a_narrowed_dense_model_is_the_written_file_and_better_than_by_weights(tmp_path: Path, case: str) -> None:
    path = make_plain(tmp_path / "model", case)
    model, data = open_model(path), data_of(path, tmp_path)
    variant = Variant(refit=Refit(), width=model.ffn_width // 2)
    stream = LayerStream(model, data.windows)
    narrow = Narrow(model, model.ffn_width // 2)
    repair(stream, data, variant, tmp_path / "width", left=0, narrow=narrow)
    made = written(model, {}, variant, tmp_path / "out", tmp_path, width=tmp_path / "width")
    assert made.ffn_width == made.value("intermediate_size") == model.ffn_width // 2
    found = LayerStream(made, data.windows).run()
    assert torch.allclose(found.hidden, variant.hidden, rtol=1e-3, atol=1e-4)
    plain = written(model, {}, Variant(width=narrow.width), tmp_path / "plain", tmp_path)
    by_weights = LayerStream(plain, data.windows).run()
    assert (variant.hidden - stream.hidden).norm() < (by_weights.hidden - stream.hidden).norm()


def test_the_down_projection_of_a_narrowed_ffn_is_the_fit_in_float64(tmp_path: Path) -> None:
    path = make_plain(tmp_path / "model")
    model, data = open_model(path), data_of(path, tmp_path)
    variant = Variant(width=model.ffn_width // 2)
    made: dict[int, torch.Tensor] = {}
    variant.on_layer = lambda layer, _experts, down: made.update({layer: down.clone()})
    pruned_pass(LayerStream(model, data.windows), [variant])
    layer = next(iter(LayerStream(model, data.windows).layers()))
    down = layer.ffn.down_proj.weight.detach().double()
    held = torch.from_numpy(held_out(*data.windows.shape))
    with neuron_activations(layer.ffn.down_proj) as seen:
        rows = [~held[batch.rows].flatten() for batch in layer.batches(advance=False)]
    h = torch.cat([x[of] for x, of in zip(seen, rows)]).double()
    gram = h.T @ h
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    kept = variant.neurons[0][0]
    assert len(kept) == model.ffn_width // 2
    fitted = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ down.T).T
    assert torch.allclose(made[0][0][:, kept].double(), fitted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_stopped_choice_of_neurons_continues_after_the_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    path = make(tmp_path / "model") if case in MOE_CASES else make_plain(tmp_path / "model")
    model, data = open_model(path), data_of(path, tmp_path)
    narrow, reached = Narrow(model, model.cut_width // 2), list[int]()

    def chosen(folder: Path, *, stop: int | None = None) -> Variant:
        reached.clear()

        def counted(layer: int, *rest: Any) -> Any:
            reached.append(layer)
            if layer == stop:
                raise Interrupted("stopped")
            return narrow_layer(layer, *rest)

        monkeypatch.setattr("moeconv.prune.repair.pruned.narrow_layer", counted)
        keep = {layer: list(range(model.num_experts)) for layer in model.moe_layers}
        variant = Variant(keep=dict(keep), refit=Refit(), width=narrow.width)
        stream = LayerStream(model, data.windows)
        repair(stream, data, variant, folder / "width", left=model.num_experts, narrow=narrow, save_every=0.0)
        return variant

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = chosen(tmp_path / "whole")
    assert reached == [0, 1, 2]
    with pytest.raises(Interrupted):
        chosen(tmp_path / "stopped", stop=2)
    shutil.copytree(tmp_path / "stopped", tmp_path / "damaged")
    again = chosen(tmp_path / "stopped")
    assert 0 not in reached and reached[-1] == 2, reached
    assert all(torch.equal(whole.neurons[layer], again.neurons[layer]) for layer in range(3))
    assert again.fitted == whole.fitted and again.narrowed == whole.narrowed
    assert torch.equal(again.hidden, whole.hidden)
    os.truncate(tmp_path / "damaged" / ".width.begun" / "00000.safetensors", 100)
    chosen(tmp_path / "damaged")
    assert reached == [0, 1, 2]  # without the weights of a layer, the pass starts again
    folders = [tmp_path / name / "width" for name in ("whole", "stopped", "damaged")]
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert files[0] == files[1] == files[2]


@pytest.mark.slow
def test_a_dense_model_is_cut_by_the_command(tmp_path: Path, cli: Any) -> None:
    path = make_plain(tmp_path / "model")
    (tmp_path / "a.txt").write_text(text(1024, seed=1))
    run = ("--width-ratio", 0.5, "--refit", "--data", tmp_path / "a.txt", "--seq-len", SEQ_LEN, "--json")
    done = cli("prune", path, tmp_path / "out", *run)
    assert done.code == 0, done.out
    block = done.json["prune"]
    assert block["width_after"] == block["width_before"] // 2 and block["experts_before"] == 0
    assert cli("verify", tmp_path / "out", "--load", "--json").json["ok"]
    assert cli("prune", path, tmp_path / "again", *run).json["files"] == done.json["files"]
    dry = cli("prune", path, tmp_path / "dry", *run, "--dry-run").json
    assert dry["bytes"] == done.json["bytes"] and dry["parameters"] == done.json["parameters"]
    assert "neurons per FFN" in cli("prune", path, tmp_path / "dry", "--width", 32, "--dry-run").out


def test_a_dense_model_takes_no_option_about_experts(tmp_path: Path, cli: Any) -> None:
    path = make_plain(tmp_path / "model")
    for flags, code, says in (
        (["--keep", 2], 3, "no experts to prune"), (["--width", 32, "--keep", 2], 2, "--keep is about experts"),
        (["--width", 32, "--heal", 9, "--data", "x"], 2, "--heal is about experts"),
        (["--width", 32, "--criterion", "reap", "--data", "x"], 2, "--criterion is about experts"),
        (["--width", 999], 2, "every FFN has"), (["--width", 32, "--refit"], 2, "there is no --data"),
    ):  # fmt: skip
        done = cli("prune", path, tmp_path / "out", *flags, "--json")
        assert done.code == code and says in done.json["error"]["message"], (flags, done.out)
    assert not (tmp_path / "out").exists()


# -- --mix -------------------------------------------------------------------------------------------------------------


def test_the_points_of_a_mix_have_at_most_the_bytes_of_the_ratio(tmp_path: Path) -> None:
    model = open_model(make(tmp_path / "model"))
    found = points(model, PruneOptions(ratio=0.5, mix="auto"), PlanOptions(), ratio=0.5)
    assert found == [(6, 20), (4, 32), (5, 24), (7, 16), (8, 16)], "8 experts of 32 neurons, multiples of 4"
    assert all(left * width <= 4 * 32 for left, width in found)


def test_the_points_of_a_mix_within_a_size_are_the_largest_that_fit(tmp_path: Path) -> None:
    model, common = open_model(make(tmp_path / "model")), PlanOptions()
    whole = planned_bytes(model, common, 7, None)
    for limit in (whole - 1, planned_bytes(model, common, 4, None), planned_bytes(model, common, 2, 16)):
        found = points_within(model, PruneOptions(max_bytes=str(limit), mix="auto"), common)
        assert len(found) > 1 and found[0][0] < 8
        for left, width in found:
            assert planned_bytes(model, common, left, None if width == 32 else width) <= limit
            assert width == 32 or planned_bytes(model, common, left, width + 4 if width < 28 else None) > limit


@pytest.mark.slow
def test_the_best_mix_on_held_out_text_is_written(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model")
    (tmp_path / "a.txt").write_text(text(1024, seed=1))
    flags = ("--ratio", 0.5, "--mix", "auto", "--refit", "--data", tmp_path / "a.txt", "--seq-len", SEQ_LEN, "--json")
    done = cli("prune", path, tmp_path / "out", *flags)
    assert done.code == 0, done.out
    block, made = done.json["prune"], open_model(tmp_path / "out")
    (best,) = [row for row in block["mix"] if row["chosen"]]
    assert best["loss_increase"] == min(row["loss_increase"] for row in block["mix"])
    assert (made.num_experts, made.expert_width) == (best["experts"], best["width"])
    assert (block["experts_after"], block.get("width_after", 32)) == (best["experts"], best["width"])
    assert cli("verify", tmp_path / "out", "--load", "--json").json["ok"]
    dry = cli("prune", path, tmp_path / "dry", *flags, "--dry-run")
    assert dry.code == 2 and "--mix needs measurements" in dry.json["error"]["message"]


@pytest.mark.slow
def test_a_mix_under_a_limit_of_the_size_or_of_the_loss_and_its_curve(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model")
    (tmp_path / "a.txt").write_text(text(1024, seed=1))
    run = ("--mix", "auto", "--criterion", "saliency", "--data", tmp_path / "a.txt", "--seq-len", SEQ_LEN, "--json")
    limit = cli("prune", path, tmp_path / "half", "--keep", 4, "--dry-run", "--json").json["bytes"]
    done = cli("prune", path, tmp_path / "small", "--max-bytes", limit, *run)
    assert done.code == 0 and done.json["bytes"] <= limit, done.out
    (best,) = [row for row in done.json["prune"]["mix"] if row["chosen"]]
    made = open_model(tmp_path / "small")
    assert (made.num_experts, made.expert_width) == (best["experts"], best["width"])
    assert best["bytes"] == done.json["bytes"] and all(row["bytes"] <= limit for row in done.json["prune"]["mix"])

    curve = cli("prune", path, tmp_path / "curve.svg", "--curve", *run)
    assert curve.code == 0, curve.out
    rows = curve.json["curve"]
    assert {row["removes"] for row in rows} == {"experts", "both", "neurons"}
    assert all(row["ratio"] == pytest.approx(1 - row["experts"] * row["width"] / (8 * 32), abs=1e-6) for row in rows)

    gate = max(0.0, sorted(row["loss_increase"] for row in rows)[len(rows) // 2]) + 1e-6
    done = cli("prune", path, tmp_path / "gated", "--max-loss-increase", gate, *run)
    block, made = done.json["prune"], open_model(tmp_path / "gated")
    (best,) = [row for row in block["mix"] if row["chosen"]]
    assert block["measured"]["loss_increase"] == best["loss_increase"] <= gate
    assert (made.num_experts, made.expert_width) == (best["experts"], best["width"])
    passing = [row["bytes"] for row in block["mix"] if row["loss_increase"] <= gate]
    assert done.json["bytes"] == best["bytes"] and best["bytes"] < 1.1 * min(passing), "not close to the smallest"


def test_a_width_changes_no_key_that_only_gets_other_words(tmp_path):
    """A config in the words of transformers 5 alone keeps its rotary base in those of version 4 too."""
    path = save_stock(tmp_path / "moe", *MOE_CASES["qwen3_vl_moe"], dtype=torch.float32)
    stated = open_model(path).checkpoint.config["text_config"]
    assert "rope_theta" not in stated
    made = plan_prune(open_model(path), width=8).config["text_config"]
    assert made["rope_theta"] == made["rope_parameters"]["rope_theta"] == stated["rope_parameters"]["rope_theta"]
