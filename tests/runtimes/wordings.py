"""The same config.json in the words of transformers 4, in those of transformers 5, and in both."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Config = dict[str, Any]
BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")  # transformers 4 has them beside rope_scaling


def old_words(config: Config) -> Config:
    """A config that transformers 5 saved, without the keys that transformers 4 does not know.

    Rotary parameters per type of layer have no old wording and stay.
    """
    result = {key: old_words(value) if key == "text_config" else value for key, value in config.items()}
    if "dtype" in result:
        result["torch_dtype"] = result.pop("dtype")
    params = result.get("rope_parameters")
    if isinstance(params, dict) and not any(isinstance(value, dict) for value in params.values()):
        del result["rope_parameters"]
        result |= {key: params[key] for key in BESIDE_SCALING if key in params}
        scaling = {key: value for key, value in params.items() if key not in BESIDE_SCALING}
        if scaling and scaling != {"rope_type": "default"}:
            result["rope_scaling"] = scaling
    words = {"linear_attention": "mamba", "full_attention": "attention"}
    if result.get("model_type") == "granitemoehybrid":
        result["layer_types"] = [words[word] for word in result["layer_types"]]
    return result


def merged(new: Config, old: Config) -> Config:
    """A config with the keys of both."""
    inner = {key: merged(value, old[key]) for key, value in new.items() if isinstance(value, dict) and key in old
             and key == "text_config"}  # fmt: skip
    return {**new, **old, **inner}


def reworded(source: Path, out: Path, config: Config) -> Path:
    """A checkpoint with the files of another one and this config."""
    out.mkdir()
    for file in source.iterdir():
        if file.name != "config.json":
            os.link(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config))
    return out
