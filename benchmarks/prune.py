"""Loss increase of every pruning criterion, with and without repair, on held-out text.

    python benchmarks/prune.py MODEL --text DIR --out results.json [--dense] [--seeds 0 1 2] [--distill 40]
    python benchmarks/prune.py MODEL --text DIR --out results.json [--dense] --widths [--heal 100]

MODEL is a Mixture-of-Experts or, with --dense, a dense checkpoint that is first upcycled by `drop` to 8 experts, top-2,
and trained by distillation for a fixed number of steps. DIR holds calibration.*.txt and heldout.*.txt. Every row is
added to the results as it comes; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeconv.calibrate.artifact import load_statistics
from moeconv.calibrate.run import calibrate
from moeconv.calibrate.weights import measure_experts
from moeconv.data.windows import TokenData, load_tokens
from moeconv.evaluate.run import evaluate
from moeconv.evaluate.score import score_window
from moeconv.families.model import Model, open_model
from moeconv.families.rule import rule_of
from moeconv.inspect.run import inspect
from moeconv.plan.meter import SilentMeter
from moeconv.prune.choice import choose
from moeconv.prune.criteria import CRITERIA, Evidence
from moeconv.prune.repair.pruned import pruned_pass
from moeconv.prune.repair.refit import Refit
from moeconv.prune.repair.variant import Variant
from moeconv.prune.scores import score_variants, total
from moeconv.recipe.run import run_step
from moeconv.stream.layers import LayerStream

SEQ_LEN = 256
UPCYCLE = {"experts": 8, "top_k": 2, "method": "drop", "seed": 0}
TRAIN = {"objective": "distill", "train": "router,experts", "steps": 40, "batch_size": 4, "seq_len": 128, "seed": 0}
REFITTED = ("reconstruction", "reap")
NONE: frozenset[int] = frozenset()


@dataclass
class Bench:
    """One model, its text, and the rows so far."""

    path: str
    texts: Path
    out: Path
    tokens: int
    held: TokenData
    rows: list[dict[str, Any]] = field(default_factory=list)

    def has(self, **keys: Any) -> bool:
        return any(all(row.get(k) == v for k, v in keys.items()) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        self.out.write_text(json.dumps(self.rows, indent=1))
        print(json.dumps(row), flush=True)


def calibration(bench: Bench, domain: str) -> list[str]:
    """The calibration texts: all of them, or that of one domain."""
    return [str(f) for f in sorted(bench.texts.glob("calibration.*.txt")) if domain in ("all", f.name.split(".")[1])]


def evidence_of(bench: Bench, model: Model, folder: Path, *, seed: int, domain: str) -> Evidence:
    stats = folder / f"stats-{domain}-{seed}.safetensors"
    if not stats.exists():
        data = calibration(bench, domain)
        calibrate(bench.path, stats, data=data, tokens=bench.tokens, seq_len=SEQ_LEN, seed=seed, save_every=None)
    return Evidence(statistics=load_statistics(stats), rule=rule_of(model), seed=seed, num_experts=model.num_experts)


def keep_sets(model: Model, evidence: Evidence, left: int) -> dict[str, dict[int, list[int]]]:
    """What every criterion keeps."""
    none = dict.fromkeys(model.moe_layers, NONE)
    orders = {}
    for name, c in CRITERIA.items():
        read = None if c.needs.weights is None else measure_experts(model, c.needs.weights)
        orders[name] = {at: c.order(replace(evidence, weights=read), at, NONE) for at in model.moe_layers}
    return {
        name: choose(model, order, left, evidence=evidence, criterion=name, protected=none)
        for name, order in orders.items()
    }


def refitted(_bench: Bench, model: Model, read: TokenData, keep: Mapping[int, Sequence[int]], refit: Refit) -> Any:
    """{layer: (experts, down projections)} on the calibration data."""
    made: dict[int, Any] = {}
    variant = Variant(keep=dict(keep), refit=refit, on_layer=lambda at, *downs: made.update({at: downs}))
    pruned_pass(LayerStream(model, read.windows), [variant])
    return made


def measure(bench: Bench, model: Model, variants: Mapping[str, Variant]) -> dict[str, dict[str, Any]]:
    """Loss increase and KL over all held-out text and by source."""
    read = bench.held
    stream = LayerStream(model, read.windows)
    scores = score_variants(stream, list(variants.values()), source=read.source, num_sources=len(read.sources))
    found = {}
    for name, of_variant in zip(variants, scores):
        whole = total(of_variant)
        found[name] = {
            "increase": whole.mean("loss") - whole.mean("reference_loss"), "kl": whole.mean("kl"),
            "reference": whole.mean("reference_loss"),
            "by_source": {s.name.split(".")[1]: sc.mean("loss") - sc.mean("reference_loss")
                          for s, sc in zip(read.sources, of_variant)},
        }  # fmt: skip
    return found


def run(bench: Bench, *, seed: int, ratio: float, domain: str, folder: Path, refits: Sequence[Refit]) -> None:
    """Every criterion, and the refitted ones, of one seed, ratio and calibration domain."""
    model = open_model(bench.path)
    about = {"seed": seed, "ratio": ratio, "domain": domain}
    if bench.has(**about, method="reconstruction+refit"):
        return
    left = model.num_experts - round(ratio * model.num_experts)
    evidence = evidence_of(bench, model, folder, seed=seed, domain=domain)
    keeps = keep_sets(model, evidence, left)
    if domain != "all":
        keeps = {name: keeps[name] for name in REFITTED}
    variants = {name: Variant(keep=dict(keep)) for name, keep in keeps.items()}
    data = calibration(bench, domain)
    read = load_tokens(data, bench.path, tokens=bench.tokens, seq_len=SEQ_LEN, seed=seed)
    for name in REFITTED if ratio == 0.5 and seed == 0 and domain == "all" else REFITTED[:1]:
        for refit in refits:
            made = refitted(bench, model, read, keeps[name], refit)
            tag = "" if refit == refits[0] else f" {refit.strength}"
            variants[f"{name}+refit{tag}"] = Variant(keep=dict(keeps[name]), replace=made)
    for name, figures in measure(bench, model, variants).items():
        bench.add(about | {"method": name} | figures)


def repairs(bench: Bench, *, seed: int, ratio: float, steps: int, folder: Path, held: Sequence[str]) -> None:
    """The command itself: default criterion with distillation, with refit and distillation, and with merging, evaluated
    on the files."""
    evidence_of(bench, open_model(bench.path), folder, seed=seed, domain="all")
    taught = {"distill": steps}
    for name, flags in {
        "+distill": taught,
        "+refit+distill": taught | {"refit": True},
        "+merge": {"merge": True},
    }.items():
        about = {"seed": seed, "ratio": ratio, "domain": "all", "method": "reconstruction" + name}
        if bench.has(**about):
            continue
        out = folder / f"{name.replace('+', '-')}-{seed}-{ratio}"
        values = {
            "ratio": ratio, "stats": str(folder / f"stats-all-{seed}.safetensors"), "seed": seed,
            "data": tuple(calibration(bench, "all")), "tokens": bench.tokens, "seq_len": SEQ_LEN, "batch_size": 4,
        }  # fmt: skip
        done = run_step("prune", values | flags, bench.path, str(out), meter=SilentMeter())
        score = evaluate(out, data=list(held), reference=bench.path, tokens=bench.held.tokens, seq_len=SEQ_LEN, seed=0)
        bench.add(about | {"increase": score["loss"] - score["reference"]["loss"], "kl": score["kl"],
                           "reference": score["reference"]["loss"], "steps": steps,
                           "distill": done["prune"].get("distill")})  # fmt: skip


def widths(bench: Bench, *, seed: int, ratio: float, folder: Path, heal: int) -> None:
    """The command with the same share of the experts' bytes removed as experts, as neurons, and as a mix of both. The
    interval is 1.96 standard errors over the held-out windows, each against the unpruned model."""
    evidence_of(bench, open_model(bench.path), folder, seed=seed, domain="all")
    whole = window_losses(bench.path, bench.held)
    fit = {"refit": True}
    ways: dict[str, dict[str, Any]] = {
        "experts+refit": fit | {"ratio": ratio},
        "mix+refit": fit | {"ratio": ratio, "mix": "auto"},
        "width+refit": fit | {"width_ratio": ratio},
        "reap": {"ratio": ratio, "criterion": "reap"},
    }
    if heal:
        ways |= {name + "+heal": ways[name] | {"heal": heal} for name in ("experts+refit", "mix+refit")}
    for name, flags in ways.items():
        about = {"seed": seed, "ratio": ratio, "domain": "all", "method": name}
        if bench.has(**about):
            continue
        out = folder / f"{name.replace('+', '-')}-{seed}-{ratio}"
        values = {
            "seed": seed, "data": tuple(calibration(bench, "all")), "tokens": bench.tokens, "seq_len": SEQ_LEN,
            "batch_size": 8, "overwrite": True,
        }  # fmt: skip
        if "ratio" in flags:
            values["stats"] = str(folder / f"stats-all-{seed}.safetensors")
        if "refit" not in flags:
            del values["data"]  # the statistics decide
        done = run_step("prune", values | flags, bench.path, str(out), meter=SilentMeter())
        made, block = open_model(out), done["prune"]
        found = window_losses(str(out), bench.held) - whole
        bench.add(about | {
            "increase": float(found.mean()), "interval": 1.96 * float(found.std(ddof=1)) / len(found) ** 0.5,
            "experts": made.num_experts, "width": made.expert_width, "bytes": done["bytes"],
            "total": done["parameters"]["total"], "active": done["parameters"]["active"],
            "flops_per_token": inspect(str(out))["flops_per_token"],
            "tried": block.get("mix"),
        })  # fmt: skip


def window_losses(path: str, read: TokenData) -> np.ndarray:
    """The mean loss in each window, float64 [n]."""
    stream = LayerStream(open_model(path), read.windows).run()
    found = np.zeros(len(read.windows))
    for rows, logits in stream.tails([stream.hidden]):
        found[rows.start] = score_window(stream.windows[rows.start], logits[0][0]).mean("loss")
    return found


def upcycled(dense: str, texts: Path, folder: Path) -> str:
    """The dense checkpoint as 8 trained experts."""
    raw, trained = folder / "upcycled", folder / "trained"
    if not trained.exists():
        if not raw.exists():
            run_step("upcycle", UPCYCLE, dense, str(raw), meter=SilentMeter())
        data = tuple(str(f) for f in sorted(texts.glob("calibration.*.txt")))
        done = run_step("tune", TRAIN | {"teacher": dense, "data": data}, str(raw), str(trained), meter=SilentMeter())
        print(json.dumps({"trained": {k: done["tune"][k] for k in ("loss_before", "loss_after")}}), flush=True)
    return str(trained)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean loss increase over the seeds, a row a method, and the ratio to reap's."""
    lines = ["| method | " + " | ".join(f"{r:.0%} removed" for r in (0.25, 0.5)) + " | against reap at 50 % |"]
    lines.append("|---|---|---|---|")
    means: dict[tuple[str, float], float] = {}
    for name in dict.fromkeys(row["method"] for row in rows if row["domain"] == "all"):
        for ratio in (0.25, 0.5):
            found = [r["increase"] for r in rows if (r["method"], r["ratio"], r["domain"]) == (name, ratio, "all")]
            if found:
                means[name, ratio] = sum(found) / len(found)
    for name in sorted({n for n, _ in means}, key=lambda n: means.get((n, 0.5), 9e9)):
        cells = [f"{means[name, r]:.4f}" if (name, r) in means else "" for r in (0.25, 0.5)]
        against = f"{means[name, 0.5] / means['reap', 0.5]:.2f}" if {(name, 0.5), ("reap", 0.5)} <= means.keys() else ""
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {against} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="directory for intermediate files (default: a temporary one)")
    parser.add_argument("--dense", action="store_true", help="upcycle and train the model first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--held", type=int, default=None, help="held-out tokens (default: all)")
    parser.add_argument("--domains", nargs="*", default=[], help="calibrate on one domain too, such as c")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3])
    parser.add_argument("--widths", action="store_true", help="experts, neurons, or both, and nothing else")
    parser.add_argument("--heal", type=int, default=0, help="steps of healing on top, with --widths")
    parser.add_argument("--distill", type=int, default=0, help="steps of router distillation")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = upcycled(asked.model, asked.text, folder) if asked.dense else asked.model
        held = [str(f) for f in sorted(asked.text.glob("heldout.*.txt"))]
        read = load_tokens(held, path, tokens=asked.held, seq_len=SEQ_LEN, seed=0)
        rows = json.loads(asked.out.read_text()) if asked.out.exists() else []
        bench = Bench(path, asked.text, asked.out, asked.tokens, read, rows)
        refits = [Refit(strength=s) for s in asked.strengths]
        for seed in asked.seeds:
            for ratio in asked.ratios:
                if asked.widths:
                    widths(bench, seed=seed, ratio=ratio, folder=folder, heal=asked.heal)
                    continue
                run(bench, seed=seed, ratio=ratio, domain="all", folder=folder, refits=refits)
        for domain in asked.domains:
            run(bench, seed=0, ratio=0.5, domain=domain, folder=folder, refits=refits)
        if asked.distill:
            repairs(bench, seed=0, ratio=0.5, steps=asked.distill, folder=folder, held=held)
    print(summary(bench.rows))


if __name__ == "__main__":
    main()
