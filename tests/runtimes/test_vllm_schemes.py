"""What vLLM makes of the quantization_config of every scheme of compressed-tensors: its own classes, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from moeconv.families.model import open_model
from moeconv.plan.meter import SilentMeter
from moeconv.quantize.compressed_tensors import COMPRESSED_TENSORS
from moeconv.recipe.read import DEMO_DATA
from moeconv.recipe.run import run_step

torch.set_num_threads(1)
PYTHON = os.environ.get("MOECONV_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="MOECONV_VLLM_PYTHON is not set")
_W8A8 = "CompressedTensorsW8A8Fp8"
_FP4 = "CompressedTensorsW4A4Nvfp4MoEMethod"
# scheme -> the classes of vLLM 0.32 that compute the experts and the attention
CLASSES = {
    **dict.fromkeys(("int4", "int4-asym", "int8", "int2", "int3"), ("CompressedTensorsWNA16MoEMethod", "unquantized")),
    **dict.fromkeys(("fp8", "fp8-block"), (f"{_W8A8}MoEMethod", "unquantized")),
    "w8a8": ("CompressedTensorsW8A8Int8MoEMethod", "unquantized"),
    **dict.fromkeys(("nvfp4", "nvfp4-a4"), (_FP4, "unquantized")),
    "mxfp4": ("CompressedTensorsW4A4Mxfp4MoEMethod", "unquantized"),
    "mxfp8": ("CompressedTensorsW8A8Mxfp8MoEMethod", "unquantized"),
    "nvfp4 rest fp8": (_FP4, _W8A8),
    "int4 rest fp8": ("CompressedTensorsWNA16MoEMethod", _W8A8),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    source = folder / "moe"
    upcycle = {"experts": 4, "top_k": 2, "no_check": True}
    run_step("upcycle", upcycle, str(DEMO_DATA / "model"), str(source), meter=SilentMeter())
    configs = {}
    for name in CLASSES:
        scheme, _, rest = name.partition(" rest ")
        asked = {"format": "compressed-tensors", "scheme": scheme, "rest": rest or None, "no_check": True}
        if scheme == "nvfp4-a4":
            asked |= {"data": (str(DEMO_DATA / "calibration.txt"),), "tokens": 256, "seq_len": 64}
        run_step("quantize", asked, str(source), str(folder / name), meter=SilentMeter())
        configs[name] = open_model(folder / name).config["quantization_config"]
    script = Path(__file__).parent / "run_vllm_schemes.py"
    done = subprocess.run([PYTHON, script], input=json.dumps(configs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_vllm_chooses_the_kernels_of_the_scheme(verdicts):
    assert {name: (found["experts"], found["attention"]) for name, found in verdicts.items()} == CLASSES


def test_every_scheme_is_asked_about():
    assert {info.name for info in COMPRESSED_TENSORS.schemes} <= set(CLASSES)
