"""How long `inspect` and dry runs take on a checkpoint of very many tensors and shards, of holes instead of weights.

    python benchmarks/headers.py [--layers 64] [--experts 208] [--shards 1000]

Prints wall and processor seconds of whole processes and the most memory each held; 64 layers of 208 experts are 40,515
tensors. Processor seconds are what a busy machine does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

from moeconv.checkpoint.header import serialise_header  # noqa: E402
from moeconv.checkpoint.reader import INDEX_NAME  # noqa: E402
from moeconv.families.rows.qwen import QWEN3_MOE  # noqa: E402

STEPS = {
    "inspect": (),
    "prune": ("out", "--ratio", "0.5", "--dry-run"),
    "quantize": ("out", "--group-size", "32", "--dry-run"),
}


def make(out: Path, *, layers: int, experts: int, shards: int) -> int:
    """Write the checkpoint. Returns how many tensors it has."""
    config = tiny.tiny_config(
        QWEN3_MOE, layers=layers, hidden=64, intermediate=64, vocab=64, heads=4, kv_heads=2, dtype="BF16", tied=False
    ) | dict.fromkeys(QWEN3_MOE.experts.count, experts)  # fmt: skip
    config |= dict.fromkeys(QWEN3_MOE.experts.top_k, 8)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    tensors = [
        (name, "BF16", tiny._shape(QWEN3_MOE, config, role, experts))
        for name, role in QWEN3_MOE.expand(layers=layers, experts=experts) if tiny._belongs(QWEN3_MOE, config, role)
    ]  # fmt: skip
    weight_map = {}
    for i in range(shards):
        part = tensors[i * len(tensors) // shards : (i + 1) * len(tensors) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        header, infos = serialise_header(part)
        with open(out / file, "wb") as hole:
            hole.write(header)
            hole.truncate(max(info.end for info in infos.values()))
        weight_map |= {name: file for name, _, _ in part}
    (out / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return len(tensors)


def run(verb: str, source: Path, flags: tuple[str, ...]) -> tuple[float, float, float]:
    """(wall seconds, processor seconds, megabytes) of one process."""
    words = [sys.executable, "-m", "moeconv", verb, str(source), *flags, "--json"]
    quiet = os.open(os.devnull, os.O_WRONLY)
    began = time.monotonic()
    pid = os.posix_spawn(
        sys.executable, words, os.environ | {"PYTHONPATH": str(ROOT)},
        file_actions=[(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)],
    )  # fmt: skip
    _, status, used = os.wait4(pid, 0)
    seconds = time.monotonic() - began
    os.close(quiet)
    if status:
        raise SystemExit(f"{words}: status {status}")
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--experts", type=int, default=208)
    parser.add_argument("--shards", type=int, default=1000)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        tensors = make(source, layers=a.layers, experts=a.experts, shards=a.shards)
        print(f"{tensors:,} tensors in {a.shards:,} shards")
        for verb, flags in STEPS.items():
            wall, cpu, memory = min(run(verb, source, flags) for _ in range(3))
            print(f"{' '.join((verb, *flags[1:])):<40} {wall:6.2f} s wall  {cpu:6.2f} s processor  {memory:6.0f} MB")


if __name__ == "__main__":
    main()
