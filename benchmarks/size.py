"""Size: a large synthetic model through upcycle, prune and INT4 quantize, in seconds, memory and times `cp`.

    python benchmarks/size.py WORK [--gigabytes 20] [--hidden 2048] [--repeats 1]

The source is a llama of holes, whose mixtral of eight experts takes that many gigabytes; half of its experts are
removed (`--criterion random`: nothing is measured), and the whole of it is packed. The prune runs again, in turn, on
models of holes, of one dtype and with a float32 router in every layer, whose rates it compares. WORK needs room for
twice the largest output. `cp` copies each step's own output and synchronises it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import struct
import sys
from pathlib import Path
from typing import Any

from synthetic import dense_size, make
from timing import copy_words, median, timed

_SIZES = {"F32": 4, "BF16": 2}


def holes_of(source: Path, out: Path, *, wide: str = "") -> None:
    """The checkpoint with holes in the place of its weights; those whose names hold `wide` are float32."""
    out.mkdir()
    shutil.copy(source / "config.json", out)
    if (index := source / "model.safetensors.index.json").exists():
        shutil.copy(index, out)
    for shard in source.glob("*.safetensors"):
        with open(shard, "rb") as file:
            entries = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            entry["dtype"] = "F32" if wide and wide in name else entry["dtype"]
        position, header = 0, {}
        for name, entry in sorted(entries.items(), key=lambda e: (-_SIZES[e[1]["dtype"]], e[1]["data_offsets"])):
            end = position + math.prod(entry["shape"]) * _SIZES[entry["dtype"]]
            header[name], position = entry | {"data_offsets": [position, end]}, end
        data = json.dumps(header).encode()
        data += b" " * (-len(data) % 8)
        with open(out / shard.name, "wb") as file:
            file.write(struct.pack("<Q", len(data)) + data)
            file.truncate(8 + len(data) + position)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    names = ("dense", "moe", "out", "copied", "uniform", "mixed")
    dense, moe, out, copied, uniform, mixed = folders = [given.work / name for name in names]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    given.work.mkdir(parents=True, exist_ok=True)
    source_size = dense_size(given.gigabytes, given.hidden)
    make(dense, model_type="llama", gigabytes=source_size, shards=1, random=False, hidden=given.hidden, sparse=True)

    def step(name: str, source: Path, to: Path, *flags: Any, label: str = "") -> None:
        words = [sys.executable, "-m", "moeconv", name, source, to, *flags, "-q"]
        ours, theirs = [], []
        for _ in range(given.repeats):  # in turn, so that a machine that is busy by turns is so for both
            ours.append(timed(words, to))
            theirs.append(timed(copy_words(to, copied), copied))
            shutil.rmtree(copied)
        mine, cp = median(ours), median(theirs)["seconds"]
        size = sum(p.stat().st_size for p in to.iterdir()) / 1e9
        ratio = f"{mine['seconds'] / cp:.2f} x cp"
        print(f"{label or name:<15}{size:>7.2f} GB {mine['seconds']:>8.2f} s  cp {cp:>7.2f} s  {ratio:>10}  "
              f"{mine['peak_mb']:.0f} MB", flush=True)  # fmt: skip

    step("upcycle", dense, moe, "--experts", 8, "--no-check")
    step("prune", moe, out, "--ratio", 0.5, "--criterion", "random")
    step("quantize", moe, out)
    holes_of(moe, uniform)
    holes_of(moe, mixed, wide=".gate.weight")
    rounds: dict[Path, list[dict[str, float]]] = {uniform: [], mixed: []}
    for _ in range(given.repeats):  # in turn
        for folder, found in rounds.items():
            words = [
                sys.executable,
                "-m",
                "moeconv",
                "prune",
                folder,
                out,
                "--ratio",
                0.5,
                "--criterion",
                "random",
                "-q",
            ]
            took = timed(words, out)
            size = sum(p.stat().st_size for p in out.iterdir()) / 1e6
            found.append({key: size / took[key] for key in ("seconds", "cpu")})
    rates = {folder: [statistics.median(r[key] for r in found) for key in ("seconds", "cpu")]
             for folder, found in rounds.items()}  # fmt: skip
    for folder, (wall, cpu) in rates.items():
        print(f"prune, {folder.name:<8} {wall:>6.0f} MB per second, {cpu:>6.0f} MB per processor second", flush=True)
    ratios = {
        key: sorted(ours[key] / theirs[key] for ours, theirs in zip(rounds[mixed], rounds[uniform]))
        for key in ("seconds", "cpu")
    }
    said = [
        f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f}) by {what}"
        for what, found in zip(("wall time", "CPU time"), ratios.values())
    ]
    print(f"mixed over uniform, {given.repeats} pairs in turn, median and range: {', '.join(said)}")
    for folder in (dense, moe, out, uniform, mixed):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
