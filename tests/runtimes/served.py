"""Which families do vLLM and llama.cpp run as transformers does? Random models, pruned and upcycled, as a table.

    MOECONV_VLLM_PYTHON=... MOECONV_LLAMA_CPP_PYTHON=... MOECONV_CONVERTER_PYTHON=... MOECONV_LLAMA_CPP_SOURCE=DIR \\
        python tests/runtimes/served.py [--made pruned] [--weights bf16] [--runtime vllm] [--json FILE] [FAMILY ...]

`--made stock` is the control: a random model as transformers' save_pretrained wrote it, which moeconv never touched.
`--resaved` is another one: what moeconv wrote, loaded and saved by transformers, so that names and config are its own.
An engine that is as far apart there differs from transformers by itself.

What it prints is what families/served.py and the formats say. `apart` is the root mean square of the differences of
log-probabilities from transformers in float32, in units of their spread; `noise` is the same of transformers in
bfloat16, whose rounding picks other experts now and then. In float32 a runtime that computes the same function is apart
by 1e-3 at most. `agree` is the share of greedy tokens that are the choice of transformers after the same tokens.
llama.cpp is given what its own converter makes of the checkpoint in float32, or moeconv's GGUF.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import agreement as runtimes
import torch
from safetensors.torch import load_file, save_file
from sizes import MOE, UPCYCLED

from moeconv.errors import InputError, UsageError
from moeconv.families.model import open_model
from moeconv.plan.meter import SilentMeter
from moeconv.recipe.run import run_step

SPREAD = 4.0  # of router weights, so that few choices of experts are near ties
PATIENCE = 240  # seconds for one model
# weights -> (parameters of quantize, dtype of the run in vLLM)
WEIGHTS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "f32": (None, "float32"),
    "bf16": (None, "bfloat16"),
    "int4": ({"group_size": "32"}, "bfloat16"),
    "int8": ({"bits": 8, "group_size": "32"}, "bfloat16"),
    "int8 channel": ({"bits": 8, "group_size": "channel"}, "bfloat16"),
}


def widen_router(path: Path) -> None:
    """Multiply every router's matrix in a checkpoint."""
    model = open_model(path)
    routers = {name for name, role in model.roles.items() if role.key == "router.weight"}
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({n: t * SPREAD if n in routers else t for n, t in tensors.items()}, shard, {"format": "pt"})


def make(family: str, made: str, work: Path) -> Path:
    """A pruned or an upcycled checkpoint of a family, or one that only transformers has written."""
    source, out = work / "source", work / made
    kind, config = UPCYCLED[family] if made == "upcycled" else (family, MOE[family])
    runtimes.random_model(kind, source, config)
    if made != "upcycled":
        widen_router(source)
    if made == "stock":
        return source
    if made == "pruned":
        values: dict[str, Any] = {"keep": 6, "criterion": "random"}
    else:
        values = {"to": family, "experts": 6, "top_k": 2, "method": "drop", "router_std": 0.3, "no_check": True}
    run_step("prune" if made == "pruned" else "upcycle", values, str(source), str(out), meter=SilentMeter())
    return out


def resave(source: Path, out: Path) -> Path:
    """The same model as transformers writes it: its names of tensors, its config, and the tokenizer's files."""
    runtimes.load(source).save_pretrained(out)
    for file in source.glob("tokenizer*.json"):
        shutil.copy(file, out / file.name)
    return out


class Vllm:
    """One process that answers job after job, started again where a model has ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str] = queue.Queue()
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115

    def _start(self) -> subprocess.Popen[str]:
        command = [os.environ[runtimes.RUNTIMES["vllm"]], str(runtimes.HERE / "run_vllm.py")]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )  # fmt: skip
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()
        self.lines = lines
        return process

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Raises RuntimeError with the last words of a run that fails."""
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=PATIENCE)
        except queue.Empty:
            line = ""
        if not line:
            self.process.kill()
            code, self.process = self.process.wait(), None
            raise RuntimeError(f"ended with {code}: {Path(self.log.name).read_text()[-200:]}")
        found = json.loads(line)
        if "failed" in found:
            raise RuntimeError(found["failed"])
        return found


