"""Logits by mlx-lm: run_mlx.py < {"models": {name: path}, "ids": [[id]], "out": FILE}.

Runs in an environment of its own (environments.sh), on the CPU. Writes the logits of every model to FILE (safetensors,
float32) and prints {name: null or why it could not be run}. With "codes" {name: [file, tensor, mode, bits, group]} it
also writes what `mx.quantize` and `mx.dequantize` make of the tensors, as name/weight, name/scales, name/biases and
name/decoded.
"""

import json
import os
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model


def main() -> None:
    job = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)
    mx.set_default_device(mx.cpu)
    logits, found = {}, {}
    for name, path in job["models"].items():
        try:
            model, _ = load_model(Path(path), strict=True)
            logits[name] = model(mx.array(job["ids"])).astype(mx.float32)
            mx.eval(logits[name])
            found[name] = None
        except Exception as error:  # what a runtime refuses is a row of the table
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    for name, (file, tensor, mode, bits, group) in job.get("codes", {}).items():
        made = mx.quantize(mx.load(file)[tensor], group, bits, mode=mode)
        logits |= {f"{name}/{part}": value for part, value in zip(("weight", "scales", "biases"), made)}
        logits[f"{name}/decoded"] = mx.dequantize(*made, group_size=group, bits=bits, mode=mode)
    mx.save_safetensors(job["out"], logits)
    os.write(out, json.dumps(found).encode())


main()
