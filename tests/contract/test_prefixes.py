"""Names with one prefix of the base model less or more: taken exactly where transformers takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.stream.silence import transformers_silenced
from moeconv.stream.skeleton import auto_class
from tests.contract.stock import MOE_CASES, load, logits, save_stock

Rename = Callable[[str, str], str]
CHANGES: dict[str, Rename] = {
    "without": lambda name, base: name.removeprefix(base),
    "twice": lambda name, base: base + name,
}


@pytest.mark.parametrize(
    ("case", "base", "how"),
    [
        ("qwen3_moe", "model.", "without"),
        ("qwen3_moe", "model.", "twice"),
        ("dbrx", "transformer.", "without"),
        ("dbrx", "transformer.", "twice"),
        ("nemotron_h", "backbone.", "without"),
        ("nemotron_h", "backbone.", "twice"),
        ("llama4", "model.", "without"),
        ("gemma4-vision", "model.", "without"),
        ("qwen3_5_moe-vision", "model.", "twice"),
        ("aria", "language_model.", "without"),
    ],
)
def test_taken_where_transformers_takes_them(tmp_path: Path, case: str, base: str, how: str) -> None:
    kind, config = MOE_CASES[case]
    save_stock(tmp_path / "m", kind, config, dtype=torch.bfloat16)
    family, tensors = open_model(tmp_path / "m").family, {}
    for file in (tmp_path / "m").glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (tmp_path / "m" / "model.safetensors.index.json").unlink(missing_ok=True)
    named = {CHANGES[how](name, base): tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with transformers_silenced():
        _, info = auto_class(family).from_pretrained(tmp_path / "m", output_loading_info=True)
    theirs = not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    try:
        ours = set(open_model(tmp_path / "m").roles) == set(tensors)
    except InputError:
        ours = False
    assert ours or not theirs, "transformers takes what is refused here"
    assert theirs or not ours, "taken here, and transformers starts with random weights"


def test_the_language_model_of_a_wrapper_under_the_wrapper_s_names_is_read_as_transformers_reads_it(tmp_path, cli):
    """Pruned Qwen3.5 on the hub: config.json is that of the language model, the names are those of the whole."""
    source = save_stock(tmp_path / "moe", *MOE_CASES["qwen3_5_moe"], dtype=torch.float32)
    before = logits(load(source))
    files = sorted(source.glob("*.safetensors"))
    renamed = {n.replace("model.", "model.language_model.", 1): t for f in files for n, t in load_file(f).items()}
    for file in (*files, source / "model.safetensors.index.json"):
        file.unlink()
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(before, logits(load(source)))  # transformers reads both
    done = cli("prune", source, tmp_path / "out", "--keep", 6, "--json")
    assert done.code == 0, done.out
    assert any("model.language_model." in warning for warning in done.json["warnings"]), done.json["warnings"]
    assert logits(load(tmp_path / "out")).isfinite().all()
