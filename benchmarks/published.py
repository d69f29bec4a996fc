"""Published models as checkpoints of holes: which commands take each, its parameters, and what the commands cost.

    python benchmarks/published.py HOLES.py CONFIGS WORK [--only NAME ...] [--results FILE.json]

CONFIGS holds one config.json per published model, as NAME.json. HOLES.py has `tensors(config)`, which returns the name,
dtype and shape of every tensor on the hub, and `write(path, config, tensors)`. A model whose class is code on the hub
gets its tensors from moeconv's own row, and is marked with *: that shows sizes and plans, but not the names.

inspect, verify, prune or upcycle, and quantize run as processes of their own, the last three as dry runs. Parameters
are in billions, total and active, without prediction layers. Exits with 1 if a figure is off by more than 1 %.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moeconv.errors import MoeconvError  # noqa: E402
from moeconv.families.check import Shapes, _belongs  # noqa: E402
from moeconv.families.find import find_family  # noqa: E402
from moeconv.families.model import Model  # noqa: E402
from moeconv.families.registry import tables  # noqa: E402

# published parameters in billions: total, and active per token (None where none is published), with the vendor's digits
PUBLISHED: dict[str, tuple[str, str | None]] = {
    "DeepSeek-MoE-16B": ("16.4", "2.8"),
    "DeepSeek-R1": ("671", "37"),
    "DeepSeek-V2-Lite": ("15.7", "2.4"),
    "DeepSeek-V3": ("671", "37"),
    "DeepSeek-V3.1-NVFP4": ("671", "37"),
    "DeepSeek-V3.2": ("671", "37"),
    "ERNIE-4.5-21B-A3B": ("21", "3"),
    "ERNIE-4.5-300B-A47B": ("300", "47"),
    "GLM-4.5": ("355", "32"),
    "GLM-4.5-Air": ("106", "12"),
    "Gemma-4-26B-A4B": ("25.2", "3.8"),
    "Granite-4.0-h-small": ("32", "9"),
    "Granite-4.0-h-tiny": ("7", "1"),
    "Hunyuan-A13B": ("80", "13"),
    "Jamba-v0.1": ("52", "12"),
    "Kimi-K2": ("1026", "32.9"),
    "LFM2-8B-A1B": ("8.3", "1.5"),
    "Ling-lite": ("16.8", "2.75"),
    "Ling-mini-2.0": ("16.3", "1.4"),
    "Llama-4-Maverick": ("400", "17"),
    "Llama-4-Scout": ("109", "17"),
    "MiMo-V2-Flash": ("309", "15"),
    "MiniMax-M2.5": ("230", "10"),
    "MiniCPM-MoE-8x2B": ("13.6", "4"),
    "Mixtral-8x22B-v0.1": ("141", "39"),
    "Mixtral-8x7B": ("46.7", "12.9"),
    "Nemotron-3-Nano-30B-A3B": ("31.6", "3.6"),
    "Nemotron-3-Super-120B": ("120", "12"),
    "Nemotron-3-Ultra-550B": ("550", "55"),
    "Nemotron-H-56B": ("56", None),
    "OLMoE-1B-7B": ("6.9", "1.3"),
    "Phi-3.5-MoE": ("41.9", "6.6"),
    "Phi-mini-MoE": ("7.6", "2.4"),
    "Qwen1.5-MoE-A2.7B": ("14.3", "2.7"),
    "Qwen3-235B-A22B": ("235", "22"),
    "Qwen3-30B-A3B": ("30.5", "3.3"),
    "Qwen3-30B-A3B-FP8": ("30.5", "3.3"),
    "Qwen3-Coder-480B": ("480", "35"),
    "Qwen3-Next-80B-A3B": ("80", "3"),
    "Qwen3.5-122B-A10B": ("122", "10"),
    "Qwen3.5-35B-A3B": ("35", "3"),
    "Qwen3.5-397B-A17B": ("397", "17"),
    "Step-3.7-Flash": ("196", "11"),
    "Trinity-Mini": ("26", "3"),
    "Trinity-Nano": ("6", "1"),
    "WizardLM-2-8x22B": ("141", "39"),
    "dots.llm1": ("142", "14"),
    "gpt-oss-120b": ("117", "5.1"),
    "gpt-oss-20b": ("20.9", "3.6"),
}


WITHOUT_EMBEDDINGS = {"MiniCPM-MoE-8x2B"}  # whose published total leaves out the embeddings


@dataclass
class Found:
    """What the commands made of one model."""

    name: str
    model_type: str
    own_names: bool = False  # whether the tensors' names come from moeconv's row
    kind: str = ""
    took: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    total: int | None = None
    active: int | None = None
    prediction: int | None = None
    tensors: int | None = None
    cpu: float = 0.0  # of all commands
    slowest: float = 0.0
    memory: float = 0.0  # MB, of the command that held the most
    embeddings: int = 0
    towers: int = 0  # parameters beside the language model

    @property
    def off(self) -> str:
        """How the parameters differ from the published ones, in words; "" if they do not.

        Some vendors count the embeddings as active, and the towers of a multimodal model in its total, some do not.
        """
        if self.name not in PUBLISHED or self.total is None or self.active is None:
            return ""
        total, active = PUBLISHED[self.name]
        counted = self.total - self.embeddings if self.name in WITHOUT_EMBEDDINGS else self.total
        wrong = [] if near(total, counted, or_as_few_as=counted - self.towers) else [f"total published as {total}"]
        if active and not near(active, self.active, or_as_few_as=self.active - self.embeddings):
            wrong.append(f"active published as {active}")
        return ", ".join(wrong)


def near(text: str, parameters: int, *, or_as_few_as: int | None = None) -> bool:
    """Whether a count is within 1 % of a published figure in billions, or becomes it when rounded or cut to its digits.

    With `or_as_few_as`, any count from that one up to `parameters` may be the published one.
    """
    stated, step = float(text), 10.0 ** -len(text.partition(".")[2])
    least, most = min(stated * 0.99, stated - step / 2), max(stated * 1.01, stated + step)
    few = parameters if or_as_few_as is None else or_as_few_as
    return few / 1e9 <= most and parameters / 1e9 >= least


@cache
def load(path: Path) -> ModuleType:
    """The module that makes checkpoints of holes."""
    spec = importlib.util.spec_from_file_location("holes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_row(config: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor by moeconv's own row. Raises MoeconvError for a config without a row."""
    family = find_family(config)
    bare: Any = SimpleNamespace(config=config, tensors={})
    model = Model(bare, family, {}, ())
    expected, moe = Shapes(model), frozenset(model.moe_layers)
    on = {key for switch, keys in family.tensors.switched.items() if model.value(switch) for key in keys}
    if not model.value("tie_word_embeddings"):
        on.add("embedding.lm_head")
    left_out = family.tensors.optional - on
    return [
        (name, "BF16", expected(role) or ())
        for name, role in family.expand(layers=model.num_layers, experts=model.num_experts)
        if _belongs(model, role, moe) and role.key not in left_out
    ]


