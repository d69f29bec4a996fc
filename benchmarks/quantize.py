"""Quality of the quantization methods on small trained MoEs: loss increase on held-out text, and against a peer.

    python benchmarks/quantize.py CHECKPOINTS WORK [--model llama-8m|qwen3moe-12m] [--peer PYTHON] [--only NAME ...]

CHECKPOINTS holds llama-8m, qwen3moe-12m and text/{calibration,heldout}.*.txt. llama-8m is made an MoE first (drop, 8
experts, top-2) and trained (distill, router and experts). PYTHON is an interpreter that has llm-compressor. Intervals
are 95 % of a bootstrap over windows of 256 tokens, paired: every method is compared with the unquantized model on the
same windows, and with the others through the same draws. Results are appended to WORK/results.jsonl as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TEXTS = ("c", "man", "prose", "python")
WINDOW = 256
STEPS = "60"
DRAWS = 2000

# name -> flags of `moeconv quantize`; GROUP stands for the group size
INT4 = {
    "rtn g{G}": ["--scheme", "int4", "--group-size", "{G}"],
    "mse g{G}": ["--scheme", "int4", "--group-size", "{G}", "--method", "mse"],
    "gptq g{G}": ["--scheme", "int4", "--group-size", "{G}", "--method", "gptq"],
    "gptq in file order g{G}": [
        "--scheme", "int4", "--group-size", "{G}", "--method", "gptq", "--actorder", "none",
    ],
    "awq g{G}": ["--scheme", "int4", "--group-size", "{G}", "--method", "awq"],
    "auto g{G}": ["--scheme", "int4", "--group-size", "{G}", "--method", "auto"],
}  # fmt: skip
BNB = ["--format", "bitsandbytes", "--scheme"]
OTHERS = {
    "nf4 rtn": [*BNB, "nf4"],
    "nf4 gptq": [*BNB, "nf4", "--method", "gptq"],
    "int8 g{G} rtn": ["--scheme", "int8", "--group-size", "{G}"],
    "int8 rows (bitsandbytes)": [*BNB, "int8"],
    "int3 g{G} mse": ["--scheme", "int3", "--group-size", "{G}", "--method", "mse"],
    "int3 g{G} gptq": ["--scheme", "int3", "--group-size", "{G}", "--method", "gptq"],
    "int2 g{G} mse": ["--scheme", "int2", "--group-size", "{G}", "--method", "mse"],
    "int2 g{G} gptq": ["--scheme", "int2", "--group-size", "{G}", "--method", "gptq"],
    "int2 g{G} auto": ["--scheme", "int2", "--group-size", "{G}", "--method", "auto"],
    "mixed 3 bits gptq": ["--scheme", "mixed", "--average-bits", "3", "--target", "vllm", "--method", "gptq"],
    "int4 asymmetric g{G}": ["--scheme", "int4-asym", "--group-size", "{G}"],
    **{scheme: ["--scheme", scheme] for scheme in ("fp8", "w8a8", "nvfp4", "mxfp4", "mxfp8")},
    **{
        f"{scheme} {method}": ["--scheme", scheme, "--method", method]
        for scheme in ("nvfp4", "mxfp4", "fp8", "w8a8")
        for method in ("mse", "gptq", "awq", "auto")
        if scheme.endswith("fp4") or method in ("mse", "gptq")
    },
    "mixed 5 bits rtn": ["--scheme", "mixed", "--average-bits", "5", "--target", "vllm"],
    "mixed 5 bits gptq": ["--scheme", "mixed", "--average-bits", "5", "--target", "vllm", "--method", "gptq"],
}  # fmt: skip
GROUPS = {"llama-8m": (128, 64, 32), "qwen3moe-12m": (64, 32)}

PEER = """
import sys, json
source, out, group, method, *texts = sys.argv[1:]
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=int(group))
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
ignore = ["lm_head", "re:.*self_attn.*", "re:.*gate$", "re:.*embed_tokens.*"]
if method == "rtn":
    from llmcompressor import model_free_ptq
    model_free_ptq(model_stub=source, save_directory=out, scheme=scheme, ignore=ignore, device="cpu")
else:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = []
    for name in texts:
        ids = tokenizer(open(name).read(), add_special_tokens=False)["input_ids"]
        rows += [ids[i : i + 256] for i in range(0, len(ids) - 255, 256)]
    rows = rows[:: max(1, len(rows) // 256)][:256]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 256] * len(rows)})
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=ignore)
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=256, num_calibration_samples=len(rows),
            output_dir=out, moe_calibrate_all_experts=False)
