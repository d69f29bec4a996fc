"""Whether repairs and codes that are fitted to little text are ever worse than the plain ones, on other text.

    python benchmarks/little_text.py MODEL --text DIR --out results.json [--tokens 64 128 256 512 2048] [--seeds 0 1 2]

MODEL is a Mixture-of-Experts. DIR holds calibration.*.txt and heldout.*.txt. For each number of tokens and each seed
(a different slice of the calibration text), `prune --refit` is compared with the same prune without a refit, and
`quantize --method gptq` with round-to-nearest, by the loss on the same held-out text. Every row is added to the results
as it comes; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeconv.calibrate.run import calibrate
from moeconv.evaluate.run import evaluate
from moeconv.plan.meter import SilentMeter
from moeconv.recipe.run import run_step

LENGTH = 256  # tokens of a sequence; fewer where there are fewer tokens
STATISTICS = 4096  # tokens that choose which experts go, the same for all rows
# verb, parameters of the plain result, and what fits it to text
COMPARED: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "refit": ("prune", {"ratio": 0.5, "check": False}, {"refit": True}),
    "gptq": ("quantize", {"format": "bitsandbytes", "scheme": "nf4"}, {"method": "gptq"}),
    "gptq int4": ("quantize", {"format": "compressed-tensors", "scheme": "int4"}, {"method": "gptq"}),
}


def loss(model: Path, held: Sequence[str], tokens: int | None) -> float:
    """The mean loss on held-out text."""
    return float(evaluate(model, data=list(held), tokens=tokens, seq_len=LENGTH, seed=0)["loss"])


def layers_kept(done: Mapping[str, Any], verb: str) -> list[int]:
    """The layers that take what was fitted."""
    block = done[verb]
    rows = block["refit"]["layers"] if verb == "prune" else block["error"]["output"]["layers"]
    return [row["layer"] for row in rows if row["kept"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512, 2048])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held", type=int, default=None, help="held-out tokens (default: all)")
    parser.add_argument("--compared", nargs="+", default=["refit", "gptq"], choices=[*COMPARED])
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(given.out.read_text()) if given.out.exists() else []
    data = sorted(str(f) for f in given.text.glob("calibration.*.txt"))
    held = sorted(str(f) for f in given.text.glob("heldout.*.txt"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stats = folder / "stats.safetensors"
        calibrate(given.model, stats, data=data, tokens=STATISTICS, seq_len=LENGTH, seed=0, save_every=None)
        for what in given.compared:
            verb, plain, fits = COMPARED[what]
            values = dict(plain) | ({"stats": str(stats)} if verb == "prune" else {})
            out = folder / what.replace(" ", "-")
            run_step(verb, values, given.model, str(out), meter=SilentMeter())
            without = loss(out, held, given.held)
            for seed in given.seeds:
                for tokens in given.tokens:
                    about = {"what": what, "seed": seed, "tokens": tokens}
                    if any(all(row[k] == v for k, v in about.items()) for row in rows):
                        continue
                    length = min(LENGTH, tokens)
                    text = {"data": tuple(data), "tokens": tokens, "seq_len": length, "seed": seed, "overwrite": True}
                    fitted = folder / "fitted"
                    done = run_step(verb, values | fits | text, given.model, str(fitted), meter=SilentMeter())
                    found = loss(fitted, held, given.held)
                    rows.append(about | {"plain": without, "fitted": found, "gain": without - found,
                                         "kept": layers_kept(done, verb)})  # fmt: skip
                    given.out.write_text(json.dumps(rows, indent=1))
                    print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
