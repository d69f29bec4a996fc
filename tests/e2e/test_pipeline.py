"""End to end on the trained demo checkpoint, through the real command: shell pipeline, recipe, demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "moeconv" / "demo_data"
PIPELINE = ROOT / "moeconv" / "recipes" / "pipeline.sh"


@pytest.fixture(scope="module")
def environment():
    """The command of this checkout first on PATH."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_the_shell_pipeline_runs_every_step_with_json_on_stdout(tmp_path, environment):
    small = environment | {"STEPS": "5", "MAX_LOSS_INCREASE": "6"}
    done = subprocess.run(
        ["bash", PIPELINE, tmp_path],
        env=small,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(results) == 8
    assert results["4-prune"]["prune"]["experts_after"] == 4
    assert results["6-verify"]["ok"] is True
    assert results["7-evaluate"]["passed"] is True
    assert results["8-piped"]["quantize"]["scheme"] == "int8"


@pytest.mark.slow
def test_a_gate_that_fails_ends_the_shell_pipeline_with_5(tmp_path, environment):
    strict = environment | {"STEPS": "1", "MAX_LOSS_INCREASE": "0.000001"}
    done = subprocess.run(
        ["bash", PIPELINE, tmp_path],
        env=strict,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5, done.stderr[-2000:]
    result = json.loads((tmp_path / "7-evaluate.json").read_text())
    assert result["passed"] is False
    assert not (tmp_path / "8-piped.json").exists()


RECIPE = """
name: small
vars: {work: work, experts: 4}
report: ${work}/report.html
steps:
  - step: upcycle
    from: ${demo}/model
    to: ${work}/moe
    with: {experts: "${experts}", method: noise}
  - step: prune
    from: ${work}/moe
    to: ${work}/pruned
    with: {ratio: 0.5}
  - step: quantize
    from: ${work}/pruned
    to: ${work}/int8
    with: {bits: 8}
"""


@pytest.mark.slow
def test_a_recipe_writes_the_sizes_of_its_dry_run_and_keeps_what_is_finished(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE)
    planned = cli("run", recipe, "--dry-run", "--json").json
    assert not (tmp_path / "work").exists()
    assert planned["disk_bytes"] < planned["disk_free_bytes"]
    assert all(s["memory_bytes"] > 50e6 for s in planned["steps"][1:])
    first = cli("run", recipe, "--json").json
    assert [s["bytes"] for s in first["steps"]] == [s["bytes"] for s in planned["steps"]]
    assert [s["kept"] for s in first["steps"][1:]] == [False, False, False]
    page = Path(first["report"]).read_text()
    assert page.count("<code>moeconv ") >= 3 and "small" in page
    again = cli("run", recipe, "--json").json
    assert [s["kept"] for s in again["steps"][1:]] == [True, True, True]
    changed = cli("run", recipe, "--set", "experts=8", "--set", f"work={tmp_path / 'other'}", "--json").json
    assert changed["steps"][1]["total"] > first["steps"][1]["total"]


@pytest.mark.parametrize(
    ("old", "new", "line", "hint"),
    [
        ("ratio: 0.5", "rato: 0.5", 13, "ratio"),
        ("method: noise", "method: noize", 9, "noise"),
        ("step: prune", "step: proon", 10, "prune"),
        ("    to: ${work}/moe", "    too: ${work}/moe", 8, "to"),
        ("bits: 8", "bits: eight", 17, ""),
        ("${work}/int8", "${wrk}/int8", 16, "work"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_its_line(tmp_path, cli, old, new, line, hint):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(RECIPE.replace(old, new))
    done = cli("run", recipe, "--json")
    assert done.code == 2
    assert f"wrong.yaml:{line}:" in done.json["error"]["message"]
    assert hint in done.json["error"]["hint"]


@pytest.mark.slow
def test_demo_runs_the_whole_pipeline_and_ends_with_its_table(tmp_path, environment):
    done = subprocess.run(
        [sys.executable, "-m", "moeconv", "demo", tmp_path / "demo", "--json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["step"]: row for row in json.loads(done.stdout)["steps"]}
    source, upcycled, tuned, pruned, packed = rows.values()
    assert source["kl"] is None and source["loss"] < 3.5
    assert upcycled["total"] > 4 * source["total"]
    assert tuned["kl"] < 0.5 * upcycled["kl"]
    assert pruned["total"] < 0.6 * tuned["total"]
    assert packed["bytes"] < 0.6 * pruned["bytes"]
    assert packed["loss"] < upcycled["loss"]


@pytest.mark.slow
def test_verbose_tells_hashes_on_stderr_and_leaves_stdout_alone(tmp_path, command):
    plain = command("upcycle", DEMO / "model", tmp_path / "a", "--no-check", "-q")
    verbose = command("upcycle", DEMO / "model", tmp_path / "b", "--no-check", "-q", "-v")
    assert plain.out == f"{tmp_path / 'a'}\n" and verbose.out == f"{tmp_path / 'b'}\n"
    assert "model.safetensors" in verbose.err and "plan_id" in verbose.err
