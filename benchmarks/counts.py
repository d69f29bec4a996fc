"""Quantize at the real numbers of layers and experts of published models, with thin matrices: peak memory, estimate.

    python benchmarks/counts.py WORK CONFIG.json [CONFIG.json ...] [--method gptq rtn] [--schemes nf4 int4 ...]

CONFIG.json is the config of a published model (Trinity-Nano, Kimi-K2). Its class of transformers is made with random
weights: layers, experts and routing as published, and every width 64 or less. Each model is quantized, opened by
`inspect` and verified; every command is a process of its own. Only gptq estimates its peak beforehand. Peak memory is
the kernel's figure (ru_maxrss).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from memory import run
from quantize_speed import add_tokenizer

WIDTH = 64
THIN = {
    "hidden_size": WIDTH, "moe_intermediate_size": WIDTH, "intermediate_size": 2 * WIDTH, "vocab_size": 256,
    "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
SCHEMES: dict[str, list[str]] = {
    "nf4": ["--format", "bitsandbytes", "--scheme", "nf4"],
    "int4": ["--scheme", "int4", "--group-size", "32"],
    "int8": ["--scheme", "int8", "--group-size", "32"],
    "fp4": ["--format", "bitsandbytes", "--scheme", "fp4"],
    "nf4-double": ["--format", "bitsandbytes", "--scheme", "nf4", "--double-quant"],
    "int8-bitsandbytes": ["--format", "bitsandbytes", "--scheme", "int8"],
}
METHODS = ("gptq", "rtn")
CLASSES = {"kimi_k2": "deepseek_v3"}  # code on the hub -> the class of transformers that it is a copy of


def thin(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The config with small widths."""
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    small = plain | {key: value for key, value in THIN.items() if key in plain}
    if small.get("head_dim") == 0 or "kv_lora_rank" in small:
        small.pop("head_dim", None)
    if layers is not None:
        small["num_hidden_layers"] = layers
        if "layer_types" in small:
            small["layer_types"] = small["layer_types"][:layers]
    return small | {"num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in small else small


def write_model(source: Path, path: Path, layers: int | None) -> None:
    """The thin model with random weights in bfloat16, its tokenizer, and the config's own model_type."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = thin(json.loads(source.read_text()), layers)
    model_type = config.pop("model_type")
    torch.manual_seed(0)
    made = AutoConfig.for_model(CLASSES.get(model_type, model_type), **config)
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | {"model_type": model_type}))
    add_tokenizer(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG.json")
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--method", nargs="*", choices=METHODS, default=["gptq"])
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.write:
        return write_model(a.configs[0], a.write, a.layers)
    a.work.mkdir(parents=True, exist_ok=True)
    text, out = a.work / "text", a.work / "out"
    text.write_text("".join(f"{i} squared is {i * i}; " for i in range(a.tokens)))
    print(
        f"{'':39} {'tensors':>8} {'files':>5} {'size':>10} {'peak':>8} {'estimate':>8} {'off':>6} {'CPU s':>6}  verify"
    )
    for config in a.configs:
        name = config.stem if config.stem != "config" else config.parent.name
        model = a.work / f"{name}-{a.layers or 'all'}"
        if not model.exists():
            run([sys.executable, __file__, str(a.work), str(config), "--write", str(model), *layers_of(a)])
        for method in a.method:
            for scheme in a.schemes:
                shutil.rmtree(out, ignore_errors=True)
                words = [
                    sys.executable,
                    "-m",
                    "moeconv",
                    "quantize",
                    str(model),
                    str(out),
                    "--method",
                    method,
                    "--json",
                ]
                words += SCHEMES[scheme]
                if method == "gptq":
                    words += ["--data", str(text), "--tokens", str(a.tokens)]
                print(f"{name:16} {method:4} {scheme:17} {row(words, out)}", flush=True)
    shutil.rmtree(out, ignore_errors=True)


def row(words: list[str], out: Path) -> str:
    """What one command did, or why its dry run refuses it. Ends this process where the run or `inspect` fails."""
    planned = json.loads(run([*words, "--dry-run"], fails=True).out)
    if "error" in planned:
        return str(planned["error"]["message"])
    told = planned.get("memory", {}).get("peak_bytes")
    done = run(words)
    found = json.loads(done.out)
    opened = json.loads(run([sys.executable, "-m", "moeconv", "inspect", str(out), "--json"]).out)
    verified = json.loads(run([sys.executable, "-m", "moeconv", "verify", str(out), "--json"], fails=True).out)
    estimate = f"{told / 1e6:>5.0f} MB {told / done.peak - 1:>+6.0%}" if told else f"{'-':>8} {'':6}"
    return (
        f"{found['tensors']:>8} {found['shards']:>5} {opened['bytes'] / 1e6:>7.0f} MB"
        f" {done.peak / 1e6:>5.0f} MB {estimate} {done.cpu:>6.0f}"
        f"  {verified.get('error', {}).get('message', 'passed')}"
    )


def layers_of(a: argparse.Namespace) -> list[str]:
    """--layers, as it was given."""
    return [] if a.layers is None else ["--layers", str(a.layers)]


if __name__ == "__main__":
    main()
