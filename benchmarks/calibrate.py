"""What streaming a layer at a time costs: tokens per second against the model in memory. Memory: benchmarks/memory.py.

    python benchmarks/calibrate.py CHECKPOINTS [--gigabytes 0.65] [--tokens 32768] [--scratch DIR]

Runs on a synthetic Qwen3-MoE (hidden 2048, 32 experts of 768, top-8, random bfloat16; computed in float32),
with the tokenizer of CHECKPOINTS/llama-8m and its calibration texts: the stock class of transformers with all
weights in memory, its loading not counted, against the stream, whose reading and decoding counts; per CPU second of all
threads, so that others on the machine do not matter, and per second.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from synthetic import make

from moeconv.families.model import open_model
from moeconv.plan.kernels.arrays import from_float


def checkpoint(a: argparse.Namespace, scratch: Path) -> Path:
    """The synthetic model with a tokenizer."""
    path = scratch / "model"
    if not path.exists():
        make(path, model_type="qwen3_moe", gigabytes=a.gigabytes, shards=4, random=False)
        tell_apart(path)
        for file in (a.checkpoints / "llama-8m").glob("tokenizer*"):
            shutil.copy(file, path)
    return path


def tell_apart(path: Path) -> None:
    """Give every expert's gate a first row of its own: the block of random weights repeats, and copies do not train."""
    model = open_model(path)
    draw = np.random.default_rng(0)
    for layer in model.moe_layers:
        for expert in range(model.num_experts):
            ref = model.checkpoint.tensors[model.expert_name("gate", layer=layer, expert=expert)]
            row = from_float(draw.standard_normal(ref.shape[1], np.float32) * np.float32(0.02), ref.dtype)
            with open(path / ref.shard, "r+b") as file:
                file.seek(ref.start)
                file.write(bytes(row))


def texts(checkpoints: Path) -> list[str]:
    return [str(f) for f in sorted((checkpoints / "text").glob("calibration.*.txt"))]


def speed(a: argparse.Namespace, scratch: Path) -> None:
    """Tokens per second of the same windows in the same batches, float32, interleaved rounds."""
    import torch
    from transformers import AutoModelForCausalLM

    from moeconv.calibrate.run import calibrate
    from moeconv.data.windows import load_tokens
    from moeconv.stream.layers import LayerStream

    torch.set_num_threads(a.threads)
    path = checkpoint(a, scratch)
    windows = load_tokens(texts(a.checkpoints), path, tokens=a.tokens, seq_len=a.seq_len, seed=0).windows
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation=a.experts).eval()

    @torch.no_grad()
    def in_memory() -> None:
        for first in range(0, len(windows), a.batch_size):
            stock.model(torch.from_numpy(windows[first : first + a.batch_size]), use_cache=False)

    def measure(sample: int) -> None:
        calibrate(
            path, scratch / "stats", data=texts(a.checkpoints), overwrite=True, save_every=None, tokens=a.tokens,
            seq_len=a.seq_len, batch_size=a.batch_size, sample_tokens=sample,
        )  # fmt: skip

    share = a.tokens // 32  # the default: 2048 of 65,536
    ways: dict[str, Callable[[], object]] = {
        f"in memory, {a.experts}": in_memory,
        "streamed": lambda: LayerStream(open_model(path), windows, batch_size=a.batch_size).run(),
        "calibrate, sample of 1 token": lambda: measure(1),
        f"calibrate, sample of {share}": lambda: measure(share),
    }
    best: dict[str, tuple[float, float]] = {}
    for _ in range(a.rounds):
        for name, way in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            way()
            took = time.process_time() - cpu, time.perf_counter() - began
            rates = tuple(a.tokens / seconds for seconds in took)
            best[name] = tuple(map(max, rates, best.get(name, (0.0, 0.0))))  # type: ignore[assignment]
    print(f"{a.tokens} tokens in batches of {a.batch_size} x {a.seq_len}, {a.threads} thread(s), best of {a.rounds}")
    base = next(iter(best.values()))
    for name, (by_cpu, by_clock) in best.items():
        print(
            f"{name:30s} {by_cpu:8.1f} tokens per CPU second ({by_cpu / base[0]:.2f}), {by_clock:8.1f} per second "
            f"({by_clock / base[1]:.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--gigabytes", type=float, default=0.65)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", default="eager", help="transformers' experts implementation in memory")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="directory for the model (default: a temporary one)")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moeconv-bench-") as temporary:
        scratch = a.scratch or Path(temporary)
        scratch.mkdir(exist_ok=True)
        speed(a, scratch)


if __name__ == "__main__":
    main()
