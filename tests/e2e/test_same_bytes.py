"""One plan, one result, everywhere: three steps on the demo checkpoint against manifests that are committed.

Steps that train are not among them. When what is meant to be written has changed, this writes the manifests anew:
PYTHONPATH=.:tests python tests/e2e/test_same_bytes.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import hashes

from moeconv.checkpoint.output import OutputDirectory
from moeconv.checkpoint.reader import MANIFEST_NAME
from moeconv.families.model import Model, open_model
from moeconv.plan.execute import execute
from moeconv.plan.plan import Plan
from moeconv.prune.planner import plan_prune
from moeconv.quantize.planner import plan_quantize
from moeconv.recipe.read import DEMO_DATA
from moeconv.upcycle.planner import plan_upcycle

MANIFESTS = Path(__file__).parent / "manifests"
STEPS = ("upcycle", "prune", "quantize")
KEEP = {0: [0, 1, 3], 1: [1, 2, 3], 2: [0, 2, 3], 3: [0, 1, 2], 4: [0, 1, 3]}


def plan_of(step: str, model: Model) -> Plan:
    if step == "upcycle":
        return plan_upcycle(model, experts=4, top_k=2, method="copy", shard_size="1MB")
    if step == "prune":
        return plan_prune(model, keep=3, keep_experts=KEEP, shard_size="1MB")
    return plan_quantize(model, scheme="int4", group_size="32", method="rtn", shard_size="400KB")


def source_of(step: str, folder: Path) -> Model:
    return open_model(DEMO_DATA / "model" if step == "upcycle" else folder / STEPS[STEPS.index(step) - 1])


def run_all(folder: Path) -> None:
    for step in STEPS:
        model = source_of(step, folder)
        execute(plan_of(step, model), source=model.checkpoint, out=folder / step)


def manifest(path: Path) -> dict[str, Any]:
    """What must not change: every file's hash, and what each step says it did. Ids and parameters may grow."""
    full = json.loads((path / MANIFEST_NAME).read_text())
    keys = ("command", "changed", "total_parameters", "active_parameters")
    return {"files": full["files"], "steps": [{key: step[key] for key in keys} for step in full["steps"]]}


def committed(step: str) -> dict[str, Any]:
    return json.loads((MANIFESTS / f"{step}.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("made")
    run_all(folder)
    yield folder


@pytest.mark.parametrize("step", STEPS)
def test_the_bytes_are_those_that_were_committed(made, step):
    assert manifest(made / step) == committed(step)
    assert {n: h for n, h in hashes(made / step).items() if n != MANIFEST_NAME} == {
        name: entry["sha256"] for name, entry in committed(step)["files"].items()
    }
    assert sum(name.endswith(".safetensors") for name in committed(step)["files"]) >= 4


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_any_number_of_workers(made, tmp_path, step, jobs):
    model = source_of(step, made)
    execute(plan_of(step, model), source=model.checkpoint, out=tmp_path / "out", jobs=jobs)
    assert hashes(tmp_path / "out") == hashes(made / step)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("order", [["0/2", "1/2"], ["2/3", "0/3", "1/3"]])
def test_parts_in_any_order(made, tmp_path, step, order):
    model = source_of(step, made)
    for part in order:
        i, n = map(int, part.split("/"))
        assert not (tmp_path / "out").exists()
        execute(plan_of(step, model), source=model.checkpoint, out=tmp_path / "out", jobs=1, part=(i, n))
    assert hashes(tmp_path / "out") == hashes(made / step)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [1, 3])
def test_cut_off_and_resumed(made, tmp_path, step, after, monkeypatch):
    model = source_of(step, made)
    real, done = OutputDirectory.mark_finished, []

    def cut_off(self, name, record):
        if len(done) == after:
            raise MemoryError
        done.append(name)
        real(self, name, record)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(OutputDirectory, "mark_finished", cut_off)
        execute(plan_of(step, model), source=model.checkpoint, out=tmp_path / "out", jobs=1)
    assert len(done) == after and not (tmp_path / "out").exists()
    execute(plan_of(step, model), source=model.checkpoint, out=tmp_path / "out", jobs=2)
    assert hashes(tmp_path / "out") == hashes(made / step)


@pytest.mark.slow
def test_a_processor_without_wide_vectors(tmp_path):
    """As another machine would compute: numpy and torch fall back to what every x86-64 or ARM core has."""
    import numpy as np

    found = getattr(np._core._multiarray_umath, "__cpu_features__", {})
    wide = [name for name in np._core._multiarray_umath.__cpu_dispatch__ if found.get(name)]
    less = {"NPY_DISABLE_CPU_FEATURES": " ".join(wide), "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, tmp_path]
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])
    subprocess.run(list(map(str, words)), check=True, env=os.environ | less | {"PYTHONPATH": path})
    for step in STEPS:
        assert manifest(tmp_path / step) == committed(step)


def test_a_byte_that_differs_is_seen(made, tmp_path):
    """The comparison above fails for a single bit in a single tensor."""
    model = source_of("prune", made)
    plan = plan_prune(model, keep=3, keep_experts=KEEP | {4: [0, 1, 2]}, shard_size="1MB")
    execute(plan, source=model.checkpoint, out=tmp_path / "out")
    ours, theirs = manifest(tmp_path / "out"), committed("prune")
    assert ours["steps"] == theirs["steps"]
    differ = [name for name in theirs["files"] if ours["files"][name] != theirs["files"][name]]
    assert len(differ) == 1, "copies of one expert, but for the router's row of layer 4"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_all(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            run_all(Path(scratch))
            for name in STEPS:
                text = json.dumps(manifest(Path(scratch) / name), indent=1, sort_keys=True)
                (MANIFESTS / f"{name}.json").write_text(text + "\n")
