"""More experts for a Mixture-of-Experts: the loss before and after `upcycle --keep-top-k`, and after the same training.

    python benchmarks/extend.py MODEL CALIBRATION HELDOUT WORK [--steps 60] [--tokens 16384] [--seed 0]

CALIBRATION and HELDOUT are folders of texts. Prints one JSON line per row: the model itself; twice the experts with
equal rows (--copy-scale 1), with the default, and by utility on CALIBRATION; and the model and the last of these after
`tune --objective lm` of all experts and routers on CALIBRATION.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(*words: object) -> dict[str, Any]:
    """The JSON of a command."""
    command = [sys.executable, "-m", "moeconv", *map(str, words), "--json", "-q"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "heldout", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.work.mkdir(parents=True)
    data = [word for file in sorted(given.calibration.glob("*.txt")) for word in ("--data", file)]
    held_out = [word for file in sorted(given.heldout.glob("*.txt")) for word in ("--data", file)]

    def row(name: str, model: Path) -> None:
        found = run("evaluate", model, *held_out, "--tokens", given.tokens, "--seed", given.seed)
        print(json.dumps({"model": name, "loss": round(found["loss"], 4), "tokens": found["tokens"]}), flush=True)

    row("source", given.model)
    for name, words in (("equal", ["--copy-scale", 1]), ("even", []), ("utility", [*data, "--tokens", given.tokens])):
        run("upcycle", given.model, given.work / name, "--keep-top-k", *words, "--seed", given.seed, "--no-check")
        row(name, given.work / name)
    for name in ("source", "utility"):
        source = given.model if name == "source" else given.work / name
        run(
            "tune", source, given.work / f"{name}-tuned", "--objective", "lm", "--train", "router,experts",
            "--steps", given.steps, *data, "--seed", given.seed,
        )  # fmt: skip
        row(f"{name}, tuned", given.work / f"{name}-tuned")


if __name__ == "__main__":
    main()
