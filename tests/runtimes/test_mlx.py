"""Does mlx-lm read what is written as transformers 5 does? Tiny outputs of every family that it knows.

Skipped unless MOECONV_MLX_PYTHON names an interpreter with mlx-lm (environments.sh).
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
from tests.contract.stock import CASES, MOE_CASES, WRAPPED_DENSE, load, row_of, save_stock

VARIABLE = "MOECONV_MLX_PYTHON"
IDS = np.random.default_rng(0).integers(4, 128, (2, 16)).tolist()
pytestmark = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} is not set")
LIMIT = 1e-4  # of the logits' spread: it normalises in latent attention with an epsilon of its own
UNKNOWN = "not supported"
# what it does not do, whatever config.json says; the first word that matches a name holds
OTHERWISE = {
    # pruned
    "qwen2_moe": "Received 3 parameters",  # dense layers
    "glm_moe_dsa": "apart",  # other tokens beyond index_topk
    "gpt_oss": "Received 9 parameters",  # experts that are not MXFP4
    "ernie4_5_moe": "apart",  # the correction bias
    "deepseek_v2": "'NoneType' object has no attribute 'get'",  # no YaRN
    "deepseek_v2-groups": "'NoneType' object has no attribute 'get'",
    "jamba": "apart",  # renormalised weights
    "mimo_v2_flash": "dims must be even",  # a third of 16 dimensions
    "llama4": "Received 13 parameters", "minimax": "positional argument",  # other models of these names
    "qwen3_vl_moe": "Expected shape",  # transformers 5 saves its experts untransposed
    "qwen3_5_moe-vision": "parameters not in model",  # and these as separate tensors, unlike the hub
    "llama4-vision": "Only 1 expert per token",
    "gemma4-vision": "Expected shape (262144",  # a vocabulary unlike the published one
    "mistral3": "parameters not in model",  # experts inside mistral3
    # upcycled
    "llama-head-dim -> mixtral": "Expected shape", "llama-rope -> mixtral": "apart", "llama-rope -> glm4_moe": "apart",
    "mistral-sliding -> mixtral": "apart", "phi3-sliding -> mixtral": "apart", "ministral3 -> mixtral": "apart",
    "phi3-longrope -> mixtral": "apart", "phi3-partial -> mixtral": "apart", "glm-no-bias -> mixtral": "apart",
    "phi3-partial-longrope -> mixtral": "apart", "gemma -> mixtral": "apart", "gemma-untied -> mixtral": "apart",
    "arcee -> mixtral": "apart", "cwm -> qwen2_moe": "rope_scaling", "olmo-clip -> dbrx": "apart",
    "qwen3-attention-bias -> qwen3_moe": "_proj.bias", "qwen3-attention-bias -> dots1": "_proj.bias",
    "qwen3-attention-bias -> mellum": "_proj.bias",
    "qwen3-sliding -> mellum": "StopIteration", "qwen3-sliding -> qwen3_moe": "apart",
    "qwen3-sliding -> dots1": "apart", "qwen3-mixed -> dots1": "apart", "qwen2-tied -> glm4_moe": "lm_head",
    "youtu -> deepseek_v3": "lm_head", "minicpm3 -> deepseek_v3": "lm_head", "jais2 -> phimoe": "apart",
    "nemotron -> phimoe": "apart", "bamba -> granitemoehybrid": "apart", "bamba-bias -> granitemoehybrid": "apart",
    "qwen3_5": "parameters not in model",
}  # fmt: skip
# without biases, without a head of its own, or with weights that are not renormalised; MXFP4 experts
TARGETS_OTHERWISE = {"qwen2_moe": ("Missing", "apart"), "gpt_oss": ("Received", "sliding_attention")}


def _compare(models: dict[str, Path], folder: Path) -> dict[str, str]:
    """{name: what is wrong} of the models that mlx-lm reads otherwise, or does not know."""
    out = folder / "logits.safetensors"
    job = {"models": {name: str(path) for name, path in models.items()}, "ids": IDS, "out": str(out)}
    done = subprocess.run(
        [os.environ[VARIABLE], str(Path(__file__).parent / "run_mlx.py")], input=json.dumps(job), text=True,
        capture_output=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    wrong, theirs = json.loads(done.stdout), load_file(out)
    for name, logits in theirs.items():
        with torch.no_grad():
            mine = load(models[name])(torch.tensor(IDS)).logits.float()
        apart = float((mine - logits).abs().max() / mine.std())
        print(f"{name:40} {apart:.1e}")
        if not apart < LIMIT:
            wrong[name] = f"{apart:.1e} of the spread apart"
    return {name: why for name, why in wrong.items() if why is not None}


def _check(wrong: dict[str, str]) -> None:
    """What it reads otherwise is what the tables above say, for the reason that they say."""
    for name, why in wrong.items():
        target = TARGETS_OTHERWISE.get(name.rpartition("-> ")[2], ()) if "->" in name else ()
        said = (UNKNOWN, *target, *([OTHERWISE[name]] if name in OTHERWISE else []))
        assert any(word in why for word in said), f"{name}: {why}"


def _upcycle(values: dict[str, Any], source: Path, out: Path) -> Path:
    run_step("upcycle", {"experts": 4, "no_check": True, **values}, str(source), str(out), meter=SilentMeter())
    return out


def test_pruned_models_of_every_family(tmp_path):
    models = {}
    for case, (kind, config) in MOE_CASES.items():
        source = save_stock(tmp_path / case, kind, config, dtype=torch.float32)
        values = {"keep": 4, "criterion": "random"} | ({} if row_of(case).experts.routing.top_k else {"top_k": 2})
        models[case] = out = tmp_path / f"{case}-out"
        run_step("prune", values, str(source), str(out), meter=SilentMeter())
    wrong = _compare(models, tmp_path)
    _check(wrong)
    assert len(models) - len(wrong) >= 24


def test_upcycled_models_of_every_pair(tmp_path):
    models = {}
    for case, (kind, config, names) in CASES.items():
        targets = [p.target for p in tables().pairs if p.source == kind and (not names or p.target in names)]
        source = save_stock(tmp_path / case, kind, config, dtype=torch.float32)
        for target in targets:
            models[f"{case} -> {target}"] = _upcycle({"to": target}, source, tmp_path / f"{case}-{target}")
    for case in ("qwen3_vl", "qwen3_5"):
        source = save_stock(tmp_path / f"{case}-vision", *WRAPPED_DENSE[case][:2], dtype=torch.float32)
        models[case] = _upcycle({}, source, tmp_path / f"{case}-moe")
    wrong = _compare(models, tmp_path)
    _check(wrong)
    assert len(models) - len(wrong) >= 44
