"""`prune --heal`: what is written computes what was trained, and is never worse than what the layer had before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from words import add_tokenizer, text

from moeconv.checkpoint.overlay import Overlay
from moeconv.data.windows import load_tokens
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.prune.planner import plan_prune
from moeconv.prune.repair.heal import Heal
from moeconv.prune.repair.healed import write_healed
from moeconv.prune.repair.pruned import Variant, pruned_pass
from moeconv.prune.repair.refit import Refit
from moeconv.stream.layers import LayerStream
from tests.contract.stock import MOE_CASES, load, save_stock

pytestmark = pytest.mark.usefixtures("one_thread")


def make(path: Path, case: str) -> Path:
    return add_tokenizer(Path(save_stock(path, *MOE_CASES[case], dtype=torch.float32)))


def windows(folder: Path, model: Path, *, tokens: int = 1024) -> Any:
    (folder / "text").write_text(text(max(1200, tokens * 5), seed=1))
    return load_tokens([str(folder / "text")], model, tokens=tokens, seq_len=32, seed=0)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "olmoe"])
def test_the_written_model_computes_what_was_trained(tmp_path: Path, case: str) -> None:
    path = make(tmp_path / "model", case)
    model, read = open_model(path), windows(tmp_path, path)
    keep = {layer: [1, 2, 4, 6] if case != "deepseek_v3" else [0, 1, 4, 5] for layer in model.moe_layers}
    stream = LayerStream(model, read.windows, experts="grouped_mm", in_place=True)
    healed = Variant(keep=dict(keep), heal=Heal(10))
    write_healed(stream, read, healed, tmp_path / "heal", left=4, settings={})
    plain = Variant(keep=dict(keep))
    pruned_pass(LayerStream(model, read.windows, experts="grouped_mm", in_place=True), [plain])
    assert any(row.kept for row in healed.healed) and all(row.error_after <= row.error_before for row in healed.healed)
    assert not torch.allclose(healed.hidden, plain.hidden, atol=1e-3)
    overlays = {"heal": Overlay(tmp_path / "heal")}
    plan = plan_prune(model, keep=4, keep_experts=keep, overlays=overlays, rescale=False)
    execute(plan, source=model.checkpoint, out=tmp_path / "out", origins=overlays)
    load(tmp_path / "out")
    written = LayerStream(open_model(tmp_path / "out"), read.windows, experts="grouped_mm").run()
    assert torch.allclose(written.hidden, healed.hidden, rtol=1e-3, atol=1e-4)


def test_a_layer_that_does_not_gain_keeps_its_refit_bit_for_bit(
    tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeconv.prune.repair.heal.clearly_less", lambda *_: False)
    path = make(tmp_path / "model", "mixtral")
    (tmp_path / "text").write_text(text(1200, seed=1))
    flags = ("--keep", 4, "--refit", "--data", tmp_path / "text", "--seq-len", 32, "--json")
    healed = cli("prune", path, tmp_path / "healed", "--heal", 2, *flags)
    assert healed.code == 0 and cli("prune", path, tmp_path / "refit", *flags).code == 0
    assert [row["kept"] for row in healed.json["prune"]["heal"]["layers"]] == [False] * 3
    assert any("--heal: layers 0-2 keep the weights that they had" in w for w in healed.json["warnings"])
    one, other = open_model(tmp_path / "healed"), open_model(tmp_path / "refit")
    for name in one.roles:
        assert one.checkpoint.read(name) == other.checkpoint.read(name), name


def test_refit_and_heal_end_closer_to_the_unpruned_model(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "qwen3_moe")
    model, read = open_model(path), windows(tmp_path, path, tokens=4096)
    keep = {layer: [0, 3, 5, 7] for layer in model.moe_layers}
    stream = LayerStream(model, read.windows, experts="grouped_mm", in_place=True)
    variants = [
        Variant(keep=dict(keep), refit=Refit(), heal=heal, on_healed=lambda *_: None) for heal in (None, Heal(60))
    ]
    pruned_pass(stream, variants)
    off = [float((v.hidden - stream.hidden).square().mean()) for v in variants]
    assert off[1] < 0.95 * off[0]


def test_refusals(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model", "llama4")
    (tmp_path / "text").write_text(text(300))
    data = ("--data", tmp_path / "text", "--seq-len", 16)
    assert cli("prune", path, tmp_path / "out", "--keep", 4, "--heal", -1, *data).code == 2
    assert cli("prune", path, tmp_path / "out", "--keep", 4, "--heal", 3, "--merge", *data).code == 2
    assert cli("prune", path, tmp_path / "out", "--keep", 4, "--heal", 3).code == 2, "there is no text"
    done = cli("prune", path, tmp_path / "out", "--keep", 4, "--criterion", "aimer", "--heal", 3, *data)
    assert done.code == 3 and "--heal cannot train" in done.err and not (tmp_path / "out").exists()
