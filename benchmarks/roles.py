"""What a relative error of each projection of a feed-forward block adds to the relative error of the block's output.

    python benchmarks/roles.py MODEL [MODEL ...] --text FILE

MODEL is a dense checkpoint, or one whose class stacks gate and up as `gate_up_proj`. Noise with a tenth of the RMS of
each 32 columns, which is how errors of block formats lie, is added to one projection at a time. A row has the squared
relative error of the output for each, in units of the noise's, and the last row the geometric means relative to down.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

NOISE, DRAWS, TOKENS, LENGTH = 0.1, 3, 2048, 256


def parts(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(role, view of the weight)."""
    for name, weight in block.named_parameters():
        if "gate_up_proj" in name:
            half = weight.shape[1] // 2
            yield "gate", weight.data[:, :half]
            yield "up", weight.data[:, half:]
        elif "_proj" in name:
            yield name.split("_proj")[0].rpartition(".")[2], weight.data


def output(block: nn.Module, hidden: Tensor) -> Tensor:
    found = block(hidden)
    return found[0] if isinstance(found, tuple) else found


@torch.no_grad()
def rows(path: str, text: str) -> Iterator[dict[str, float]]:
    """For each layer the sensitivity of each role."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(Path(text).read_text()[: 20 * TOKENS])["input_ids"][:TOKENS]).view(-1, LENGTH)
    blocks = [layer.mlp for layer in model.model.layers]
    inputs: dict[int, Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, given, at=at: inputs.__setitem__(at, given[0]))
        for at, block in enumerate(blocks)
    ]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    for at, block in enumerate(blocks):
        want = output(block, inputs[at])
        found = {}
        for role, weight in parts(block):
            kept, errors = weight.clone(), []
            for _ in range(DRAWS):
                groups = kept.reshape(*kept.shape[:-1], -1, 32)
                noise = torch.randn_like(groups) * groups.square().mean(-1, keepdim=True).sqrt() * NOISE
                weight.copy_((groups + noise).view_as(weight))
                errors.append(float((output(block, inputs[at]) - want).square().sum() / want.square().sum()))
            weight.copy_(kept)
            found[role] = float(np.mean(errors)) / NOISE**2
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    every: list[dict[str, float]] = []
    for path in given.models:
        for at, row in enumerate(rows(path, given.text)):
            every.append(row)
            print(f"{Path(path).name} layer {at}: " + "  ".join(f"{r} {row[r]:.3f}" for r in ("gate", "up", "down")))
    ratios = {role: np.exp(np.mean([np.log(row[role] / row["down"]) for row in every])) for role in ("gate", "up")}
    print("relative to down: " + "  ".join(f"{role} {ratio:.2f}" for role, ratio in ratios.items()))


if __name__ == "__main__":
    main()