"""


def texts(checkpoints: Path, kind: str) -> list[str]:
    """The files of one kind, in a fixed order."""
    return [str(checkpoints / "text" / f"{kind}.{name}.txt") for name in TEXTS]


def data_flags(checkpoints: Path) -> list[str]:
    """Calibration text as flags."""
    return [word for name in texts(checkpoints, "calibration") for word in ("--data", name)]


def moeconv(*arguments: str) -> dict:
    """Run the command in a process of its own; its JSON, with its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "moeconv", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(done.stdout)
    if done.returncode:
        raise SystemExit(f"moeconv {' '.join(arguments)}: {result['error']['message']}")
    return result | {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def source_of(name: str, checkpoints: Path, work: Path) -> Path:
    """The unquantized MoE; llama-8m is upcycled and trained once."""
    if name != "llama-8m":
        return checkpoints / name
    up, tuned = work / "up", work / "tuned"
    if not tuned.exists():
        moeconv("upcycle", str(checkpoints / name), str(up), "--experts", "8", "--top-k", "2", "--method", "drop",
                "--overwrite")  # fmt: skip
        how = ["--objective", "distill", "--teacher", str(checkpoints / name), "--train", "router,experts"]
        moeconv("tune", str(up), str(tuned), *how, "--steps", STEPS, "--seq-len", "256", *data_flags(checkpoints))
    return tuned


def window_losses(path: Path, checkpoints: Path) -> np.ndarray:
    """Mean next-token loss of every held-out window, in nats."""
    import torch

    from moeconv.data.windows import load_tokens
    from moeconv.families.model import open_model
    from moeconv.stream.layers import LayerStream

    torch.set_num_threads(1)
    read = load_tokens(texts(checkpoints, "heldout"), path, tokens=None, seq_len=WINDOW, seed=0)
    stream = LayerStream(open_model(path), read.windows, dtype=torch.float32).run()
    losses = []
    for rows, logits in stream.logits(batch_size=4):
        wanted = stream.windows[rows][:, 1:]
        losses.append(
            torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), wanted, reduction="none").mean(1)
        )
    return torch.cat(losses).double().numpy()


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and the 95 % interval of its bootstrap."""
    draw = np.random.Generator(np.random.Philox(0))
    means = [differences[draw.integers(0, len(differences), len(differences))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def output_errors(source: Path, other: Path, checkpoints: Path) -> list[float]:
    """Relative RMS error of each MoE layer's output, both given the unquantized model's inputs on held-out text."""
    import torch

    from moeconv.data.windows import load_tokens
    from moeconv.families.model import open_model
    from moeconv.stream.layers import LayerStream
    from moeconv.stream.skeleton import Skeleton
    from moeconv.tensors import decode_weight, plain_name
    from moeconv.tune.network import block_of

    packed, layer_source = open_model(other), open_model(source)

    def norm_of(model, layer: int):
        return decode_weight(model, model.family.name("norm.ffn", layer=layer), torch.float32)

    read = load_tokens(texts(checkpoints, "heldout"), source, tokens=8192, seq_len=WINDOW, seed=0)
    skeleton = Skeleton(packed, dtype=torch.float32)
    found = []
    for layer in LayerStream(layer_source, read.windows, dtype=torch.float32).layers():
        if layer.experts is None:
            continue
        place = skeleton.name_of(block_of(skeleton, layer.index).experts).rpartition(".")[0]
        names = {
            plain_name(name, role)
            for name, role in packed.roles.items()
            if role.layer == layer.index and role.group in ("router", "expert", "shared")
        }
        skeleton.fill({name: decode_weight(packed, name) for name in sorted(names)}, under=place + ".")
        block = skeleton.module.get_submodule(place)
        error = norm = 0.0
        scale = norm_of(packed, layer.index) / norm_of(layer_source, layer.index)  # what AWQ folds into the norm
        for batch in layer.batches():
            with torch.no_grad():
                made = block(batch.ffn_input[None] * scale)
                made = (made[0] if isinstance(made, tuple) else made).reshape(batch.ffn_output.shape)
                error += float((made - batch.ffn_output).double().square().sum())
                norm += float(batch.ffn_output.double().square().sum())
        skeleton.empty(block)
        found.append((error / norm) ** 0.5)
    return found


def peer(python: str, source: Path, out: Path, group: int, method: str, files: list[str]) -> str | None:
    """llm-compressor on the same file; what went wrong, if something did."""
    environment = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", PEER, str(source), str(out), str(group), method, *files],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, check=False,
    )  # fmt: skip
    return None if done.returncode == 0 else done.stdout.strip().splitlines()[-1][:300]


def runs_of(name: str) -> dict[str, list[str]]:
    """Every row of a model's table: name -> flags."""
    rows: dict[str, list[str]] = {}
    for group in GROUPS[name]:
        rows |= {k.format(G=group): [f.format(G=group) for f in v] for k, v in INT4.items()}
    top = GROUPS[name][0]
    return rows | {k.format(G=top): [f.format(G=top) for f in v] for k, v in OTHERS.items()}


