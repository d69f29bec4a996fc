"""One FFN split into 8 experts against a static mask of the same cost: training-free, and both after the same tuning.

    python benchmarks/split.py CHECKPOINTS --work DIR --out RESULTS.json [--one]

CHECKPOINTS holds llama-8m and text/. Every stage's result goes to RESULTS.json as it comes, and a finished stage is not
run again; --one runs the next stage alone. The table is printed at the end.

The static mask keeps the neurons with the most energy at the output, mean h^2 * ||column of down||^2, in every layer
the share that the split model has active; FLAP's compensation (arXiv 2312.11983) adds the mean of what is left out, as
the bias of a narrower dense Llama. To be tuned by the same command it is written as a Mixtral of one expert, which has
no place for the bias.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moeconv.calibrate.neurons import load_neurons
from moeconv.families.model import open_model
from moeconv.inspect.run import inspect
from moeconv.plan.meter import SilentMeter
from moeconv.recipe.run import run_step

SOURCES = ("c", "man", "prose", "python")
SEQ_LEN, CALIBRATION, HELD_OUT = 256, 32768, 32768
BATCH = 4
TOP_K = {"50": 3, "75": 5}  # of 7 routed experts beside a shared one: 4 and 6 of 8 parts of the FFN
STEPS = {"50": (20, 60), "75": (20,)}
METER = SilentMeter()


def texts(root: Path, kind: str) -> tuple[str, ...]:
    return tuple(str(root / "text" / f"{kind}.{name}.txt") for name in SOURCES)


def look(root: Path, path: Path) -> dict[str, Any]:
    """Held-out loss in nats per token, active parameters and FLOPs per token (attention and router counted)."""
    values = {"data": texts(root, "heldout"), "seq_len": SEQ_LEN, "tokens": HELD_OUT, "seed": 0}
    model = open_model(path)
    found = inspect(model)
    head = model.value("head_dim") or model.hidden_size // model.value("num_attention_heads")
    seen = (SEQ_LEN + 1) / 2  # positions that a token attends to, on average: a product and a sum each for keys, values
    attention = round(4 * seen * model.value("num_attention_heads") * head * model.num_layers)
    return {
        "loss": run_step("evaluate", values, str(path), meter=METER)["loss"],
        "active": found["parameters"]["active"],
        "flops": found["flops_per_token"] + attention,
    }


def split(root: Path, work: Path, out: Path, active: str, clustering: str) -> None:
    values = {
        "method": "split", "experts": 7, "top_k": TOP_K[active], "shared_experts": "1", "clustering": clustering,
        "stats": str(work / "neurons.safetensors"), "no_check": True,
    }  # fmt: skip
    run_step("upcycle", values, str(root / "llama-8m"), str(out), meter=METER)


def mask(root: Path, work: Path, out: Path, active: str, *, bias: bool) -> None:
    """A narrower dense Llama of the kept neurons; with `bias` the mean of the others' output is added."""
    from transformers import AutoModelForCausalLM

    source = open_model(root / "llama-8m")
    statistics = load_neurons(work / "neurons.safetensors", source)
    model: Any = AutoModelForCausalLM.from_pretrained(root / "llama-8m", dtype=torch.float32)
    width = source.ffn_width * int(active) // 100
    state = model.state_dict()
    for layer in range(source.num_layers):
        names = {part: source.ffn_name(part, layer=layer) for part in ("gate", "up", "down")}
        down = state[names["down"]]
        score = statistics.field(layer, "energy") * down.square().sum(0)
        kept = torch.topk(score, width).indices.sort().values
        left = torch.ones(len(score), dtype=torch.bool).index_fill_(0, kept, False)
        if bias:
            for part in ("gate", "up"):
                state[names[part].replace("weight", "bias")] = torch.zeros(width)
            state[names["down"].replace("weight", "bias")] = down[:, left] @ statistics.field(layer, "mean")[left]
        state[names["down"]] = down[:, kept].contiguous()
        for part in ("gate", "up"):
            state[names[part]] = state[names[part]][kept].contiguous()
    model.config.intermediate_size, model.config.mlp_bias = width, bias
    narrow = type(model)(model.config)
    narrow.load_state_dict(state, strict=True)
    narrow.to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "llama-8m" / name, out / name)