def make(script: Path, config: dict[str, Any], path: Path) -> bool | str:
    """Write the checkpoint. Returns whether its names come from moeconv's row; a text if there is none to make.

    It runs in another process, because the memory of a process that imported torch counts for those that it starts.
    """
    holes, own = load(script), False
    try:
        if "text_config" not in config and config.get("model_type") in tables().wrappers:
            raise ValueError("transformers would take the defaults of its language model")
        tensors = holes.tensors(config)
    except Exception as error:  # transformers does not know the model, or cannot read its config
        try:
            tensors, own = of_row(config), True
        except MoeconvError as refusal:
            tensors = [("model.embed_tokens.weight", "BF16", (config.get("vocab_size") or 8, 8))]
            holes.write(str(path), config, tensors)
            return f"{refusal.message} (transformers: {type(error).__name__})"
    holes.write(str(path), config, tensors)
    return own


def run(words: list[str]) -> tuple[dict[str, Any], float, float]:
    """(its JSON, processor seconds, megabytes) of one command."""
    out_r, out_w = os.pipe()
    quiet = os.open(os.devnull, os.O_WRONLY)
    pid = os.posix_spawn(
        sys.executable, [sys.executable, "-m", "moeconv", *words, "--json"], os.environ | {"PYTHONPATH": str(ROOT)},
        file_actions=[(os.POSIX_SPAWN_DUP2, out_w, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)],
    )  # fmt: skip
    os.close(out_w)
    os.close(quiet)
    with os.fdopen(out_r) as stream:
        text = stream.read()
    _, status, used = os.wait4(pid, 0)
    try:
        found = json.loads(text)
    except ValueError:
        found = {"error": {"message": f"no JSON; exit status {os.waitstatus_to_exitcode(status)}"}}
    return found, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3


