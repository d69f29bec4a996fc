"""Size: a large synthetic model through upcycle, prune and INT4 quantize, in seconds, memory and times `cp`.

    python benchmarks/size.py WORK [--gigabytes 20] [--hidden 2048] [--repeats 1]

The source is a llama of holes, whose mixtral of eight experts takes that many gigabytes; half of its experts are
removed (`--criterion random`: nothing is measured), and the whole of it is packed. WORK needs room for twice the
largest output. `cp` copies each step's own output and synchronises it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from synthetic import dense_size, make
from timing import copy_words, median, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    dense, moe, out, copied = (given.work / name for name in ("dense", "moe", "out", "copied"))
    for folder in (dense, moe, out, copied):
        shutil.rmtree(folder, ignore_errors=True)
    given.work.mkdir(parents=True, exist_ok=True)
    source_size = dense_size(given.gigabytes, given.hidden)
    make(dense, model_type="llama", gigabytes=source_size, shards=1, random=False, hidden=given.hidden, sparse=True)

    def step(name: str, source: Path, to: Path, *flags: Any) -> None:
        words = [sys.executable, "-m", "moeconv", name, source, to, *flags, "-q"]
        ours, theirs = [], []
        for _ in range(given.repeats):  # in turn, so that a machine that is busy by turns is so for both
            ours.append(timed(words, to))
            theirs.append(timed(copy_words(to, copied), copied))
            shutil.rmtree(copied)
        mine, cp = median(ours), median(theirs)["seconds"]
        size = sum(p.stat().st_size for p in to.iterdir()) / 1e9
        ratio = f"{mine['seconds'] / cp:.2f} x cp"
        print(f"{name:<9}{size:>7.2f} GB {mine['seconds']:>8.2f} s  cp {cp:>7.2f} s  {ratio:>10}  "
              f"{mine['peak_mb']:.0f} MB", flush=True)  # fmt: skip

    step("upcycle", dense, moe, "--experts", 8, "--no-check")
    step("prune", moe, out, "--ratio", 0.5, "--criterion", "random")
    step("quantize", moe, out)
    for folder in (dense, moe, out):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