def one_expert(source: Path, out: Path) -> None:
    values = {"experts": 1, "top_k": 1, "to": "mixtral", "no_check": True}
    run_step("upcycle", values, str(source), str(out), meter=METER)


def tune(root: Path, source: Path, out: Path, *, steps: int, train: str) -> None:
    values = {
        "objective": "distill", "teacher": str(root / "llama-8m"), "train": train, "steps": steps, "balance": 0.0,
        "data": texts(root, "calibration"), "seq_len": SEQ_LEN, "batch_size": BATCH, "no_check": True,
    }  # fmt: skip
    run_step("tune", values, str(source), str(out), meter=METER)


def stages(root: Path, work: Path) -> dict[str, tuple[Path | None, Callable[[], Any]]]:
    """name -> (the model that it makes, how); the first only measures."""
    dense = root / "llama-8m"
    calibration = {"data": texts(root, "calibration"), "seq_len": SEQ_LEN, "tokens": CALIBRATION}
    stats = str(work / "neurons.safetensors")
    made: dict[str, tuple[Path | None, Callable[[], Any]]] = {
        "neurons": (
            None,
            lambda: run_step("calibrate", calibration | {"overwrite": True}, str(dense), stats, meter=METER),
        ),
        "dense": (dense, lambda: None),
    }

    def add(name: str, how: Callable[[Path], Any]) -> Path:
        made[name] = (work / name.replace(" ", "-"), lambda: how(work / name.replace(" ", "-")))
        return work / name.replace(" ", "-")

    for active in TOP_K:
        routed = add(f"{active} split", lambda out, a=active: split(root, work, out, a, "refined"))
        add(f"{active} mask bias", lambda out, a=active: mask(root, work, out, a, bias=True))
        plain = add(f"{active} mask", lambda out, a=active: mask(root, work, out, a, bias=False))
        add(f"{active} random", lambda out, a=active: split(root, work, out, a, "random"))
        lone = add(f"{active} mask expert", lambda out, p=plain: one_expert(p, out))
        for steps in STEPS[active]:
            for kind, start, train in (("split", routed, "router,experts,shared"), ("mask", lone, "experts")):
                add(
                    f"{active} {kind} tuned {steps}",
                    lambda out, s=start, n=steps, t=train: tune(root, s, out, steps=n, train=t),
                )
    return made


def table(results: dict[str, Any]) -> None:
    """Loss and cost, and the share of the loss increase that tuning wins back."""
    dense = results["dense"]["loss"]
    print(f"{'':24}{'tokens':>8}{'loss':>9}{'increase':>10}{'won back':>10}{'active':>12}{'FLOPs/token':>13}")
    for name, row in results.items():
        if "loss" not in row or name.endswith("expert"):
            continue
        start = results.get(name.partition(" tuned")[0], row)["loss"] - dense
        steps = int(name.rpartition(" ")[2]) if "tuned" in name else 0
        won = f"{1 - (row['loss'] - dense) / start:.0%}" if steps else ""
        print(
            f"{name:24}{steps * BATCH * SEQ_LEN:8}{row['loss']:9.4f}{row['loss'] - dense:10.4f}{won:>10}"
            f"{row['active']:12,}{row['flops']:13,}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", action="store_true", help="run the next stage alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name, (path, make) in stages(given.checkpoints, given.work).items():
        if name in results:
            continue
        began = time.process_time()
        if path is not None and path != given.checkpoints / "llama-8m":
            shutil.rmtree(path, ignore_errors=True)
        make()
        results[name] = (look(given.checkpoints, path) if path else {}) | {
            "cpu_seconds": round(time.process_time() - began, 1)
        }
        given.out.write_text(json.dumps(results, indent=1))
        print(name, results[name], flush=True)
        if given.one:
            return
    table(results)


if __name__ == "__main__":
    main()