def measure(
    name: str, checkpoints: Path, work: Path, *, python: str | None, only: list[str], extra: list[str]
) -> None:  # fmt: skip
    """All rows of one model, appended to the results as they come."""
    work.mkdir(parents=True, exist_ok=True)
    source = source_of(name, checkpoints, work)
    losses = work / f"{name}.losses"
    losses.mkdir(exist_ok=True)

    def note(row: str, path: Path, **more: object) -> None:
        file = losses / f"{row.replace('/', '_')}.npy"
        found = window_losses(path, checkpoints)
        np.save(file, found)
        base = np.load(losses / "source.npy")
        mean, low, high = interval(found - base)
        errors = output_errors(source, path, checkpoints) if row != "source" else []
        size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
        line = {"model": name, "row": row, "loss": float(found.mean()), "increase": mean, "low": low, "high": high,
                "output_rms": [round(e, 5) for e in errors], "bytes": size, **more}  # fmt: skip
        with open(work / "results.jsonl", "a", encoding="utf-8") as sink:
            sink.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    stats = work / f"{name}.stats.safetensors"
    if not (losses / "source.npy").exists():
        np.save(losses / "source.npy", window_losses(source, checkpoints))
        note("source", source)
    for row, flags in runs_of(name).items():
        if only and not any(word in row.split() or word == row for word in only):
            continue
        by_data = not {"gptq", "awq", "auto"}.isdisjoint(flags)
        more = [*data_flags(checkpoints), "--seq-len", str(WINDOW), *extra] if by_data else []
        if "mixed" in flags:
            if not stats.exists():
                moeconv("calibrate", str(source), str(stats), *data_flags(checkpoints), "--seq-len", str(WINDOW))
            more += ["--stats", str(stats)]
        row = row if extra[-1] == "0" or not by_data else f"{row} seed {extra[-1]}"
        out = work / f"{name} {row}"
        result = moeconv("quantize", str(source), str(out), *flags, *more, "--overwrite")
        note(row, out, cpu=round(result["cpu"], 1), weight_rms=result["quantize"]["error"]["relative_rms"]["mean"])
    for group in GROUPS[name] if python else ():
        for method in ("rtn", "gptq"):
            row = f"llm-compressor {method} g{group}"
            if only and not any(word in row for word in only):
                continue
            out, began = work / f"{name} {row}", time.monotonic()
            wrong = peer(str(python), source, out, group, method, texts(checkpoints, "calibration"))
            if wrong:
                print(json.dumps({"model": name, "row": row, "failed": wrong}), flush=True)
                continue
            note(row, out, seconds=round(time.monotonic() - began, 1))


def table(work: Path) -> None:
    """The results so far, a table a model; a tie is a difference whose paired interval holds zero."""
    rows = [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]
    last = {(r["model"], r["row"]): r for r in rows}
    for model in dict.fromkeys(r["model"] for r in rows):
        print(f"\n{model}: loss increase, 95 % interval, mean output RMS error, bytes")
        for (_, row), r in [(k, r) for k, r in last.items() if k[0] == model]:
            rms = f"{np.mean(r['output_rms']):.4f}" if r["output_rms"] else "-"
            print(f"{row:28} {r['increase']:+.5f}  [{r['low']:+.5f}, {r['high']:+.5f}]  {rms}  {r['bytes']}")


def compare(work: Path, model: str, one: str, other: str) -> None:
    """The paired interval of the difference of two rows."""
    folder = work / f"{model}.losses"
    mean, low, high = interval(np.load(folder / f"{one}.npy") - np.load(folder / f"{other}.npy"))
    verdict = "a tie" if low <= 0 <= high else ("better" if high < 0 else "worse")
    print(f"{model}: {one} against {other}: {mean:+.5f} [{low:+.5f}, {high:+.5f}], {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", choices=sorted(GROUPS), action="append")
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter that has llm-compressor")
    parser.add_argument(
        "--only", nargs="*", default=[], help="rows of these names, or whose name has one of these words"
    )
    parser.add_argument("--tokens", default="65536", help="calibration tokens of the methods that use data")
    parser.add_argument("--seed", default="0", help="of the calibration tokens; other seeds are rows of their own")
    parser.add_argument("--compare", nargs=3, metavar=("MODEL", "ROW", "ROW"), help="paired, of finished rows")
    given = parser.parse_args()
    if given.compare:
        compare(given.work, *given.compare)
        return
    for name in given.model or sorted(GROUPS):
        extra = ["--tokens", given.tokens, "--seed", given.seed]
        measure(name, given.checkpoints, given.work, python=given.peer, only=given.only, extra=extra)
    table(given.work)


if __name__ == "__main__":
    main()
