"""`prune --heal`: what is written computes what was trained, and is never worse than what the layer had before."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
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
from moeconv.prune.repair.pruned import pruned_pass
from moeconv.prune.repair.refit import Refit
from moeconv.prune.repair.variant import Variant
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


KILLED = """
import os, signal, sys, torch
from moeconv.calibrate import state
from moeconv.cli.app import run
torch.set_num_threads(1)
state.EVERY = 0.0
keep = state.SavedProgress.save
def save(self, stream, passed, fields):
    if self.folder.name == ".heal.moeconv-state" and passed == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    keep(self, stream, passed, fields)
state.SavedProgress.save = save
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_at_a_random_layer_and_run_again_the_bytes_are_the_same(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model", "qwen3_moe")
    layers = open_model(path).num_layers
    (tmp_path / "text").write_text(text(6000, seed=1))
    words = ["prune", path, tmp_path / "out", "--keep", 4, "--refit", "--heal", 8, "--sequential", "--json"]
    words += ["--data", tmp_path / "text", "--tokens", 2048, "--seq-len", 32]
    killed_at = int(np.random.default_rng().integers(2, layers))  # layers passed; one less was saved
    command = [sys.executable, "-c", KILLED, killed_at, *words]
    assert subprocess.run([*map(str, command)], check=False).returncode == -9
    (state,) = (tmp_path / ".out.moeconv").glob("measured-*/decision.begun")
    assert {".heal.begun", ".heal.moeconv-state"} <= {p.name for p in state.iterdir()}
    shutil.copytree(tmp_path / ".out.moeconv", tmp_path / "copy")
    again = cli(*words)
    assert again.code == 0 and f"resuming after layer {killed_at - 2}" in again.err, again.err
    assert not (tmp_path / ".out.moeconv").exists()
    words[2] = tmp_path / "whole"
    whole = cli(*words)
    assert whole.code == 0 and "resuming" not in whole.err
    assert again.json["prune"] == whole.json["prune"] and len(whole.json["prune"]["heal"]["layers"]) == layers
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1], killed_at

    # without the weights of a layer, the pass starts again
    shutil.copytree(tmp_path / "copy", tmp_path / ".out.moeconv")
    (state,) = (tmp_path / ".out.moeconv").glob("measured-*/decision.begun")
    os.truncate(state / ".heal.begun" / "00000.safetensors", 100)
    words[2] = tmp_path / "out"
    again = cli(*words, "--overwrite")
    assert again.code == 0 and "resuming after" not in again.err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights[1]


def test_refusals(tmp_path: Path, cli: Any) -> None:
    path = make(tmp_path / "model", "llama4")
    (tmp_path / "text").write_text(text(300))
    data = ("--data", tmp_path / "text", "--seq-len", 16)
    assert cli("prune", path, tmp_path / "out", "--keep", 4, "--heal", -1, *data).code == 2
    assert cli("prune", path, tmp_path / "out", "--keep", 4, "--heal", 3, "--merge", *data).code == 2
    assert cli("prune", path, tmp_path / "out", "--keep", 4, "--heal", 3).code == 2, "there is no text"
    done = cli("prune", path, tmp_path / "out", "--keep", 4, "--criterion", "aimer", "--heal", 3, *data)
    assert done.code == 3 and "--heal cannot train" in done.err and not (tmp_path / "out").exists()
