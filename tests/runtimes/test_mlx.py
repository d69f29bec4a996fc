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
from safetensors.torch import load_file, save_file

from moeconv.families.mlx_lm import switch_form
from moeconv.families.model import open_model
from moeconv.families.packed import weight_of
from moeconv.families.registry import tables
from moeconv.plan.kernels.pack.mlx import pack_mlx, unpack_mlx
from moeconv.plan.meter import SilentMeter
from moeconv.recipe.run import run_step
from moeconv.tensors import decode_weight, read_tensor
from tests.contract.stock import CASES, MOE_CASES, WRAPPED_CASES, WRAPPED_DENSE, load, row_of, save_stock
from tests.unit.test_mlx import KINDS, weights

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
    "bailing_hybrid": "missing 4 required positional arguments",  # the keys of the publisher's own config
    "minimax_m3_vl": "dims must not exceed",  # 64 rotated dimensions, which it assumes, of 16
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


def _run(out: Path, **job: Any) -> tuple[dict[str, str | None], dict[str, torch.Tensor]]:
    """(name -> why mlx-lm does not run a model, what it wrote) of a job of run_mlx.py."""
    done = subprocess.run(
        [os.environ[VARIABLE], str(Path(__file__).parent / "run_mlx.py")],
        input=json.dumps({"models": {}, "ids": IDS, "out": str(out), **job}), text=True, capture_output=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), load_file(out)


def _compare(models: dict[str, Path], folder: Path) -> dict[str, str]:
    """{name: what is wrong} of the models that mlx-lm reads otherwise, or does not know."""
    given = {name: str(path) for name, path in models.items()}
    wrong, theirs = _run(folder / "logits.safetensors", models=given)
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
    surprises = []
    for name, why in wrong.items():
        target = TARGETS_OTHERWISE.get(name.rpartition("-> ")[2], ()) if "->" in name else ()
        said = (UNKNOWN, *target, *([OTHERWISE[name]] if name in OTHERWISE else []))
        if not any(word in why for word in said):
            surprises.append(f"{name}: {why}")
    assert not surprises, "\n".join(surprises)


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


# families whose packed models mlx-lm refuses as it refuses the plain ones, see OTHERWISE
PLAIN_REFUSED = (
    "qwen2_moe", "deepseek_v2", "deepseek_v2-groups", "mimo_v2_flash", "llama4-vision", "gemma4-vision",
    "minimax_m3_vl",
)  # fmt: skip
# and those that it computes otherwise than transformers, packed or not
PLAIN_OTHERWISE = ("glm_moe_dsa", "ernie4_5_moe", "jamba", "minimax_m2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_are_those_of_mx_quantize(tmp_path, dtype):
    weight = weights(dtype)
    save_file({"exact": weight.float().clone(), "as-is": weight}, tmp_path / "weights.safetensors")
    # outside affine, its code for CPUs rounds in the dtype of the weight: see kernels/pack/mlx.py
    asked = {
        f"{mode}-{bits}-{group}": (str(tmp_path / "weights.safetensors"), "as-is" if mode == "affine" else "exact",
                                   mode, bits, group)
        for mode, bits, group in KINDS
    }  # fmt: skip
    _, theirs = _run(tmp_path / "out.safetensors", codes=asked)
    for name, (_, _, mode, bits, group) in asked.items():
        made = pack_mlx(weight, mode=mode, bits=bits, group_size=group)
        for part, mine in made.items():
            found = theirs[f"{name}/{part}"]
            assert torch.equal(mine, found.view(torch.uint8) if part == "weight" else found), f"{name} {part}"
        parts = made | {"weight": made["weight"].view(torch.uint32)}
        decoded = unpack_mlx(parts, mode=mode, bits=bits)
        assert torch.equal(decoded, theirs[f"{name}/decoded"].to(decoded.dtype)), name


def _decoded(packed: Path, out: Path) -> Path:
    """The checkpoint with its codes decoded, under the same names."""
    model, tensors = open_model(packed), {}
    for name, role in model.roles.items():
        plain = weight_of(name) if role.part else name
        if plain not in tensors:
            made = decode_weight(model, plain) if role.part else read_tensor(model.checkpoint, name)
            tensors[plain] = made.contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def _wide(config: dict[str, Any]) -> dict[str, Any]:
    """The config with experts of 32 neurons at least, the smallest group."""
    inside = config.get("text_config", config)
    if inside.get("moe_intermediate_size") == 24:
        inside = inside | {"moe_intermediate_size": 32}
    return config | {"text_config": inside} if "text_config" in config else inside


@pytest.mark.parametrize(
    ("scheme", "scope"),
    [
        ("affine4", "experts"), ("affine8", "experts"), ("affine3", "all-linear"), ("mxfp4", "experts"),
        ("nvfp4", "all-linear"), ("mxfp8", "all-linear"),
    ],
)  # fmt: skip
def test_packed_models_compute_with_the_decoded_weights(tmp_path, scheme, scope):
    """In every family that can be written, or in a few where the scheme is not the first one."""
    every = scheme in ("affine4", "affine8")
    models, given = {}, {}
    for case, (kind, config) in (MOE_CASES | WRAPPED_CASES).items():
        chosen = every or case in ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "lfm2_moe")
        if not chosen or switch_form(row_of(case)) is None:
            continue
        source = save_stock(tmp_path / case, kind, _wide(config), dtype=torch.float32)
        out = tmp_path / f"{case}-{scheme}"
        values = {"format": "mlx", "scheme": scheme, "scope": scope}
        run_step("quantize", values, str(source), str(out), meter=SilentMeter())
        models[case] = source
        given |= {case: str(out), f"{case} decoded": str(_decoded(out, tmp_path / f"{case}-decoded"))}
    wrong, theirs = _run(tmp_path / "logits.safetensors", models=given)
    right = 0
    for case, source in models.items():
        if case in PLAIN_REFUSED:
            assert wrong[case] and wrong[f"{case} decoded"], case
            continue
        assert not wrong[case] and not wrong[f"{case} decoded"], f"{case}: {wrong[case]}"
        apart = (theirs[case] - theirs[f"{case} decoded"]).abs().max() / theirs[case].std()
        assert apart < 1e-5, f"{case}: {apart}"
        if scheme == "affine8" and case not in PLAIN_OTHERWISE:  # the right experts, in the right order
            with torch.no_grad():
                mine = load(source)(torch.tensor(IDS)).logits.float()
            near = float((theirs[case] - mine).norm() / mine.norm())
            print(f"{case:25} {near:.4f}")
            assert near < 0.3, f"{case}: {near}"
        right += 1
    assert right >= (28 if every else 5)
