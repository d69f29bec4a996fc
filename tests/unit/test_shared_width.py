"""prune --shared-width, and shared experts as wide as the others: what data decides, against float64 and against the
written file; an interrupted run; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from words import text

from moeconv.calibrate.neurons import activations
from moeconv.checkpoint.overlay import Overlay
from moeconv.data.heldout import held_out
from moeconv.errors import Interrupted
from moeconv.families.model import Model, open_model
from moeconv.families.neurons import Narrow
from moeconv.plan.execute import execute
from moeconv.prune.planner import plan_prune
from moeconv.prune.repair.narrow import narrow_layer
from moeconv.prune.repair.neurons import write_neurons
from moeconv.prune.repair.pruned import masked, pruned_pass
from moeconv.prune.repair.refit import Refit
from moeconv.prune.repair.run import repair
from moeconv.prune.repair.variant import Variant
from moeconv.stream.layers import LayerStream
from tests.unit.test_width import SEQ_LEN, data_of, make

pytestmark = pytest.mark.usefixtures("one_thread")
slow = pytest.mark.slow


def written(model: Model, keep: Any, variant: Variant, out: Path, folder: Path, **overlay: Path) -> Model:
    """The narrower model on disk, as the command writes it."""
    width = variant.width or model.expert_width
    chosen, shared = ({k: v.numpy() for k, v in of.items()} for of in (variant.neurons, variant.shared_neurons))
    write_neurons(Narrow(model, width, variant.shared), keep, folder / "neurons", chosen=chosen, shared=shared)
    overlays = {name: Overlay(path) for name, path in {**overlay, "neurons": folder / "neurons"}.items()}
    left = len(next(iter(keep.values())))
    budget = {} if left == model.num_experts else {"keep": left}
    plan = plan_prune(
        model, width=variant.width, shared_width=variant.shared, keep_experts=keep, overlays=overlays, **budget
    )
    execute(plan, source=model.checkpoint, out=out, origins=overlays, jobs=1)
    return open_model(out)


@pytest.mark.parametrize(
    ("case", "own", "added"),
    [
        ("qwen2_moe", True, True),  # with a gate
        ("llama4", False, True),  # as wide as the experts
        pytest.param("hunyuan_v1_moe", False, True, marks=slow),
        pytest.param("granitemoeshared", True, True, marks=slow),  # gate and up in one tensor, a factor of the stream
        pytest.param("cohere2_moe", True, True, marks=slow),  # averaged with the experts
        pytest.param("nemotron_h", True, True, marks=slow),
        pytest.param("gemma4", True, False, marks=slow),  # a norm behind it
    ],
)
@pytest.mark.parametrize("removes", [True, pytest.param(False, marks=slow)])
def test_a_narrowed_shared_expert_is_the_written_file_and_better_than_by_weights(
    tmp_path: Path, case: str, own: bool, added: bool, removes: bool
) -> None:
    path = make(tmp_path / "model", case)
    model, data = open_model(path), data_of(path, tmp_path)
    keep = {at: [0, 1, 3, 4, 6, 7] if removes else list(range(8)) for at in model.moe_layers}
    left = len(next(iter(keep.values())))
    tied = model.family.experts.width in model.family.experts.shared_width
    width = model.expert_width // 2 if tied else None
    shared = model.shared_width // 2 if own else None
    narrow = Narrow(model, width or model.expert_width, shared)
    variant = Variant(keep=dict(keep), refit=Refit(), width=width, shared=shared)
    stream = LayerStream(model, data.windows)
    repair(stream, data, variant, tmp_path / "width", left=left, narrow=narrow)
    assert {*variant.shared_neurons} == {at for at in model.moe_layers if narrow.shared_down(at)} != set()
    assert bool(variant.shared_fitted) is added
    made = written(model, keep, variant, tmp_path / "out", tmp_path, width=tmp_path / "width")
    assert made.shared_width == model.shared_width // 2
    found = LayerStream(made, data.windows).run()
    assert torch.allclose(found.hidden, variant.hidden, rtol=1e-3, atol=1e-4)
    plain = written(model, keep, Variant(width=width, shared=shared), tmp_path / "plain", tmp_path)
    by_weights = LayerStream(plain, data.windows).run()
    assert (variant.hidden - stream.hidden).norm() < (by_weights.hidden - stream.hidden).norm()


def test_the_down_projection_of_a_narrowed_shared_expert_is_the_fit_in_float64(tmp_path: Path) -> None:
    """Its neurons count by the gate, and the refit makes up for the experts that are removed."""
    path = make(tmp_path / "model", "qwen2_moe")
    model, data = open_model(path), data_of(path, tmp_path)
    kept = {at: [0, 1, 3, 4] for at in model.moe_layers}
    plain, refitted = (Variant(dict(kept), refit=refit, shared=32) for refit in (None, Refit()))
    made: dict[bool, torch.Tensor] = {}
    for variant in (plain, refitted):

        def first(layer: int, _experts: Any, down: torch.Tensor, of: Variant = variant) -> None:
            made.setdefault(of is refitted, down[0].double())

        variant.on_shared = first
    pruned_pass(LayerStream(model, data.windows), [plain, refitted])

    at = model.moe_layers[0]
    layer = next(layer for layer in LayerStream(model, data.windows).layers() if layer.index == at)
    stream, shared = layer._stream, layer.ffn.shared_expert
    held = torch.from_numpy(held_out(*data.windows.shape)).flatten()
    down = shared.down_proj.weight.detach().double()

    def outputs() -> torch.Tensor:
        return torch.cat([b.outputs.flatten(0, 1) for b in layer.batches(advance=False)]).double()

    whole = outputs()
    inputs: list[torch.Tensor] = []
    hook = shared.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    with activations(shared.down_proj) as seen, masked(stream, layer, kept[at]):
        missing = (whole - outputs())[~held]
    hook.remove()
    gates = torch.sigmoid(torch.cat(inputs).double() @ layer.ffn.shared_expert_gate.weight.detach().double().T)
    a = (torch.cat(seen).double() * gates)[~held]

    def refit(base: torch.Tensor, some: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        gram = a[:, some].T @ a[:, some]
        gram += 0.3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        return base + torch.linalg.solve(gram, a[:, some].T @ left).T

    def cut(base: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
        gram = a.T @ a
        gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        return torch.linalg.solve(gram[some][:, some], gram[some] @ base.T).T

    some = plain.shared_neurons[at][0]
    assert len(some) == 32 and torch.allclose(made[False][:, some], cut(down, some), rtol=1e-4, atol=1e-6)
    some = refitted.shared_neurons[at][0]
    assert refitted.shared_fitted[0].kept, "the fit was not better"
    own = cut(refit(down, torch.arange(len(down.T)), missing), some)
    left = missing - (a[:, some] @ own.T - a @ down.T)
    assert torch.allclose(made[True][:, some], refit(own, some, left), rtol=1e-3, atol=1e-5)


def test_a_stopped_choice_of_the_neurons_of_shared_experts_continues_after_the_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "model", "qwen2_moe")
    model, data = open_model(path), data_of(path, tmp_path)
    first, *_, last = model.moe_layers
    reached: list[int] = []

    def chosen(folder: Path, *, stop: int | None = None) -> Variant:
        reached.clear()

        def counted(layer: int, *rest: Any) -> Any:
            reached.append(layer)
            if layer == stop:
                raise Interrupted("stopped")
            return narrow_layer(layer, *rest)

        monkeypatch.setattr("moeconv.prune.repair.shared.narrow_layer", counted)
        variant = Variant(keep={at: list(range(8)) for at in model.moe_layers}, shared=32)
        narrow = Narrow(model, model.expert_width, 32)
        stream = LayerStream(model, data.windows)
        repair(stream, data, variant, folder / "width", left=8, narrow=narrow, save_every=0.0)
        return variant

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = chosen(tmp_path / "whole")
    with pytest.raises(Interrupted):
        chosen(tmp_path / "stopped", stop=last)
    again = chosen(tmp_path / "stopped")
    assert first not in reached and reached[-1] == last, reached
    assert all(torch.equal(whole.shared_neurons[at], again.shared_neurons[at]) for at in model.moe_layers)
    assert again.shared_narrowed == whole.shared_narrowed and torch.equal(again.hidden, whole.hidden)
    files = [{f.name: f.read_bytes() for f in (tmp_path / n / "width").iterdir()} for n in ("whole", "stopped")]
    assert files[0] == files[1] != {}


@pytest.mark.parametrize(
    "flags",
    [
        ["--shared-width", 32],
        pytest.param(["--ratio", 0.25, "--width-ratio", 0.5, "--shared-width", 32, "--refit"], marks=slow),
        pytest.param(["--shared-width", 32, "--refit"], marks=slow),
        pytest.param(["--shared-width", 32, "--heal", 3], marks=slow),
    ],
)
def test_shared_experts_are_cut_by_the_command(tmp_path: Path, cli: Any, flags: list[object]) -> None:
    path = make(tmp_path / "model", "qwen2_moe")
    (tmp_path / "a.txt").write_text(text(1024, seed=1))
    run = (*flags, "--data", tmp_path / "a.txt", "--seq-len", SEQ_LEN, "--batch-size", 4, "--json")
    dry = cli("prune", path, tmp_path / "out", *run, "--dry-run")
    done = cli("prune", path, tmp_path / "out", *run)
    assert done.code == 0, done.out
    block = done.json["prune"]
    assert (block["shared_width_before"], block["shared_width_after"]) == (64, 32)
    assert [row["layer"] for row in block["shared_width"]["layers"]] == list(open_model(path).moe_layers)
    assert dry.json["bytes"] == done.json["bytes"] and dry.json["parameters"] == done.json["parameters"]
    assert open_model(tmp_path / "out").value("shared_expert_intermediate_size") == 32
    assert cli("verify", tmp_path / "out", "--load", "--json").json["ok"]
    assert cli("prune", path, tmp_path / "again", *run).json["files"] == done.json["files"]


def test_a_size_counts_the_narrower_shared_expert(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model", "qwen2_moe")
    flags = ("--shared-width", 8, "--dry-run", "--json")
    limit = cli("prune", path, tmp_path / "out", "--keep", 6, *flags).json["bytes"]
    found = cli("prune", path, tmp_path / "out", "--max-bytes", limit, *flags).json
    assert found["prune"]["experts_after"] == 6 and found["bytes"] == limit


def test_a_shared_expert_that_cannot_be_cut_is_refused(tmp_path: Path, cli: Any) -> None:
    for case, flags, code, says in (
        ("qwen2_moe", ["--shared-width", 64], 2, "expected 1 to 63"),
        ("qwen2_moe", ["--shared-width", 0], 2, "expected 1 to 63"),
        ("qwen2_moe", ["--shared-width", 32, "--ratio", 0.5, "--mix", "auto", "--data", "x"], 2, "exclude each other"),
        ("qwen2_moe", ["--shared-width", 32, "--protect", "0:1"], 2, "--protect is about which experts are kept"),
        ("qwen3_moe", ["--shared-width", 16], 3, "has no shared expert"),
        ("llama4", ["--shared-width", 16], 3, "one key for both (intermediate_size)"),
        ("glm4_moe", ["--shared-width", 16], 2, "moe_intermediate_size x n_shared_experts"),
        ("glm4_moe", ["--shared-width", 24, "--width", 16], 2, "a multiple of 16"),
    ):
        path = tmp_path / case
        path = path if path.exists() else make(path, case)
        done = cli("prune", path, tmp_path / "out", *flags, "--json")
        assert done.code == code and says in done.json["error"]["message"], (flags, done.out)
    assert not (tmp_path / "out").exists()
