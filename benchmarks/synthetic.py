"""Make a synthetic checkpoint of about a given size, in constant memory, for measuring speed and memory.

    python benchmarks/synthetic.py OUT --family llama|mixtral|qwen3_moe --gigabytes 2 [--shards 4] [--random|--sparse]

Weights are one random block repeated (or drawn anew with --random); quality cannot be measured on them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from moeconv.checkpoint.header import serialise_header, tensor_nbytes
from moeconv.checkpoint.reader import INDEX_NAME
from moeconv.checkpoint.writer import ShardWriter
from moeconv.families.registry import tables
from moeconv.families.spec import Family
from moeconv.plan.kernels.arrays import from_float

VOCAB, HEAD = 32000, 128


def sizes(family: Family, hidden: int, width: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Shape of a tensor by its key."""
    kv = max(1, hidden // HEAD // 4) * HEAD
    gate, down = (width, hidden), (hidden, width)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.tokens": (VOCAB, hidden), "embedding.lm_head": (VOCAB, hidden), "attention.q": (hidden, hidden),
        "attention.k": (kv, hidden), "attention.v": (kv, hidden), "attention.o": (hidden, hidden),
        "router.weight": (experts, hidden),
    }  # fmt: skip
    for group in ("ffn", "expert"):
        shapes |= {f"{group}.gate": gate, f"{group}.up": gate, f"{group}.down": down}
    shapes |= {key: (HEAD,) if "_norm" in key else (hidden,) for key in family.tensors.names if "norm" in key}
    return shapes


def make(
    out: Path, *, model_type: str, gigabytes: float, shards: int, random: bool, hidden: int = 2048, experts: int = 32,
    width: int | None = None, sparse: bool = False,
) -> None:  # fmt: skip
    """Write the checkpoint: experts of `width` (None: 3/8 of hidden; dense: 11/4), as many layers as the size asks for.

    `sparse` leaves holes, which read as zeros, where the weights would be."""
    family = tables().families[model_type]
    moe = family.kind == "moe"
    width, experts = (width or hidden * 3 // 8, experts) if moe else (hidden * 11 // 4, 0)
    shapes = sizes(family, hidden, width, experts)
    groups = {"embedding", "norm", "attention"} | ({"expert", "router"} if moe else {"ffn"})
    names = {k: n for k, n in family.tensors.names.items() if k in shapes and k.partition(".")[0] in groups}
    nbytes = {k: math.prod(shapes[k]) * 2 * (experts if "{E}" in names[k] else 1) for k in names}
    per_layer = sum(n for k, n in nbytes.items() if "{L}" in names[k])
    fixed = sum(nbytes.values()) - per_layer
    layers = max(1, round((gigabytes * 1e9 - fixed) / per_layer))
    expanded = family.expand(layers=layers, experts=experts)
    tensors = [(name, "BF16", shapes[role.key]) for name, role in expanded if role.key in names]
    tensors.sort(key=lambda entry: [int(w) if w.isdigit() else -1 for w in entry[0].split(".")])
    out.mkdir(parents=True)
    generator = np.random.Generator(np.random.Philox(0))
    block = bytes(from_float(generator.standard_normal(1 << 22, np.float32) * np.float32(0.02), "BF16"))
    weight_map, total = {}, sum(tensor_nbytes(d, s) for _, d, s in tensors)
    step = -(-len(tensors) // shards)
    for i in range(shards):
        part = tensors[i * step : (i + 1) * step]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        weight_map |= {name: file for name, _, _ in part}
        if sparse:
            header, infos = serialise_header(part)
            with open(out / file, "wb") as hole:
                hole.write(header)
                hole.truncate(max(info.end for info in infos.values()))
            continue
        writer = ShardWriter(out / file, part)
        for name, dtype, shape in part:
            for start in range(0, tensor_nbytes(dtype, shape), len(block)):
                size = min(len(block), tensor_nbytes(dtype, shape) - start)
                if random:
                    block = bytes(from_float(generator.standard_normal(1 << 22, np.float32) * np.float32(0.02), "BF16"))
                writer.write(name, memoryview(block)[:size], start=start)
        writer.finish()
    if shards > 1:
        (out / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    config = {
        "model_type": family.model_type, "architectures": [family.architecture], "vocab_size": VOCAB,
        "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD, "num_key_value_heads": max(1, hidden // HEAD // 4), "head_dim": HEAD,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "max_position_embeddings": 4096, "dtype": "bfloat16", "sliding_window": None,
    }  # fmt: skip
    if moe:
        config |= dict.fromkeys(family.experts.count, experts) | dict.fromkeys(family.experts.top_k, 8)
        config |= {family.experts.width: width, "norm_topk_prob": True}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    print(f"{out}: {model_type}, {layers} layers, {len(tensors)} tensors, {total / 1e9:.2f} GB in {shards} shards")


def dense_size(gigabytes: float, hidden: int, experts: int = 8) -> float:
    """The size of a llama whose mixtral of that many experts takes `gigabytes`: FFN eight times, the rest once."""
    width = hidden * 11 // 4
    embeddings = 2 * VOCAB * hidden * 2
    ffn = 3 * hidden * width * 2
    kv = max(1, hidden // HEAD // 4) * HEAD
    attention = 2 * (2 * hidden * hidden + 2 * kv * hidden)
    layers = max(1, round((gigabytes * 1e9 - embeddings) / (experts * ffn + attention)))
    return (embeddings + layers * (ffn + attention)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", default="llama", choices=sorted(tables().families))
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--random", action="store_true", help="draw every weight anew (slower to make)")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no room on the disk")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=32)
    a = parser.parse_args()
    make(
        a.out, model_type=a.family, gigabytes=a.gigabytes, shards=a.shards, random=a.random, hidden=a.hidden,
        experts=a.experts, sparse=a.sparse,
    )  # fmt: skip


if __name__ == "__main__":
    main()
