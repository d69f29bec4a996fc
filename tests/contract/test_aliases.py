"""Contract: checkpoints that state a model_type whose class is a copy of another family's, and names of exports."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.stream.layers import LayerStream
from tests.contract.stock import (
    MOE_CASES,
    dropped,
    load,
    logits,
    name_as_on_the_hub,
    relative_difference,
    row_of,
    save_stock,
)
from tests.tiny import edit_json

pytestmark = pytest.mark.usefixtures("one_thread")
CODE = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model"}


def _kimi_k2(path):
    """A checkpoint as Moonshot publishes them, and the same with the model_type that transformers knows."""
    stock, kimi = (
        save_stock(path / name, *MOE_CASES["deepseek_v3"], dtype=torch.float32) for name in ("stock", "kimi")
    )
    edit_json(kimi / "config.json", model_type="kimi_k2", auto_map=CODE)
    return kimi, stock


@pytest.mark.parametrize("keep", [6, 4])
def test_an_alias_is_pruned_to_a_model_that_transformers_loads(tmp_path, cli, keep):
    source, stock = _kimi_k2(tmp_path)
    done = cli("prune", source, tmp_path / "out", "--keep", keep, "--json")
    assert done.code == 0, done.out
    assert any("kimi_k2 is deepseek_v3 in transformers" in warning for warning in done.json["warnings"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and "auto_map" not in config
    model = load(stock)
    with dropped(model, open_model(stock), done.json["prune"]["keep"]):
        masked = logits(model)
    assert relative_difference(masked, logits(load(tmp_path / "out"))) <= 1e-5


def test_an_alias_is_streamed_and_quantized(tmp_path, cli):
    source, stock = _kimi_k2(tmp_path)
    ids = np.random.default_rng(0).integers(3, 128, (2, 12))
    streamed = torch.cat([out for _, out in LayerStream(open_model(source), ids).run().logits()])
    with torch.no_grad():
        expected = load(stock)(torch.tensor(ids)).logits
    assert (streamed - expected).abs().max() <= 1e-5 * float(expected.std())
    done = cli("quantize", source, tmp_path / "packed", "--json")
    assert done.code == 0, done.out
    load(tmp_path / "packed", dtype=torch.bfloat16)
    assert cli("verify", tmp_path / "packed", "--source", source, "--json").code == 0


@pytest.mark.parametrize(
    ("case", "alias", "usual"),
    [("kimi_k25", "kimi_k2", "deepseek_v3"), ("glm4v_moe", "Glm4vMoe_text", "glm4v_moe_text")],  # as version 4 saves it
)
def test_an_alias_inside_a_wrapper_is_replaced_there(tmp_path, cli, case, alias, usual):
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    text = json.loads((source / "config.json").read_text())["text_config"]
    edit_json(source / "config.json", text_config=text | {"model_type": alias})
    assert cli("prune", source, tmp_path / "out", "--keep", 4, "--json").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["model_type"]) == (case, usual)
    assert logits(load(tmp_path / "out")).isfinite().all()


def test_names_that_only_save_pretrained_writes_are_read(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *MOE_CASES["kimi_k25"], dtype=torch.float32)
    before, usual = logits(load(source)), set(open_model(source).roles)
    name_as_on_the_hub(source, {hub: own for own, hub in row_of("kimi_k25").tensors.variants.items()})
    assert torch.equal(before, logits(load(source)))  # transformers reads both
    model = open_model(source)
    assert set(model.roles) == usual and any(".blocks.0." in warning for warning in model.warnings)
    assert cli("prune", source, tmp_path / "out", "--keep", 6, "--json").code == 0
    assert open_model(tmp_path / "out").roles.keys() <= usual and logits(load(tmp_path / "out")).isfinite().all()


def test_no_alias_has_a_class_of_its_own_in_transformers():
    from transformers import CONFIG_MAPPING

    assert not [alias for alias in tables().aliases if alias in CONFIG_MAPPING]
    assert all(name in CONFIG_MAPPING for name in tables().aliases.values())
