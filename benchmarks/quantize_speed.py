"""Speed and memory of quantize as a whole process, against llm-compressor and bitsandbytes on the same synthetic MoE.

    python benchmarks/quantize_speed.py WORK [--gigabytes 1.7] [--peer PYTHON] [--only NAME ...]

PYTHON is an interpreter that has llm-compressor. CPU seconds are the figure to read on a machine that others use too.
The bitsandbytes rows read the same experts and call `quantize_4bit` or `int8_vectorwise_quant` (LLM.int8) on each, in
one thread; they write nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent

LLM_COMPRESSOR = """
import sys
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import model_free_ptq
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
ignore = ["lm_head", "re:.*self_attn.*", "re:.*gate$", "re:.*embed_tokens.*"]
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme=scheme, ignore=ignore, device="cpu")
"""
BITSANDBYTES = """
import sys
from pathlib import Path
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors import safe_open
torch.set_num_threads(1)
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            if ".experts." in name:
                quantize_4bit(file.get_tensor(name), blocksize=64, quant_type="nf4")
"""
BITSANDBYTES_INT8 = """
import sys
from pathlib import Path
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from safetensors import safe_open
torch.set_num_threads(1)
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            if ".experts." in name:
                int8_vectorwise_quant(file.get_tensor(name).half())
"""
ROWS = {
    "int4 rtn": [],
    "int4 mse": ["--method", "mse"],
    "int8 rtn": ["--bits", "8"],
    **{scheme: ["--scheme", scheme] for scheme in ("int4-asym", "fp8", "fp8-block", "w8a8", "nvfp4", "mxfp4", "mxfp8")},
    "fp8 of DeepSeek": ["--format", "fp8"],
    "nf4": ["--format", "bitsandbytes", "--scheme", "nf4"],
    "int8 (bitsandbytes)": ["--format", "bitsandbytes", "--scheme", "int8"],
    **{
        scheme: ["--format", "gguf", "--scheme", scheme]
        for scheme in (
            "q8_0",
            "q6_k",
            "q5_k",
            "q4_k",
            "q3_k",
            "q2_k",
            "iq4_xs",
            "iq4_nl",
            "q5_1",
            "q5_0",
            "q4_1",
            "q4_0",
            "mxfp4",
        )
    },
}


def add_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 256 letters, by which any text is its bytes: a GGUF file holds its tokenizer."""
    alone = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    others = (byte for byte in range(256) if byte not in alone)
    letters = {chr(byte): byte for byte in alone} | {chr(256 + i): byte for i, byte in enumerate(others)}
    value = {
        "version": "1.0", "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "byte_fallback": False, "vocab": letters, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(value))


def run(command: list[str], **environment: str) -> dict[str, float]:
    """Wall and CPU seconds, and the peak memory in MB, of a whole process."""
    began = time.monotonic()
    child = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{command[:3]} failed with {status}")
    wall = time.monotonic() - began
    return {"wall": round(wall, 1), "cpu": round(usage.ru_utime + usage.ru_stime, 2), "mb": usage.ru_maxrss // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--gigabytes", default="1.7")
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    source, out = given.work / f"moe-{given.gigabytes}", given.work / "out"
    if not source.exists():
        make = [sys.executable, str(HERE / "synthetic.py"), str(source), "--family", "qwen3_moe"]
        subprocess.run([*make, "--gigabytes", given.gigabytes], check=True)
        add_tokenizer(source)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9
    found: dict[str, dict[str, float]] = {}

    def row(name: str, command: list[str], **environment: str) -> None:
        if given.only and name not in given.only:
            return
        shutil.rmtree(out, ignore_errors=True)
        found[name] = run(command, **environment)
        per_gb = round(found[name]["cpu"] / size, 1)
        print(json.dumps({"gigabytes": round(size, 2), "row": name, **found[name], "cpu_per_gb": per_gb}), flush=True)
        shutil.rmtree(out, ignore_errors=True)

    for name, flags in ROWS.items():
        row(name, [sys.executable, "-m", "moeconv", "quantize", str(source), str(out), *flags, "-q"])
    if given.peer:
        row("llm-compressor model_free_ptq", [given.peer, "-c", LLM_COMPRESSOR, str(source), str(out)], PYTHONPATH="")
    row("bitsandbytes quantize_4bit", [sys.executable, "-c", BITSANDBYTES, str(source)])
    row("bitsandbytes int8_vectorwise_quant", [sys.executable, "-c", BITSANDBYTES_INT8, str(source)])
    if found:
        print(f"\n{'':36}{'CPU s per GB':>12}{'CPU s':>8}{'wall s':>8}{'MB':>7}   of {size:.2f} GB")
    for name, took in found.items():
        print(f"{name:36}{took['cpu'] / size:>12.1f}{took['cpu']:>8.1f}{took['wall']:>8.1f}{took['mb']:>7}")
    pairs = (
        ("int4 rtn", "llm-compressor model_free_ptq"),
        ("nf4", "bitsandbytes quantize_4bit"),
        ("int8 (bitsandbytes)", "bitsandbytes int8_vectorwise_quant"),
    )
    for ours, theirs in pairs:
        if ours in found and theirs in found:
            print(f"{ours}: {theirs} takes {found[theirs]['cpu'] / found[ours]['cpu']:.1f} times the CPU seconds")


if __name__ == "__main__":
    main()
