"""Logits and configs by transformers 4: run_transformers4.py < {"models": {name: path}, "ids": [[id]], "out": FILE}.

Runs in an environment of its own (environments.sh). Writes the logits of every model to FILE (safetensors, float32) and
prints {name: null or why it could not be run}. With {"save": {name: config}} it prints {name: the config.json that
transformers 4 saves for that config}, and with {} what is there, {"known": [model_type], "packages": [name]}.
"""

import json
import os
import sys
from importlib.util import find_spec

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def run(path: str, ids: list[list[int]]) -> tuple[torch.Tensor, str | None]:
    """(logits of a model, what was missing or left over when it was loaded)."""
    config = AutoConfig.from_pretrained(path)
    auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    packed = getattr(config, "quantization_config", None) or {}
    model, info = auto.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True,
        **({"device_map": "cpu"} if packed else {}),
    )  # fmt: skip
    wrong = {key: sorted(value)[:2] for key, value in info.items() if value and key != "error_msgs"}
    if packed.get("quant_method") == "bitsandbytes":  # its own kernels round activations, and want wider matrices
        model = model.dequantize().float()
    with torch.no_grad():
        logits = model.eval()(torch.tensor(ids)).logits.float().contiguous()
    return logits, f"not loaded strictly: {wrong}" if wrong else None


def saved(config: dict) -> dict:
    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    except (ValueError, AttributeError, KeyError):  # nested keys or a language model that its class refuses
        return config
    return json.loads(made.to_json_string(use_diff=True))


def attempt(do, *arguments):
    try:
        return do(*arguments)
    except Exception as error:  # what a runtime refuses is a row of the table
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> None:
    job = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if "save" in job:
        found = {name: saved(config) for name, config in job["save"].items()}
    elif "models" in job:
        answers = {name: attempt(run, path, job["ids"]) for name, path in job["models"].items()}
        save_file({name: logits for name, (logits, _) in answers.items() if logits is not None}, job["out"])
        found = {name: wrong for name, (_, wrong) in answers.items()}
    else:
        packages = [name for name in ("bitsandbytes", "compressed_tensors") if find_spec(name)]
        found = {"known": sorted(CONFIG_MAPPING), "packages": packages}
    os.write(out, json.dumps(found).encode())


main()
