"""Contract: config.json of published models, whose words differ from those that save_pretrained writes."""

from __future__ import annotations

import json

import pytest
import torch

from moeconv.families.model import open_model
from tests.contract.stock import MOE_CASES, load, logits, save_stock
from tests.tiny import edit_json

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")
PUBLISHED = {
    "full_attn_layers": [2], "kda_layers": [1, 3], "head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4,
}  # fmt: skip


def test_kimi_linear_in_moonshots_words_is_the_same_model(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *MOE_CASES["kimi_linear"], dtype=torch.float32)
    expected, kinds = logits(load(source)), open_model(source).layer_kinds
    edit_json(source / "config.json", drop=OWN, linear_attn_config=PUBLISHED, first_k_dense_replace=1)
    model = open_model(source)
    assert model.layer_kinds == kinds and model.moe_layers == (1, 2)
    assert torch.equal(logits(load(source)), expected)
    assert cli("prune", source, tmp_path / "out", "--keep", 4, "--json").code == 0
    assert logits(load(tmp_path / "out")).isfinite().all()


def test_kimi_linear_gets_the_words_that_other_readers_need(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *MOE_CASES["kimi_linear"], dtype=torch.float32)
    assert cli("prune", source, tmp_path / "out", "--keep", 4, "--json").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["linear_attn_config"] == PUBLISHED and config["num_experts"] == 4
    assert config["moe_router_activation_func"] == "sigmoid" and config["first_k_dense_replace"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"full_attn_layers": 2}, {"full_attn_layers": [2, 9]}, {"kda_layers": [1]}, {"head_dim": "8"},
        {"num_heads": None},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_linear_layers_are_refused(tmp_path, cli, wrong):
    source = save_stock(tmp_path / "moe", *MOE_CASES["kimi_linear"], dtype=torch.float32)
    edit_json(source / "config.json", drop=OWN, linear_attn_config=PUBLISHED | wrong)
    refused = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert refused.code == 3, refused.out


@pytest.mark.parametrize(
    "wrong", [{"indexer_types": [1, 2, 3]}, {"index_topk_pattern": 5}, {"index_topk_pattern": "FX"}]
)
def test_wrong_indexers_are_refused(tmp_path, cli, wrong):
    source = save_stock(tmp_path / "moe", *MOE_CASES["glm_moe_dsa"], dtype=torch.float32)
    edit_json(source / "config.json", **{"indexer_types": None} | wrong)
    refused = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert refused.code == 3 and "indexer_types" in refused.json["error"]["message"], refused.out
