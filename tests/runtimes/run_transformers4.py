"""Logits by transformers 4: run_transformers4.py < {"models": {name: path}, "ids": [[id]], "out": FILE}.

Runs in an environment of its own (environments.sh). Writes the logits of every model to FILE (safetensors, float32) and
prints {name: null or why it could not be run}; {"known": [model_type]} for {"models": {}}.
"""

import json
import os
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def main() -> None:
    job = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logits, found = {}, {}
    for name, path in job["models"].items():
        try:
            config = AutoConfig.from_pretrained(path)
            auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
            model, info = auto.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            wrong = {key: sorted(value)[:2] for key, value in info.items() if value and key != "error_msgs"}
            with torch.no_grad():
                logits[name] = model.eval()(torch.tensor(job["ids"])).logits.float().contiguous()
            found[name] = f"not loaded strictly: {wrong}" if wrong else None
        except Exception as error:  # what a runtime refuses is a row of the table
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if job["models"]:
        save_file(logits, job["out"])
    else:
        found = {"known": sorted(CONFIG_MAPPING)}
    os.write(out, json.dumps(found).encode())


main()
