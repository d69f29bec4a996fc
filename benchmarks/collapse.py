"""The loss of a Mixture-of-Experts that is collapsed to a dense model, beside two baselines, before and after tuning.

    python benchmarks/collapse.py MODEL --text DIR --out results.json [--widths 1 2 4] [--tokens 8192] [--steps 40]

DIR holds calibration.*.txt and heldout.*.txt. The widths are multiples of the width of one expert. Every dense model is
made twice: of the neurons that `collapse` chooses, and of random ones, both with the same fit. The second baseline is
the model pruned to one expert per layer, refitted. All get the same brief distillation from the source. Every row is
added to the results as it comes; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moeconv import requests as r
from moeconv.families.model import open_model
from moeconv.plan.meter import SilentMeter
from moeconv.steps import run_request

TUNE = {"objective": "distill", "batch_size": 8, "seq_len": 128, "balance": 0.0}


def run(kind: type, **values: Any) -> dict[str, Any]:
    """The JSON of a command."""
    return run_request(r.request(kind, values), SilentMeter())


def loss_of(model: Path | str, held: tuple[str, ...], tokens: int) -> float:
    """Nats per token on held-out text."""
    made = run(r.EvaluateRequest, model=str(model), data=held, tokens=tokens, seq_len=256)
    return float(made["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held", type=int, default=16384)
    asked = parser.parse_args()
    data, held = (tuple(map(str, sorted(asked.text.glob(f"{name}.*.txt")))) for name in ("calibration", "heldout"))
    rows = json.loads(asked.out.read_text()) if asked.out.exists() else []
    source = open_model(asked.model)
    cases: list[tuple[str, int]] = [("source", 0)]
    for times in asked.widths:
        cases += [("surgeon", times), ("random", times)]
        cases += [("one expert", times)] if times == 1 else []
    measure = {"data": data, "tokens": asked.tokens, "seq_len": 256}
    for how, times in cases:
        if any((row["how"], row["times"]) == (how, times) for row in rows):
            continue
        row: dict[str, Any] = {"how": how, "times": times}
        with tempfile.TemporaryDirectory() as folder:
            out, tuned = Path(folder) / "out", Path(folder) / "tuned"
            if how == "source":
                row["loss"] = loss_of(asked.model, held, asked.held)
            else:
                if how == "one expert":
                    made = run(r.PruneRequest, model=asked.model, out=str(out), keep=1, top_k=1, refit=True, **measure)
                else:
                    width = times * source.expert_width
                    made = run(r.CollapseRequest, model=asked.model, out=str(out), width=width, neurons=how, **measure)
                row |= {"parameters": made["parameters"]["total"], "loss": loss_of(out, held, asked.held)}
                train = "experts" if how == "one expert" else "ffn"
                run(
                    r.TuneRequest, model=str(out), out=str(tuned), teacher=asked.model, train=train, data=data,
                    steps=asked.steps, **TUNE,
                )  # fmt: skip
                row["tuned"] = loss_of(tuned, held, asked.held)
                shutil.rmtree(tuned)
        rows.append(row)
        asked.out.write_text(json.dumps(rows, indent=1))
        print(row, flush=True)


if __name__ == "__main__":
    main()
