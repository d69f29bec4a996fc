"""What tune wins, on small models that were really trained: objectives, recovery after a prune, a collapsed router.

    python benchmarks/tune.py CHECKPOINTS objectives|recovery|balance [--steps 100] [--train router]

CHECKPOINTS holds llama-8m, qwen3moe-12m and text/{calibration,heldout}.*.txt. Losses are nats per token of the held-out
texts in windows of 256 tokens, of the models as written (bfloat16), by `moeconv evaluate`; CPU seconds are those of the
command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

SEQ_LEN = 256
_MARGIN = 3.0  # nats by which a collapsed router prefers its two experts, at the mean of its inputs


def moeconv(*arguments: object) -> tuple[dict[str, Any], float]:
    """A command's JSON and the CPU seconds that it took."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "moeconv", *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return json.loads(done.stdout), used


class Bench:
    """The directory of checkpoints, and one to work in."""

    def __init__(self, checkpoints: Path, scratch: Path, *, steps: int, batch: int, tokens: int) -> None:
        self.checkpoints, self.scratch, self.steps, self.batch, self.tokens = checkpoints, scratch, steps, batch, tokens
        self.amount = f"{steps} steps of {batch} windows"
        self.calibration = self._data("calibration")
        self.heldout = self._data("heldout")

    def _data(self, which: str) -> list[str]:
        files = sorted((self.checkpoints / "text").glob(f"{which}.*.txt"))
        return [word for file in files for word in ("--data", str(file))]

    def loss(self, model: Path) -> float:
        asked = (*self.heldout, "--seq-len", SEQ_LEN, "--tokens", self.tokens)
        return float(moeconv("evaluate", model, *asked)[0]["loss"])

    def tune(self, model: Path, out: str, *more: object) -> tuple[Path, dict[str, Any], float]:
        target = self.scratch / out
        amount = ("--steps", self.steps, "--batch-size", self.batch, "--tokens", 2 * self.tokens)
        result, cpu = moeconv("tune", model, target, *self.calibration, "--seq-len", SEQ_LEN, *amount, *more)
        return target, result, cpu


def row(*cells: object) -> None:
    """A line of a table, at once: runs are long."""
    print("  ".join(f"{c:>12.4f}" if isinstance(c, float) else f"{c!s:>12}" for c in cells), flush=True)


def objectives(b: Bench, words: Sequence[str]) -> None:
    """llama-8m upcycled by drop: the loss that each objective wins back, and what it costs."""
    dense, moe = b.checkpoints / "llama-8m", b.scratch / "drop"
    moeconv("upcycle", dense, moe, "--method", "drop")
    start = b.loss(moe)
    print(f"llama-8m {b.loss(dense):.4f}; upcycled by drop, 8 experts, top-2: {start:.4f}; {b.amount}", flush=True)
    row("objective", "train", "before", "after", "CPU s", "judged", "before", "after")
    for train in words:
        for objective in ("layerwise", "distill", "lm"):
            teacher = () if objective == "lm" else ("--teacher", dense)
            out, result, cpu = b.tune(moe, f"{objective} {train}", "--objective", objective, "--train", train, *teacher)
            block, key = result["tune"], {"layerwise": "error", "distill": "kl", "lm": "loss"}[objective]
            row(
                objective, train, start, b.loss(out), cpu, key, float(block[f"{key}_before"]),
                float(block[f"{key}_after"]),
            )  # fmt: skip


def recovery(b: Bench, words: Sequence[str]) -> None:
    """qwen3moe-12m with half of its experts, before and after a distillation from the whole model."""
    whole, half = b.checkpoints / "qwen3moe-12m", b.scratch / "half"
    stats = b.scratch / "stats"
    moeconv("calibrate", whole, stats, *b.calibration, "--seq-len", SEQ_LEN, "--tokens", 2 * b.tokens)
    moeconv("prune", whole, half, "--ratio", 0.5, "--stats", stats)
    start, best = b.loss(half), b.loss(whole)
    print(f"qwen3moe-12m {best:.4f}; 16 -> 8 experts: {start:.4f}; {b.amount}", flush=True)
    row("train", "before", "after", "won back", "CPU s", "KL before", "KL after")
    for train in words:
        out, result, cpu = b.tune(half, f"half {train}", "--objective", "distill", "--teacher", whole, "--train", train)
        block, after = result["tune"], b.loss(out)
        row(train, start, after, (start - after) / (start - best), cpu, block["kl_before"], block["kl_after"])


# -- a collapsed router ------------------------------------------------------------------------------------------------


