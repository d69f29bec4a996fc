"""Every recipe that ships runs on the demo checkpoint, made small by its own variables; so do the shell twins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "moeconv" / "demo_data"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = {"steps": 2, "tokens": 2048, "eval_tokens": 2048}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_with_the_sizes_of_its_dry_run(tmp_path, command, recipe):
    known = yaml.safe_load(recipe.read_text())["vars"]
    assert known["work"] == recipe.stem, "models land in a folder of the recipe's name"
    settings = [f"--set={k}={v}" for k, v in SMALL.items() if k in known]
    settings.append(f"--set=work={tmp_path / 'work'}")
    if "gguf" in known:  # which a package has, and moeconv has not
        packed = command("quantize", DEMO / "model", tmp_path / "gguf", "--format", "gguf", "--scheme", "q4_1")
        assert packed.code == 0, packed.err
        settings.append(f"--set=gguf={tmp_path / 'gguf' / 'model.gguf'}")
    planned = command("run", recipe, *settings, "--dry-run", "--json")
    assert planned.code == 0, planned.out
    done = command("run", recipe, *settings, "--json")
    assert done.code == 0, done.out + done.err[-2000:]
    sizes = [[row.get("bytes") for row in run.json["steps"]] for run in (planned, done)]
    assert sizes[0] == sizes[1]
    if "report" in done.json:
        assert Path(done.json["report"]).read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_the_shell_twin_of_prune_repair_gates_on_loss(tmp_path, command):
    assert command("upcycle", DEMO / "model", tmp_path / "moe", "--method", "drop", "--no-check").code == 0
    words = ["bash", ROOT / "recipes" / "prune-repair.sh", tmp_path / "moe", tmp_path / "out"]
    words += [DEMO / "calibration.txt", DEMO / "heldout.txt"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
                                "TOKENS": "2048", "EVAL_TOKENS": "2048", "STEPS": "2"}  # fmt: skip
    done = subprocess.run(
        words, env=environment | {"MAX_LOSS_INCREASE": "9"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 4
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["moe", "out"]
    again = [*words[:3], tmp_path / "strict", *words[4:]]
    done = subprocess.run(
        again, env=environment | {"MAX_LOSS_INCREASE": "-9"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5, done.stderr[-2000:]
