"""Contract: sparse attention whose layers share the tokens that an indexer chose."""

from __future__ import annotations

import pytest
import torch
from words import add_tokenizer, text

from moeconv.families.model import open_model
from tests.contract.stock import MOE_CASES, dropped, load, logits, relative_difference, save_stock
from tests.tiny import edit_json

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = MOE_CASES["glm_moe_dsa"][1] | {"indexer_types": ["full", "shared", "full"]}


# layer 1 reads the keys of layer 0, and layer 2 its own keys at the tokens that layer 1 chose
BORROWED = MOE_CASES["mistral_large4"][1] | {
    "text_config": MOE_CASES["mistral_large4"][1]["text_config"]
    | {"indexer_types": ["full", "full", "shared"], "kv_source_layers": [0, 0, 2], "no_rope_layers": [1, 1, 0]}
}


@pytest.mark.parametrize("stated", ["indexer_types", "index_topk_pattern", "index_topk_freq"])
def test_layers_without_an_indexer_of_their_own_are_those_of_the_class(tmp_path, stated):
    config = {k: v for k, v in SHARED.items() if k != "indexer_types"} | {"num_hidden_layers": 4}
    config |= {
        "indexer_types": {"indexer_types": ["full", "shared", "shared", "full"]},
        "index_topk_pattern": {"index_topk_pattern": "FSSF"},
        "index_topk_freq": {"index_topk_freq": 2, "index_skip_topk_offset": 1},
    }[stated]
    model = open_model(save_stock(tmp_path / "moe", "glm_moe_dsa", config, dtype=torch.float32))
    there = {role.layer for role in model.roles.values() if role.group == "indexer"}
    assert there == {i for i, kind in enumerate(model.layer_kinds) if kind == "indexed_attention"}
    assert there == ({0, 2} if stated == "index_topk_freq" else {0, 3})


SOURCES = {
    "glm_moe_dsa": SHARED,
    "hy_v4": MOE_CASES["hy_v4"][1] | {"indexer_types": ["full", "shared", "full"]},
    "mistral_large4": BORROWED,
}


@pytest.mark.parametrize("case", SOURCES)
def test_it_is_pruned_and_quantized_but_not_run_layer_by_layer(tmp_path, cli, case):
    source = save_stock(tmp_path / "moe", case, SOURCES[case], dtype=torch.float32)
    done = cli("prune", source, tmp_path / "out", "--keep", 6, "--json")
    assert done.code == 0, done.out
    model = load(source)
    with dropped(model, open_model(source), done.json["prune"]["keep"]):
        masked = logits(model)
    assert relative_difference(masked, logits(load(tmp_path / "out"))) <= 1e-5
    flags = ("--format", "bitsandbytes") if open_model(source).family.tensors.packed else ()
    assert cli("quantize", source, tmp_path / "packed", *flags, "--json").code == 0
    (tmp_path / "text").write_text(text(200))
    refused = cli(
        "calibrate", add_tokenizer(source), tmp_path / "stats", "--data", tmp_path / "text", "--seq-len", 16, "--json"
    )
    reads = "tokens or keys" if case == "mistral_large4" else "prev_topk_indices"
    assert refused.code == 3 and f"layer 1 reads {reads}" in refused.json["error"]["message"], refused.out


def test_a_list_of_indexers_of_another_length_is_refused(tmp_path, cli):
    source = save_stock(tmp_path / "moe", "glm_moe_dsa", SHARED, dtype=torch.float32)
    edit_json(source / "config.json", indexer_types=["full"])
    refused = cli("inspect", source, "--json")
    assert refused.code == 3 and "indexer_types" in refused.json["error"]["message"]
