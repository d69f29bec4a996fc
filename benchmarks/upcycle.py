"""Upcycling side by side: `cp` of the output, mergekit-moe and moeconv on the same synthetic checkpoints, in one run.

    python benchmarks/upcycle.py WORK [--gigabytes 0.2 2 8] [--mergekit PYTHON] [--repeats 3] [--results FILE.json]

WORK is a folder with room for twice the largest output. Sizes are those of the output: llama to mixtral with 8 experts.
`cp` copies the written output and synchronises it, moeconv runs as a process of its own with --no-check; both are
measured cold (the page cache dropped before; this needs root, else POSIX_FADV_DONTNEED) and warm. PYTHON is the
interpreter of an environment with mergekit, whose mergekit-moe makes the same model from the same source.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from synthetic import dense_size, make
from timing import copy_words, forget, median, timed, warm

from moeconv.recipe.read import DEMO_DATA

EXPERTS = 8
MERGEKIT = "from mergekit.scripts.moe import main; main()"


def moeconv_words(source: Path, out: Path) -> list[Any]:
    return [sys.executable, "-m", "moeconv", "upcycle", source, out, "--experts", EXPERTS, "--no-check", "-q"]


def mergekit_words(python: str, source: Path, out: Path, config: Path) -> list[Any]:
    """The same model: eight times the source's FFN, routers at random."""
    experts = [{"source_model": str(source), "positive_prompts": [str(i)]} for i in range(EXPERTS)]
    wanted = {"base_model": str(source), "architecture": "mixtral", "gate_mode": "random", "dtype": "bfloat16",
              "experts": experts}  # fmt: skip
    config.write_text(yaml.safe_dump(wanted))
    return [python, "-c", MERGEKIT, config, out, "--i-understand-this-is-not-useful-without-training"]


def measure(work: Path, gigabytes: float, *, mergekit: str | None, repeats: int) -> list[dict[str, Any]]:
    """Rows of one size: the tools take turns, so that a machine that is busy by turns is so for all of them."""
    source, out, copied = work / "source", work / "out", work / "copied"
    for folder in (source, out, copied):
        shutil.rmtree(folder, ignore_errors=True)
    hidden = 2048 if gigabytes >= 1 else 512
    make(source, model_type="llama", gigabytes=dense_size(gigabytes, hidden), shards=1, random=False, hidden=hidden)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # mergekit-moe asks for one
        shutil.copy(DEMO_DATA / "model" / name, source)
    timed(moeconv_words(source, out), out)  # the output that cp copies
    size = sum(p.stat().st_size for p in out.iterdir())
    kept = work / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    out.rename(kept)
    rows = []
    for cold in (True, False):
        found: dict[str, list[dict[str, float]]] = {"cp": [], "moeconv": []}
        runs: dict[str, tuple[Path, Path, Callable[[], list[Any]]]] = {
            "cp": (kept, copied, lambda: copy_words(kept, copied)),
            "moeconv": (source, out, lambda: moeconv_words(source, out)),
        }
        if mergekit:
            runs["mergekit-moe"] = (source, out, lambda: mergekit_words(mergekit, source, out, work / "moe.yaml"))
            found["mergekit-moe"] = []
        for turn in range(repeats):
            for name, (reads, writes, words) in runs.items():
                if name == "mergekit-moe" and turn and gigabytes >= 2:
                    continue  # minutes a run, and far from the others
                (forget if cold else warm)(reads)
                found[name].append(timed(words(), writes))
                shutil.rmtree(writes)
        of = {name: median(values) for name, values in found.items()}
        rows.append({"gigabytes": round(size / 1e9, 2), "cache": "cold" if cold else "warm", **of})
        print(line(rows[-1]), flush=True)
    shutil.rmtree(kept)
    return rows


def line(row: dict[str, Any]) -> str:
    cp, ours, theirs = row["cp"]["seconds"], row["moeconv"], row.get("mergekit-moe")
    words = f"{row['gigabytes']:>6.2f} GB {row['cache']}  cp {cp:>6.2f} s   moeconv {ours['seconds']:>6.2f} s "
    words += f"({ours['seconds'] / cp:.2f} x cp, {ours['peak_mb']:.0f} MB)"
    if theirs:
        ratio = theirs["seconds"] / ours["seconds"]
        words += f"   mergekit-moe {theirs['seconds']:>6.2f} s ({ratio:.1f} x moeconv, {theirs['peak_mb']:.0f} MB)"
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.2, 2.0, 8.0])
    parser.add_argument("--mergekit", help="python of an environment that has mergekit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    rows = [row for size in a.gigabytes for row in measure(a.work, size, mergekit=a.mergekit, repeats=a.repeats)]
    if a.results:
        a.results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