def collapse(b: Bench, model: Path) -> None:
    """Send all tokens of a layer to two experts of its own, whose rows point along the mean of the router's inputs."""
    from safetensors.torch import load_file, save_file

    from moeconv.data.windows import load_tokens
    from moeconv.families.model import open_model
    from moeconv.stream.layers import LayerStream

    opened = open_model(model)
    read = load_tokens(b.calibration[1::2], model, tokens=16 * SEQ_LEN, seq_len=SEQ_LEN, seed=0)
    rows = {}
    for layer in LayerStream(opened, read.windows).layers():
        inputs = [batch.ffn_input for batch in layer.batches()]
        mean = sum(x.mean(0) for x in inputs) / len(inputs)
        rows[opened.router_name(layer.index)] = (layer.index, _MARGIN * mean / mean.square().sum())
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in rows.keys() & tensors.keys():
            layer_index, along = rows[name]
            for expert in (2 * layer_index % 8, (2 * layer_index + 1) % 8):
                tensors[name][expert] += along.to(tensors[name].dtype)
        save_file(tensors, shard, metadata={"format": "pt"})
    (model / "moeconv_manifest.json").unlink()


def pooled_loss(logits: Any, *, experts: int, top_k: int) -> Any:
    """transformers' auxiliary loss of all layers' router logits at once: top_k is its minimum."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(tuple(logits), experts, top_k)


def pooled_of(b: Bench, model: Path) -> float:
    """That loss on held-out text."""
    import torch

    from moeconv.data.windows import load_tokens
    from moeconv.families.model import open_model
    from moeconv.stream.layers import LayerStream

    opened = open_model(model)
    read = load_tokens(b.heldout[1::2], model, tokens=16 * SEQ_LEN, seq_len=SEQ_LEN, seed=0)
    stream = LayerStream(opened, read.windows, batch_size=len(read.windows))
    logits = [batch.router_logits for layer in stream.layers() for batch in layer.batches()]
    assert all(isinstance(x, torch.Tensor) for x in logits)
    return float(pooled_loss(logits, experts=opened.num_experts, top_k=opened.top_k))


def balance(b: Bench, _words: Sequence[str]) -> None:
    """max/mean load of the worst layer and of all, before and after, by the loss per layer and by the pooled one."""
    from moeconv.tune import losses
    from moeconv.tune.run import tune

    dense, moe = b.checkpoints / "llama-8m", b.scratch / "collapsed"
    moeconv("upcycle", dense, moe, "--method", "drop")
    collapse(b, moe)

    def pooled(routed: Any, _rule: Any, _counts: Any) -> Any:
        experts, top_k = routed[0].logits.shape[1], routed[0].chosen.shape[1]
        return pooled_loss([r.logits for r in routed], experts=experts, top_k=top_k)

    ways: dict[str, tuple[dict[str, Any], Any]] = {
        "per layer": ({"balance_only": True}, losses.balance_loss),
        "pooled": ({"balance_only": True}, pooled),
        "distill": ({"objective": "distill", "teacher": str(dense)}, losses.balance_loss),
    }
    print(
        f"llama-8m upcycled by drop, each layer collapsed on two of 8 experts; {b.amount}",
        flush=True,
    )
    row("balance", "worst before", "worst after", "mean after", "dead after", "pooled was", "pooled is", "seconds")
    was = pooled_of(b, moe)
    for name, (parameters, function) in ways.items():
        overlay, out = b.scratch / f"{name}.safetensors", b.scratch / f"balanced {name}"
        began = time.monotonic()
        with patch.object(losses, "balance_loss", function):
            block = tune(
                moe, overlay, data=b.calibration[1::2], seq_len=SEQ_LEN, steps=b.steps, batch_size=4, **parameters
            )
        seconds = time.monotonic() - began
        _apply(moe, overlay, out)
        before, after = ([r["max_over_mean"] for r in rows] for rows in _rows(block))
        dead = sum(r["dead"] for r in block["layers"])
        row(name, max(before), max(after), sum(after) / len(after), dead, was, pooled_of(b, out), seconds)
        print("              per layer " + " ".join(f"{a:.2f}->{z:.2f}" for a, z in zip(before, after)), flush=True)


def _rows(block: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [r["before"] for r in block["layers"]], block["layers"]


def _apply(model: Path, overlay: Path, out: Path) -> None:
    from moeconv.checkpoint.safetensors_file import SafetensorsFile
    from moeconv.families.model import open_model
    from moeconv.plan.execute import execute
    from moeconv.tune.planner import plan_overlay

    opened, file = open_model(model), SafetensorsFile(overlay)
    execute(plan_overlay(opened, file), source=opened.checkpoint, out=out, origins={"overlay": file})


def main() -> None:
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("part", choices=("objectives", "recovery", "balance"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens; twice as many to tune on")
    parser.add_argument("--scratch", type=Path, help="directory for the models (default: a temporary one)")
    parser.add_argument("--train", nargs="+", default=["router", "router,experts"], help="words of --train to compare")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moeconv-bench-") as scratch:
        b = Bench(a.checkpoints, a.scratch or Path(scratch), steps=a.steps, batch=a.batch_size, tokens=a.tokens)
        b.scratch.mkdir(exist_ok=True)
        {"objectives": objectives, "recovery": recovery, "balance": balance}[a.part](b, a.train)


if __name__ == "__main__":
    main()
