"""Does transformers 4 read what is written as transformers 5 does? Tiny outputs of every family that it knows.

Skipped unless MOECONV_TRANSFORMERS4_PYTHON names an interpreter with transformers 4 (environments.sh). Every source is
there three times: in the words of transformers 5 as its save_pretrained writes them, in those that transformers 4
writes for the same model, and with the keys of both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from wordings import merged, old_words, reworded

import moeconv.hf  # noqa: F401
from moeconv.families.registry import tables
from moeconv.plan.meter import SilentMeter
from moeconv.recipe.run import run_step
from tests.contract.stock import (
    BROKEN,
    CASES,
    MOE_CASES,
    WRAPPED_DENSE,
    load,
    release,
    row_of,
    save_stock,
    transformers,
)

Case = tuple[str, dict[str, Any]]
VARIABLE = "MOECONV_TRANSFORMERS4_PYTHON"
IDS = np.random.default_rng(0).integers(4, 128, (2, 16)).tolist()
pytestmark = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} is not set")
# cases that transformers 4 cannot read for what is in the tensors, and not in config.json
NOT_THERE = {
    "qwen3_vl_moe": "transformers 5 saves its experts as [E, out, in], version 4 and the hub have [E, in, out]",
}
# what its class refuses in so many words
REFUSED_THERE = {
    "llama-head-dim -> qwen2_moe": "hidden_size must be divisible by num_heads",
    # what lies beside the language model keeps the names with which transformers 5 saved the source
    "llava": "vision_tower.embeddings", "llava_next": "vision_tower.embeddings",
    "llava_next_video": "vision_tower.embeddings",
    "video_llava": "Unrecognized configuration class",  # AutoModelForImageTextToText of version 4 does not list it
    "llava_onevision": "unexpected keyword argument 'logits_to_keep'",  # its class around Qwen2-MoE
}  # fmt: skip
KEPT = ("model_type", "architectures", "dtype", "tie_word_embeddings", "rope_parameters")
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


@pytest.fixture(scope="module")
def there() -> dict[str, Any]:
    return _run({})


@pytest.fixture(scope="module")
def known(there) -> set[str]:
    return set(there["known"])


def _moe_cases(known: set[str]) -> dict[str, Case]:
    """The cases of families that transformers 4 knows."""
    broken = {case for case, version in BROKEN if version == release(transformers.__version__)}
    left_out = {*NOT_THERE, *broken}

    def there(kind: str, config: dict[str, Any]) -> bool:
        return {kind, config.get("text_config", {}).get("model_type", kind)} <= known

    return {case: made for case, made in MOE_CASES.items() if case not in left_out and there(*made)}


def _stated(saved: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """The config of a case, with what makes a config.json of it."""
    stated = {key: saved[key] for key in KEPT if key in saved} | case
    tied = saved.get("tie_word_embeddings", False)
    if "text_config" in case:
        stated["text_config"] = _stated(saved["text_config"] | {"tie_word_embeddings": tied}, case["text_config"])
        stated["vision_config"] = saved["vision_config"]
    return stated


def _worded(folder: Path, cases: dict[str, Case], known: set[str]) -> Iterator[tuple[str, str, Path]]:
    """(case, wording, the source in that wording)."""
    made = {case: (kind, config | SETTINGS.get(case, {})) for case, (kind, config) in cases.items()}
    sources = {case: save_stock(folder / case, *given, dtype=torch.float32) for case, given in made.items()}
    new = {case: json.loads((path / "config.json").read_text()) for case, path in sources.items()}
    old = {case: old_words(_stated(new[case], config)) for case, (_, config) in made.items()}
    old |= _run({"save": {case: config for case, config in old.items() if config["model_type"] in known}})
    for case, path in sources.items():
        yield case, "new", path
        for wording, config in (("old", old[case]), ("both", merged(new[case], old[case]))):
            yield case, wording, reworded(path, path.with_name(f"{path.name}-{wording}"), config)


def _compare(models: dict[str, Path], folder: Path) -> dict[str, str]:
    """{name: what is wrong} of the models, named "case, wording", that transformers 4 reads otherwise.

    The wordings of a case have the same tensors, and the same logits in transformers 5 if it reads the same from them.
    """
    out = folder / "logits.safetensors"
    found = _run({"models": {name: str(path) for name, path in models.items()}, "ids": IDS, "out": str(out)})
    theirs, wrong, ours = load_file(out), {}, {}
    for name, path in models.items():
        if name not in theirs:
            wrong[name] = found[name]
            continue
        with torch.no_grad():
            mine = load(path)(torch.tensor(IDS)).logits.float()
        first = ours.setdefault(name.partition(",")[0], mine)
        limit = LIMITS.get(name.partition(",")[0], LIMIT)
        apart, worded = (float((first - other).abs().max() / first.std()) for other in (theirs[name], mine))
        print(f"{name:40} {apart:.1e} {worded:.1e} {found[name] or ''}")
        if found[name] or not max(apart, worded) < limit:
            wrong[name] = found[name] or f"{apart:.1e} of the spread apart, {worded:.1e} in transformers 5"
    print("wrong:", json.dumps(wrong, indent=1))
    return wrong


def test_pruned_models_of_every_family(tmp_path, known):
    models = {}
    for case, wording, source in _worded(tmp_path, _moe_cases(known), known):
        top_k = row_of(case).experts.routing.top_k
        values = {"keep": 4, "criterion": "random"} | ({} if top_k else {"top_k": 2})
        models[f"{case}, {wording}"] = out = tmp_path / f"{case}-{wording}-out"
        run_step("prune", values, str(source), str(out), meter=SilentMeter())
    assert len(models) > 45
    assert not _compare(models, tmp_path)


def test_upcycled_models_of_every_pair(tmp_path, known):
    """What transformers 4 cannot compute, a warning says; in all else both agree."""
    targets = {
        case: [
            p.target for p in tables().pairs
            if p.source == kind and (not names or p.target in names) and p.target in known
        ]
        for case, (kind, _, names) in CASES.items()
    }  # fmt: skip
    cases = {case: (kind, config) for case, (kind, config, _) in CASES.items() if targets[case]}
    models, warned = {}, set()
    for case, wording, source in _worded(tmp_path, cases, known):
        for target in targets[case]:
            name, out = f"{case} -> {target}, {wording}", tmp_path / f"{case}-{target}-{wording}"
            made = run_step(
                "upcycle", {"to": target, "experts": 4, "no_check": True}, str(source), str(out), meter=SilentMeter()
            )
            models[name] = out
            if any("transformers 5 alone" in warning for warning in made["warnings"]):
                warned.add(name)
    assert len(models) > 120
    wrong = _compare(models, tmp_path)
    refused = {name for name in wrong if name.partition(",")[0] in REFUSED_THERE}
    assert wrong.keys() - refused == warned
    assert all(REFUSED_THERE[name.partition(",")[0]] in wrong[name] for name in refused)


def test_upcycled_language_models_of_multimodal_models(tmp_path, known):
    """Inside their wrapper where that is a family with experts, and alone."""
    cases = {case: (kind, config) for case, (kind, config, _) in WRAPPED_DENSE.items() if kind in known}
    models = {}
    for case, wording, source in _worded(tmp_path, cases, known):
        for alone in (True, False) if WRAPPED_DENSE[case][2] else (True,):
            name = f"{case}{' alone' if alone else ''}, {wording}"
            out = tmp_path / name
            values = {"experts": 4, "no_check": True, "text_only": alone}
            made = run_step("upcycle", values, str(source), str(out), meter=SilentMeter())
            if made["upcycle"]["to"] in known:
                models[name] = out
    assert len(models) > 20
    wrong = _compare(models, tmp_path)
    assert not [name for name, why in wrong.items() if REFUSED_THERE.get(name.partition(",")[0], "-") not in why]


QUANTIZED = {
    "NF4": {"format": "bitsandbytes"}, "INT8 by row": {"format": "bitsandbytes", "bits": 8},
    "INT4": {"bits": 4, "group_size": "32"},
}  # fmt: skip
# bitsandbytes decodes on the CPU as it packs only where its blocks of 64 weights end with a row
WIDTHS = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}


def _widened(config: dict[str, Any]) -> dict[str, Any]:
    if "text_config" in config:
        return config | {"text_config": _widened(config["text_config"])}
    return config | {key: n for key, n in WIDTHS.items() if key in config}


def test_quantized_models_whose_experts_are_modules_there(tmp_path, there):
    """The weights that transformers 4 decodes are those that transformers 5 computes with."""
    if len(there["packages"]) < 2:
        pytest.skip(f"the environment of {VARIABLE} lacks bitsandbytes or compressed-tensors")
    cases, models = _moe_cases(set(there["known"])), {}
    separate = {case: made for case, made in cases.items() if not row_of(case).tensors.packed}
    for case, (kind, config) in separate.items():
        source = save_stock(tmp_path / case, kind, _widened(config | SETTINGS.get(case, {})), dtype=torch.float32)
        for name, values in QUANTIZED.items():
            models[f"{case} as {name}, new"] = out = tmp_path / f"{case}-{name}"
            run_step("quantize", values, str(source), str(out), meter=SilentMeter())
    assert len(models) > 30
    assert not _compare(models, tmp_path)
