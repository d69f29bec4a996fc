"""Quality of the GGUF formats on a small trained MoE: loss increase on held-out text, with and without importance.

    python benchmarks/gguf_quality.py MODEL WORK --calibration FILE ... --heldout FILE ... [--only NAME ...]

MODEL is a qwen3_moe or mixtral checkpoint in safetensors. Every file is decoded by the `gguf` package into a copy of
the checkpoint in float32, which transformers evaluates. The interval is 95 % of a bootstrap over windows of 256 tokens,
paired with those of the unquantized model. The importance is measured on --calibration.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

SCHEMES = ("q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "q2_k", "q4_k_m", "q3_k_m", "q2_k --scope all")
DRAWS = 2000


def moeconv(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "moeconv", *map(str, words), "-q"], check=True, stderr=subprocess.DEVNULL)


def decoded(source: Path, file: Path, out: Path) -> None:
    """The checkpoint `source` in float32 with the weights of a GGUF file."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    from moeconv.families.model import open_model
    from moeconv.plan.flow import make
    from moeconv.plan.kernels.arrays import to_float32
    from moeconv.quantize.gguf.llama_cpp import find_row, written

    model = open_model(source)
    row = find_row(model)
    tensors = {t.name: t for t in GGUFReader(file).tensors}
    values = {}
    for name, role in model.roles.items():
        ref = model.checkpoint.tensors[name]
        (made,) = written(model, row, ref, role)
        tensor = tensors[made.target]
        found = dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        found = found if role.expert is None else found[role.expert]
        if made.part.tree is not None:  # rearranged: the place of each value is found by sending its number through
            item = made.item("F32", "")
            item = replace(item, inputs=(item.inputs[0]._replace(dtype="F32", nbytes=4 * found.size),))
            (data,) = make(item, {"source": _Numbers(np.arange(found.size, dtype=np.float32))})
            place = to_float32(data, "F32", found.shape).astype(np.int64)
            back = np.empty(found.size, np.float32)
            back[place.ravel()] = found.ravel()
            found = back.reshape(ref.shape)
        values[name] = np.ascontiguousarray(found.reshape(ref.shape), np.float32)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".json" and "index" not in path.name and "manifest" not in path.name:
            shutil.copy(path, out)
    config = json.loads((out / "config.json").read_text()) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    save_file(values, out / "model.safetensors", metadata={"format": "pt"})


def losses(model: Path, texts: list[str]) -> np.ndarray:
    """The mean loss of every window of 256 tokens, in nats per token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for text in texts:
        ids = torch.tensor(tokenizer(Path(text).read_text())["input_ids"][: 256 * 24])
        for window in ids[: len(ids) // 256 * 256].view(-1, 256).split(8):
            with torch.no_grad():
                logits = network(input_ids=window).logits[:, :-1].float()
            lost = torch.nn.functional.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")
            found.append(lost.mean(1))
    return torch.cat(found).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--heldout", nargs="+", required=True)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    matrix = given.work / "imatrix.gguf"
    if not matrix.exists():
        data = [word for text in given.calibration for word in ("--data", text)]
        moeconv("calibrate", given.model, "--imatrix", matrix, *data, "--seq-len", 256)
    before = losses(given.model, given.heldout)
    print(f"unquantized: {before.mean():.4f} on {len(before)} windows", flush=True)
    draws = np.random.default_rng(0).integers(0, len(before), (DRAWS, len(before)))
    for scheme in given.only or SCHEMES:
        for words in ([], ["--imatrix", matrix]):
            out = given.work / "out"
            moeconv(
                "quantize", given.model, out, "--format", "gguf", "--scheme", *scheme.split(), *words, "--overwrite"
            )
            file = next(out.glob("*.gguf"))
            decoded(given.model, file, given.work / "decoded")
            more = losses(given.work / "decoded", given.heldout) - before
            low, high = np.percentile(more[draws].mean(1), (2.5, 97.5))
            name = f"{scheme}{' with importance' if words else ''}"
            row = {
                "scheme": name,
                "bytes": file.stat().st_size,
                "increase": float(more.mean()),
                "low": low,
                "high": high,
            }
            print(
                f"{name:34} {file.stat().st_size / 1e6:7.2f} MB  {more.mean():+.4f} [{low:+.4f}, {high:+.4f}]",
                flush=True,
            )
            with open(given.work / "results.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")


class _Numbers:
    """A source of bytes with one tensor, in which every value is its own number."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.data = memoryview(numbers).cast("B")

    def read_into(self, _name: str, view: memoryview, *, start: int = 0) -> None:
        view[:] = self.data[start : start + len(view)]


if __name__ == "__main__":
    main()