def steps(source: Path, out: Path, kind: str) -> Iterator[tuple[str, list[str]]]:
    """The commands after inspect."""
    yield "verify", [str(source)]
    if kind == "moe":
        yield "prune", [str(source), str(out), "--ratio", "0.5", "--criterion", "random", "--dry-run"]
    else:
        yield "upcycle", [str(source), str(out), "--dry-run"]
    yield "quantize", [str(source), str(out), "--dry-run"]


def look(name: str, config: dict[str, Any], source: Path, own: bool | str) -> Found:
    """Run every command on one checkpoint."""
    found = Found(name, str(config.get("model_type")), own_names=own is True)

    def note(verb: str, words: list[str]) -> dict[str, Any]:
        result, cpu, memory = run([verb, *words])
        found.cpu, found.slowest = found.cpu + cpu, max(found.slowest, cpu)
        found.memory = max(found.memory, memory)
        if "error" in result or result.get("ok") is False:
            problems = result.get("problems") or ["?"]
            found.refused[verb] = str(result["error"]["message"] if "error" in result else problems[0])
        else:
            found.took.append(verb)
        return result

    inspected = note("inspect", [str(source)])
    if isinstance(own, str):
        found.refused["inspect"] = own
        found.took.clear()
        return found
    if found.took and inspected.get("kind") in ("dense", "moe"):
        numbers = inspected["parameters"]
        found.kind, found.tensors = inspected["kind"], inspected["tensors"]
        found.total, found.active = numbers["total"], numbers["active"]
        found.embeddings = inspected["parameters_by_role"].get("embedding", 0)
        found.prediction = numbers["prediction"]
        found.towers = sum(inspected["parameters_by_role"].get(group, 0) for group in ("vision", "audio"))
    for verb, words in steps(source, source.parent / "out", found.kind):
        note(verb, words)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("holes", type=Path, metavar="HOLES.py")
    parser.add_argument("configs", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--results", type=Path)
    a = parser.parse_args()
    source = a.work / "source"
    maker = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    a.work.mkdir(parents=True, exist_ok=True)
    every: list[Found] = []
    print("| model | model_type | taken by | parameters | prediction | tensors | CPU s | MB | refused |")
    print("|---|---|---|---:|---:|---:|---:|---:|---|")
    for path in sorted(a.configs.glob("*.json")):
        if a.only and path.stem not in a.only:
            continue
        shutil.rmtree(source, ignore_errors=True)
        config = json.loads(path.read_text())
        every.append(look(path.stem, config, source, maker.submit(make, a.holes, config, source).result()))
        print(line(every[-1]), flush=True)
        if a.results:
            a.results.write_text(json.dumps([asdict(one) | {"off": one.off} for one in every], indent=1) + "\n")
    maker.shutdown()
    shutil.rmtree(source, ignore_errors=True)
    worked = [one for one in every if {"prune", "upcycle", "quantize"} & set(one.took)]
    wrong = [one.name for one in every if one.off]
    some = sum(bool(one.took) for one in every)
    print(
        f"\n{some} of {len(every)} are taken by some command, {len(worked)} by prune, upcycle or quantize; "
        f"parameters off: {', '.join(wrong) or 'none'}"
    )
    raise SystemExit(1 if wrong else 0)


def line(one: Found) -> str:
    """One row of the table."""
    known = "" if one.prediction is None else f"{one.prediction / 1e9:.2f}"
    off = f" ({one.off})" if one.off else ""
    sizes = "" if one.total is None else f"{one.total / 1e9:.2f}" + (f" / {one.active / 1e9:.2f}" if one.active else "")
    told = "; ".join(f"{verb}: {why}" for verb, why in one.refused.items()).replace("|", "/")
    count = "" if one.tensors is None else f"{one.tensors:,}"
    name, took = one.name + "*" * one.own_names, " ".join(one.took)
    cells = (name, one.model_type, took, sizes + off, known, count, f"{one.slowest:.1f}", f"{one.memory:.0f}", told)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
