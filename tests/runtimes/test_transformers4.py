"""Does transformers 4 read what is written as transformers 5 does? Tiny outputs of every family that it knows.

Skipped unless MOECONV_TRANSFORMERS4_PYTHON names an interpreter with transformers 4 (environments.sh). The sources are
saved by transformers 5, so that their configs have its words alone.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moeconv.families.registry import tables
from moeconv.plan.meter import SilentMeter
from moeconv.recipe.run import run_step
from tests.contract.stock import CASES, MOE_CASES, load, row_of, save_stock

VARIABLE = "MOECONV_TRANSFORMERS4_PYTHON"
IDS = np.random.default_rng(0).integers(4, 128, (2, 16)).tolist()
pytestmark = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} is not set")
# cases that transformers 4 cannot read for what is in the tensors, and not in config.json
NOT_THERE = {
    "qwen3_vl_moe": "transformers 5 saves its experts as [E, out, in], version 4 and the hub have [E, in, out]",
}
# what its class refuses in so many words
REFUSED_THERE = {"llama-head-dim -> qwen2_moe": "hidden_size must be divisible by num_heads"}
SETTINGS = {"jamba": {"use_mamba_kernels": False}}  # the kernels of its class want a GPU
LIMIT = 1e-5  # of the logits' spread
LIMITS = {"qwen3_next": 2e-5}  # its delta rule goes through the tokens in another order


def _run(job: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).parent / "run_transformers4.py"
    done = subprocess.run(
        [os.environ[VARIABLE], str(script)], input=json.dumps(job), capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def _known() -> set[str]:
    return set(_run({"models": {}})["known"])


def _compare(models: dict[str, Path], folder: Path) -> dict[str, str]:
    """{name: what is wrong} of the models that transformers 4 reads otherwise."""
    out = folder / "logits.safetensors"
    found = _run({"models": {name: str(path) for name, path in models.items()}, "ids": IDS, "out": str(out)})
    theirs, wrong = load_file(out), {}
    for name, path in models.items():
        if name not in theirs:
            wrong[name] = found[name]
            continue
        with torch.no_grad():
            mine = load(path)(torch.tensor(IDS)).logits.float()
        apart = float((mine - theirs[name]).abs().max() / mine.std())
        print(f"{name:32} {apart:.1e} {found[name] or ''}")
        if found[name] or not apart < LIMITS.get(name, LIMIT):
            wrong[name] = found[name] or f"{apart:.1e} of the spread apart"
    print("wrong:", json.dumps(wrong, indent=1))
    return wrong


def test_pruned_models_of_every_family(tmp_path):
    known, models = _known(), {}
    for case, (kind, config) in MOE_CASES.items():
        if kind not in known or case in NOT_THERE:
            continue
        source = save_stock(tmp_path / f"{case}-source", kind, config | SETTINGS.get(case, {}), dtype=torch.float32)
        top_k = row_of(case).experts.routing.top_k
        values = {"keep": 4, "criterion": "random"} | ({} if top_k else {"top_k": 2})
        run_step("prune", values, str(source), str(tmp_path / case), meter=SilentMeter())
        models[case] = tmp_path / case
    assert len(models) > 15
    assert not _compare(models, tmp_path)


def test_upcycled_models_of_every_pair(tmp_path):
    """What transformers 4 cannot compute, a warning says; in all else both agree."""
    known, models, warned = _known(), {}, set()
    for case, (kind, config, targets) in CASES.items():
        pairs = [p.target for p in tables().pairs if p.source == kind and (not targets or p.target in targets)]
        for target in (t for t in pairs if t in known):
            source, out, name = tmp_path / f"{case}-source", tmp_path / f"{case}-{target}", f"{case} -> {target}"
            if not source.exists():
                save_stock(source, kind, config, dtype=torch.float32)
            values = {"to": target, "experts": 4, "no_check": True}
            made = run_step("upcycle", values, str(source), str(out), meter=SilentMeter())
            models[name] = out
            if any("transformers 5 alone" in warning for warning in made["warnings"]):
                warned.add(name)
    assert len(models) > 40
    wrong = _compare(models, tmp_path)
    assert wrong.keys() - REFUSED_THERE.keys() == warned
    assert all(REFUSED_THERE[name] in wrong[name] for name in REFUSED_THERE)