def reference(plain: Path, dtype: torch.dtype, asked: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of transformers at every position, [prompts, tokens, vocabulary]."""
    model = runtimes.load(plain).to(dtype)
    with torch.no_grad():
        return model(torch.tensor(asked)).logits.float().log_softmax(-1)


def _apart(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return float((theirs - ours).square().mean().sqrt() / ours.std())


def agreement(plain: Path, asked: list[list[int]], answered: list[list[int]]) -> float:
    ids = [[*a, *b] for a, b in zip(asked, answered, strict=True)]
    best = reference(plain, torch.float32, ids)[:, len(asked[0]) - 1 : -1].argmax(-1)
    return float((best == torch.tensor(answered)).float().mean())


def in_vllm(vllm: Vllm, packed: Path, plain: Path, asked: list[list[int]], dtype: str) -> dict[str, float]:
    job = {"model": str(packed), "prompts": asked, "length": runtimes.LENGTH, "dtype": dtype}
    found = vllm.ask(job)
    wanted = torch.tensor(asked)[:, 1:, None]
    exact, rounded = (
        reference(plain, kind, asked)[:, :-1].gather(-1, wanted)[..., 0] for kind in (torch.float32, torch.bfloat16)
    )
    return {
        "apart": _apart(torch.tensor(found["logprobs"]), exact),
        "noise": _apart(rounded, exact),
        "agree": agreement(plain, asked, found["tokens"]),
    }


def in_llama_cpp(file: Path, plain: Path, asked: list[list[int]]) -> dict[str, float]:
    vocabulary = json.loads((plain / "config.json").read_text())["vocab_size"]
    job = {"model": str(file), "prompts": asked, "length": runtimes.LENGTH, "texts": [], "vocabulary": vocabulary}
    found = runtimes.in_environment(runtimes.RUNTIMES["llama.cpp"], "run_llama_cpp.py", job)
    exact = reference(plain, torch.float32, asked)[:, -1]
    theirs = torch.full_like(exact, float("nan"))
    for row, pairs in enumerate(found["logprobs"]):
        ids, values = zip(*pairs, strict=True)
        theirs[row, list(ids)] = torch.tensor(values)
    rounded, known = reference(plain, torch.bfloat16, asked)[:, -1], ~theirs.isnan()
    return {
        "apart": _apart(theirs[known], exact[known]),
        "noise": _apart(rounded, exact),
        "agree": agreement(plain, asked, found["tokens"]),
    }


def convert(source: Path, out: Path) -> Path:
    """Raises RuntimeError with the last line of llama.cpp's converter where it refuses a checkpoint."""
    folder, python = os.environ["MOECONV_LLAMA_CPP_SOURCE"], os.environ["MOECONV_CONVERTER_PYTHON"]
    command = [python, str(runtimes.HERE / "run_converter.py"), folder, "f32", str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})  # fmt: skip
    if done.returncode:
        raise RuntimeError("converter: " + (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return out


def runs(source: Path, work: Path, weights: list[str], where: list[str], vllm: Vllm) -> Iterator[dict[str, Any]]:
    asked = runtimes.prompts(source)
    for name in weights:
        parameters, dtype = WEIGHTS[name]
        packed, plain = (source, source) if parameters is None else (work / "packed", work / "plain")
        try:
            if parameters is not None:
                runtimes.quantize(source, packed, parameters)
                runtimes.dequantized(source, packed, plain, parameters)
        except (InputError, UsageError) as error:
            yield {"weights": name, "runtime": "-", "failed": f"not written: {error.message}"}
            continue
        if "vllm" in where:
            try:
                yield {"weights": name, "runtime": "vllm"} | in_vllm(vllm, packed, plain, asked, dtype)
            except RuntimeError as error:
                yield {"weights": name, "runtime": "vllm", "failed": str(error)}
        for folder in {packed, plain} - {source}:
            shutil.rmtree(folder)
    if "llama.cpp" in where:
        try:
            file = convert(source, work / "converted.gguf")
            yield {"weights": "f32", "runtime": "llama.cpp"} | in_llama_cpp(file, source, asked)
        except RuntimeError as error:
            yield {"weights": "f32", "runtime": "llama.cpp", "failed": str(error)}


def measure(
    family: str, made: str, work: Path, weights: list[str], where: list[str], vllm: Vllm, *, resaved: bool = False
) -> Iterator[dict[str, Any]]:
    row = {"family": family, "made": made}
    try:
        source = make(family, made, work)
        if resaved:
            source = resave(source, work / "resaved")
    except Exception as error:  # a row of the table, not the end of it
        yield row | {"weights": "-", "runtime": "-", "failed": f"not made: {type(error).__name__}: {error}"}
        return
    for found in runs(source, work, weights, where, vllm):
        yield row | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(MOE))
    parser.add_argument("--made", action="append", choices=("pruned", "upcycled", "stock"))
    parser.add_argument("--resaved", action="store_true")
    parser.add_argument("--weights", action="append", choices=tuple(WEIGHTS))
    parser.add_argument("--runtime", action="append", choices=("vllm", "llama.cpp"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, vllm = [], Vllm()
    print("| family | made | weights | runtime | apart | noise | agree |\n|---|---|---|---|---|---|---|")
    for family in options.families:
        for made in options.made or ("pruned", "upcycled"):
            if made == "upcycled" and family not in UPCYCLED:
                continue
            with tempfile.TemporaryDirectory() as folder:
                weights, where = options.weights or list(WEIGHTS), options.runtime or ["vllm", "llama.cpp"]
                for row in measure(family, made, Path(folder), weights, where, vllm, resaved=options.resaved):
                    rows.append(row)
                    figures = (
                        row.get("failed") or f"{row['apart']:.1e} | {row['noise']:.1e} | {100 * row['agree']:.1f} %"
                    )
                    print(f"| {family} | {made} | {row['weights']} | {row['runtime']} | {figures} |", flush=True)
                    if options.json:
                        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
