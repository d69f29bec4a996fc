"""What an error of the gate, up and down projections costs in loss: types of GGUF by role, on a dense checkpoint.

    python benchmarks/roles.py MODEL --heldout FILE ...

The feed-forward weights are encoded in the types of each row of MIXES and decoded, and the increase of the loss on
held-out text is measured. The last line has the weights of the roles, relative to down, with which the squared errors
of the types explain the increases best (least squares of relative deviations).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeconv.plan.kernels.pack import ggml
from moeconv.quantize.gguf.types import BY_DTYPE

ROLES = ("gate_proj", "up_proj", "down_proj")
MIXES = (
    ("Q3_K", "Q3_K", "Q3_K"), ("Q2_K", "Q2_K", "Q4_K"), ("Q3_K", "Q2_K", "Q4_K"), ("Q4_K", "Q4_K", "Q4_K"),
    ("Q3_K", "Q3_K", "Q6_K"),
)  # fmt: skip
WINDOW, WINDOWS = 256, 10  # tokens, windows of each file


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean loss of each window."""
    found = []
    for some in windows.split(8):
        logits = model(input_ids=some).logits[:, :-1]
        found.append(nn.functional.cross_entropy(logits.transpose(1, 2), some[:, 1:], reduction="none").mean(1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--heldout", nargs="+", required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    texts = [tokenizer(Path(file).read_text())["input_ids"][: WINDOW * WINDOWS] for file in given.heldout]
    windows = torch.cat([torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW) for ids in texts])
    before = losses(model, windows)
    weights = {name: module.weight for name, module in model.named_modules() if name.endswith(ROLES)}
    kept = {name: weight.data.clone() for name, weight in weights.items()}
    rows, increases = [], []
    for mix in MIXES:
        types = dict(zip(ROLES, mix, strict=True))
        for name, weight in weights.items():
            kind, shape = types[name.rpartition(".")[2]], tuple(weight.shape)
            weight.data = torch.from_numpy(ggml.decode(ggml.encode(kept[name], kind), kind, shape)).float()
        more = losses(model, windows) - before
        rows.append([BY_DTYPE[kind].error ** 2 for kind in mix])
        increases.append(float(more.mean()))
        interval = 1.96 * float(more.std()) / len(more) ** 0.5
        print(f"gate {mix[0]}  up {mix[1]}  down {mix[2]}: {increases[-1]:+.4f} +- {interval:.4f}", flush=True)
    scaled = np.array(rows) / np.array(increases)[:, None]
    found, *_ = np.linalg.lstsq(scaled, np.ones(len(rows)), rcond=None)
    print("relative to down:  " + "  ".join(f"{role} {x / found[2]:.2f}" for role, x in zip(ROLES, found, strict=True)))


if __name__ == "__main__":
    main()
