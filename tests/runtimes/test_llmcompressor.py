"""What llm-compressor writes for the same weights: equal tensors, byte for byte, and an equal quantization_config.

Runs where MOECONV_LLMCOMPRESSOR_PYTHON names an interpreter that has llm-compressor (environments.sh).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_moe
from words import add_tokenizer, text

from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.quantize.planner import plan_quantize

PYTHON = os.environ.get("MOECONV_LLMCOMPRESSOR_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="MOECONV_LLMCOMPRESSOR_PYTHON is not set")
# scheme -> the name that llm-compressor has for it. It rounds the quotients of integers to the dtype of the weights
# before it rounds them to levels, which pack_int of `int4` and `int8` does not: those are compared in float32.
SCHEMES = {
    "fp8": ("FP8_DYNAMIC", "BF16"), "fp8-block": ("FP8_BLOCK", "BF16"), "w8a8": ("W8A8", "BF16"),
    "nvfp4": ("NVFP4A16", "BF16"), "mxfp4": ("MXFP4A16", "BF16"), "mxfp8": ("MXFP8", "BF16"),
    "int4-asym": ("W4A16_ASYM", "BF16"), "int4": ("W4A16", "F32"), "int8": ("W8A16", "F32"),
}  # fmt: skip
IGNORE = ("lm_head", "re:.*self_attn.*", "re:.*gate$", "re:.*embed_tokens.*")
SCRIPT = """
import sys
from llmcompressor import model_free_ptq
source, out, scheme, *ignore = sys.argv[1:]
model_free_ptq(model_stub=source, save_directory=out, scheme=scheme, ignore=ignore, device="cpu")
"""
# with inputs whose scales it measures: each expert sees its own tokens alone, and the model runs as a whole, since the
# pipeline that runs layer by layer gives the layers other inputs
CALIBRATED = """
import sys
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
source, out, scheme, text, *ignore = sys.argv[1:]
ids = Tokenizer.from_file(source + "/tokenizer.json").encode(open(text).read()).ids
rows = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
oneshot(
    model=AutoModelForCausalLM.from_pretrained(source, dtype="auto"),
    dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 32] * len(rows)}),
    recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=ignore),
    max_seq_length=32, num_calibration_samples=len(rows), output_dir=out, moe_calibrate_all_experts=False,
    pipeline="basic",
)
"""
# keys that name a version, the observer of the scales, or what is null in both
UNLIKE = {"version", "transform_config", "sparsity_config", "ignore", "observer", "observer_kwargs"}


def plain(value: object) -> object:
    """A quantization_config without the keys of UNLIKE, without nulls, and with config groups by their order."""
    if not isinstance(value, dict):
        return value
    kept = {key: plain(v) for key, v in value.items() if key not in UNLIKE and v is not None}
    groups = kept.get("config_groups")
    return kept | ({"config_groups": list(groups.values())} if isinstance(groups, dict) else {})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_and_config_are_those_of_llm_compressor(tmp_path, scheme):
    name, dtype = SCHEMES[scheme]
    # Mixtral's names: llm-compressor lets w1 and w3 share a scale, but not gate_proj and up_proj of an expert
    source = make_moe(tmp_path / "moe", hidden=256, intermediate=128, layers=1, dtype=dtype)
    run(SCRIPT, source, tmp_path / "theirs", name, *IGNORE)
    model = open_model(source)
    group = "128" if scheme.startswith("int") else "auto"
    execute(plan_quantize(model, scheme=scheme, group_size=group), source=model.checkpoint, out=tmp_path / "ours")
    same(tmp_path)


def run(script: str, *arguments: object) -> None:
    environment = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def same(tmp_path: Path, *, measured: str | None = None) -> None:
    """The tensors of `ours` and `theirs` are equal, as are the configs. Those that end with `measured`, which depend on
    the sums of two implementations in bfloat16, may differ by a few roundings."""
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        if measured and name.endswith(measured):
            assert torch.allclose(tensor, other, rtol=2**-6), name
            continue
        raw = [t.reshape(-1).view(torch.uint8) for t in (tensor, other)]
        assert torch.equal(*raw), name
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("ours", "theirs")]
    one, other = (plain(config["quantization_config"]) for config in configs)
    assert one == other


def test_scales_of_inputs_are_those_of_llm_compressor(tmp_path, cli):
    source = add_tokenizer(
        make_moe(tmp_path / "moe", "qwen3_moe", hidden=256, intermediate=128, layers=2, dtype="BF16")
    )
    words = tmp_path / "text.txt"
    words.write_text(text(256, seed=1))
    run(CALIBRATED, source, tmp_path / "theirs", "NVFP4", words, *IGNORE)
    flags = ("--scheme", "nvfp4-a4", "--data", words, "--seq-len", 32)
    assert cli("quantize", source, tmp_path / "ours", *flags).code == 0
    same(tmp_path, measured=".input_global_scale")
