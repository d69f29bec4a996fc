"""What healing gives back of the loss that half of the experts cost, beside a refit alone and whole-model distillation.

    python benchmarks/heal.py MODEL --text DIR --out RESULTS.json --work WORK [--dense] [--steps 100] [--seeds 0 1 2]

MODEL and DIR are as in benchmarks/prune.py. The methods of a seed keep the same experts and read the same text:
`prune --refit`; `prune --refit --heal STEPS`; and `tune --objective distill --train router,experts` of the refitted
model, with as many tokens per step. Every row is added to the results as it comes; rows that are there already are not
measured again, and a prune that was interrupted resumes.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prune import SEQ_LEN, Bench, calibration, evidence_of, upcycled, window_losses

from moeconv.data.windows import load_tokens
from moeconv.families.model import open_model
from moeconv.plan.meter import SilentMeter
from moeconv.recipe.run import run_step


def losses(bench: Bench, path: str, folder: Path) -> np.ndarray:
    """The loss of a checkpoint in each held-out window; that of the unpruned model is kept in a file."""
    kept = folder / "whole.npy"
    if path != bench.path:
        return window_losses(path, bench.held)
    if not kept.exists():
        np.save(kept, window_losses(path, bench.held))
    return np.asarray(np.load(kept))


def ways(
    bench: Bench, folder: Path, *, seed: int, steps: int, batch: int
) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """{method: (verb, source, parameters)}."""
    text = {"data": tuple(calibration(bench, "all")), "seq_len": SEQ_LEN, "seed": seed, "batch_size": batch}
    prune = text | {
        "ratio": 0.5, "tokens": bench.tokens, "refit": True, "stats": str(folder / f"stats-all-{seed}.safetensors"),
    }  # fmt: skip
    tune = {"objective": "distill", "train": "router,experts", "steps": steps, "teacher": bench.path, "balance": 0.0}
    return {
        "refit": ("prune", bench.path, prune),
        f"refit + heal {steps}": ("prune", bench.path, prune | {"heal": steps}),
        f"refit + distill {steps}": ("tune", str(folder / f"refit-{seed}"), text | tune),
    }


def run(bench: Bench, folder: Path, *, seed: int, steps: int, batch: int, methods: list[str]) -> None:
    evidence_of(bench, open_model(bench.path), folder, seed=seed, domain="all")
    whole = losses(bench, bench.path, folder)
    for name, (verb, source, values) in ways(bench, folder, seed=seed, steps=steps, batch=batch).items():
        about = {"seed": seed, "method": name, "tokens": bench.tokens, "batch": batch}
        if bench.has(**about) or name.split()[-2 if " " in name else -1] not in methods:
            continue
        out = folder / ("refit" if name == "refit" else name.replace(" + ", "-").replace(" ", "-"))
        out = out.with_name(f"{out.name}-{seed}")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        done = run_step(verb, values | {"overwrite": True}, source, str(out), meter=SilentMeter())
        took = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
        found = losses(bench, str(out), folder) - whole
        bench.add(about | {
            "increase": float(found.mean()), "interval": 1.96 * float(found.std(ddof=1)) / len(found) ** 0.5,
            "cpu_seconds": took, "layers": done["prune"].get("heal", {}).get("layers") if verb == "prune" else None,
        })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory for intermediate files")
    parser.add_argument("--dense", action="store_true", help="upcycle and train the model first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--held", type=int, default=16384, help="held-out tokens")
    parser.add_argument("--methods", nargs="+", default=["refit", "heal", "distill"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    path = upcycled(asked.model, asked.text, asked.work) if asked.dense else asked.model
    held = [str(f) for f in sorted(asked.text.glob("heldout.*.txt"))]
    read = load_tokens(held, path, tokens=asked.held, seq_len=SEQ_LEN, seed=0)
    rows = json.loads(asked.out.read_text()) if asked.out.exists() else []
    bench = Bench(path, asked.text, asked.out, asked.tokens, read, rows)
    for seed in asked.seeds:
        run(bench, asked.work, seed=seed, steps=asked.steps, batch=asked.batch, methods=asked.methods)


if __name__ == "__main__":
    main()
