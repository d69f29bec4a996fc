"""Memory of the commands that run a model, at real width: peak of the whole process against a layer and the estimate.

    python benchmarks/memory.py WORK [--width 2048] [--inner 768] [--experts 128] [--layers 2] [--tokens 2048]
                                     [--only NAME ...] [--stored FORM ...]
    python benchmarks/memory.py WORK --width 512        # some minutes

Layers as wide as Qwen3-30B's (hidden 2048, experts of 3/8 of that) with random weights, in bfloat16, in FP8 with a
scale for 128 x 128 weights, and in MXFP4 (compressed-tensors). Every command is a process of its own; `estimate` is
what its dry run says. Peak memory is the kernel's figure for the process (ru_maxrss).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY, HEAD, TOP_K = 32000, 128, 8
FORMS = ("bf16", "fp8", "mxfp4")
# what a command is given behind the model: OUT and TEXT are replaced
COMMANDS: dict[str, list[str]] = {
    "calibrate": ["calibrate", "MODEL", "OUT", "--data", "TEXT"],
    "evaluate": ["evaluate", "MODEL", "--data", "TEXT"],
    "tune": ["tune", "MODEL", "OUT", "--data", "TEXT", "--teacher", "MODEL", "--steps", "2"],
    "tune experts": [
        "tune", "MODEL", "OUT", "--data", "TEXT", "--teacher", "MODEL", "--steps", "2", "--train", "router,experts",
    ],
    "gptq int4": ["quantize", "MODEL", "OUT", "--method", "gptq", "--scheme", "int4", "--data", "TEXT"],
    "gptq int8": ["quantize", "MODEL", "OUT", "--method", "gptq", "--scheme", "int8", "--data", "TEXT"],
    "gptq nf4": [
        "quantize", "MODEL", "OUT", "--method", "gptq", "--format", "bitsandbytes", "--scheme", "nf4", "--data", "TEXT",
    ],
    "refit": ["prune", "MODEL", "OUT", "--ratio", "0.5", "--criterion", "aimer", "--refit", "--data", "TEXT"],
}  # fmt: skip


def heads_of(width: int) -> tuple[int, int]:
    """(attention heads, heads of keys and values: about a quarter)."""
    heads = max(1, width // HEAD)
    return heads, next(n for n in range(max(1, heads // 4), 0, -1) if heads % n == 0)


def write_model(path: Path, form: str, *, width: int, inner: int, experts: int, layers: int) -> None:
    """A Qwen3-MoE of random weights, one layer's tensors in memory at a time. Runs in a process of its own."""
    import numpy as np
    from quantize_speed import add_tokenizer

    from moeconv.checkpoint.header import tensor_nbytes
    from moeconv.checkpoint.writer import ShardWriter
    from moeconv.plan.kernels.arrays import from_float

    heads, kv = heads_of(width)
    heads, kv = heads * HEAD, kv * HEAD
    draw = np.random.Generator(np.random.SFC64(0))
    tensors: list[tuple[str, str, tuple[int, ...]]] = []

    def plain(name: str, *shape: int) -> None:
        tensors.append((f"{name}.weight", "BF16", shape))

    def matrix(name: str, rows: int, columns: int) -> None:
        if form == "bf16":
            plain(name, rows, columns)
        elif form == "fp8":
            tensors.append((f"{name}.weight", "F8_E4M3", (rows, columns)))
            tensors.append((f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))))
        else:
            tensors.append((f"{name}.weight_packed", "U8", (rows, columns // 2)))
            tensors.append((f"{name}.weight_scale", "U8", (rows, columns // 32)))

    plain("model.embed_tokens", VOCABULARY, width)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            plain(f"{at}.self_attn.{name}_proj", rows, width)
        plain(f"{at}.self_attn.o_proj", width, heads)
        for name, size in (("self_attn.q_norm", HEAD), ("self_attn.k_norm", HEAD), ("input_layernorm", width),
                           ("post_attention_layernorm", width)):  # fmt: skip
            plain(f"{at}.{name}", size)
        plain(f"{at}.mlp.gate", experts, width)
        for expert in range(experts):
            for name, rows, columns in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
                matrix(f"{at}.mlp.experts.{expert}.{name}_proj", rows, columns)
    plain("model.norm", width)
    plain("lm_head", VOCABULARY, width)

    path.mkdir(parents=True)
    writer = ShardWriter(path / "model.safetensors", tensors)
    for name, dtype, shape in tensors:
        count = tensor_nbytes(dtype, shape)
        if "norm" in name:
            data = from_float(np.ones(shape, np.float32), dtype)
        elif dtype == "BF16":
            data = from_float(draw.standard_normal(shape, np.float32) * np.float32(0.02), dtype)
        elif dtype == "F8_E4M3":  # every code but NaN
            data = (draw.integers(0, 127, count, np.uint8) | draw.integers(0, 2, count, np.uint8) << 7).data
        elif name.endswith("_packed"):
            data = draw.integers(0, 256, count, np.uint8).data
        elif dtype == "F32":
            data = draw.uniform(1e-4, 2e-4, shape).astype(np.float32).data
        else:
            data = draw.integers(119, 122, count, np.uint8).data
        writer.write(name, memoryview(bytes(data)))
    writer.finish()
    config: dict[str, Any] = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": VOCABULARY,
        "hidden_size": width, "intermediate_size": 3 * width, "moe_intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads // HEAD, "num_key_value_heads": kv // HEAD,
        "head_dim": HEAD, "num_experts": experts, "num_experts_per_tok": TOP_K, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 4096, "dtype": "bfloat16",
    }  # fmt: skip
    if form == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
        }  # fmt: skip
    elif form == "mxfp4":
        weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
        }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    add_tokenizer(path)


@dataclass(frozen=True)
class Ran:
    """A process: what it printed, its peak memory in bytes, processor and wall seconds."""

    out: str
    peak: int
    cpu: float
    wall: float


def run(words: list[str], *, fails: bool = False) -> Ran:
    """A whole process. Ends this one where it fails, unless it may."""
    began = time.monotonic()
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    out, said = child.stdout.read(), child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status and not fails:
        raise SystemExit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}\n{out}{said[-2000:]}")
    return Ran(out, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, time.monotonic() - began)


def layer_bytes(path: Path) -> int:
    """Bytes of a decoder layer on the disk, from the header."""
    with open(path / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = [entry["data_offsets"] for name, entry in header.items() if name.startswith("model.layers.0.")]
    return sum(end - start for start, end in spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, help="of an expert; 3/8 of the width where it is not given")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", nargs="*", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--stored", nargs="*", choices=FORMS, default=list(FORMS))
    parser.add_argument("--write", choices=FORMS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    inner = a.inner or a.width * 3 // 8
    folder = {form: a.work / f"{form}-{a.width}-{inner}-{a.experts}-{a.layers}" for form in FORMS}
    if a.write:
        return write_model(folder[a.write], a.write, width=a.width, inner=inner, experts=a.experts, layers=a.layers)
    a.work.mkdir(parents=True, exist_ok=True)
    text, out = a.work / "text", a.work / "out"
    text.write_text("".join(f"{i} squared is {i * i}; " for i in range(a.tokens)))
    title = f"{a.layers} layers of {a.experts} experts of {inner}, hidden {a.width}, {a.tokens} tokens"
    print(f"{title}\n{'':6} {'':13} {'layer':>8} {'peak':>8} {'ratio':>6} {'estimate':>8} {'off':>6} {'CPU s':>6}")
    for form in a.stored:
        if not folder[form].exists():
            run([sys.executable, __file__, *map(str, sys.argv[1:]), "--write", form])
        layer = layer_bytes(folder[form])
        for name in a.only:
            swap = {"MODEL": str(folder[form]), "OUT": str(out), "TEXT": str(text)}
            words = [sys.executable, "-m", "moeconv", *(swap.get(word, word) for word in COMMANDS[name])]
            words += ["--tokens", str(a.tokens), "--json"]
            planned = json.loads(run([*words, "--dry-run"], fails=True).out)
            if "error" in planned:
                print(f"{form:6} {name:13} not taken: {planned['error']['message']}", flush=True)
                continue
            told = planned["memory"]["peak_bytes"]
            done = run(words, fails=True)
            if '"error"' in done.out[:20]:
                print(f"{form:6} {name:13} not taken: {json.loads(done.out)['error']['message']}", flush=True)
                continue
            subprocess.run(["rm", "-rf", str(out)], check=True)
            print(
                f"{form:6} {name:13} {layer / 1e6:>5.0f} MB {done.peak / 1e6:>5.0f} MB {done.peak / layer:>6.2f}"
                f" {told / 1e6:>5.0f} MB {told / done.peak - 1:>+6.0%} {done.cpu:>6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
