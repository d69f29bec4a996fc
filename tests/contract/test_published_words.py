"""Contract: config.json of published models, whose words differ from those that save_pretrained writes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

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


M3_OWN = ("layer_types", "mlp_layer_types", *(f"index_{key}" for key in (
    "n_heads", "head_dim", "block_size", "topk_blocks", "local_blocks")))  # fmt: skip
M3_PUBLISHED = {
    "moe_layer_freq": [0, 1, 1],
    "sparse_attention_config": {
        "use_sparse_attention": True, "sparse_num_index_heads": 2, "sparse_index_dim": 16, "sparse_block_size": 4,
        "sparse_topk_blocks": 2, "sparse_local_block": 1, "sparse_score_type": "max", "sparse_init_block": 0,
        "sparse_disable_index_value": [0, 1, 1], "sparse_attention_freq": [0, 1, 1],
    },
}  # fmt: skip


def _edit_text_config(path, *, drop=(), **values):
    text = json.loads((path / "config.json").read_text())["text_config"]
    edit_json(path / "config.json", text_config={k: v for k, v in text.items() if k not in drop} | values)


def test_minimax_m3_in_its_own_words_is_the_same_model(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *MOE_CASES["minimax_m3_vl"], dtype=torch.float32)
    expected, kinds = logits(load(source)), open_model(source).layer_kinds
    _edit_text_config(source, drop=M3_OWN, hidden_act="swigluoai", **M3_PUBLISHED)
    model = open_model(source)
    assert model.layer_kinds == kinds and model.moe_layers == (1, 2)
    assert torch.equal(logits(load(source)), expected)
    assert cli("prune", source, tmp_path / "out", "--keep", 4, "--json").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert config["num_local_experts"] == 4 and config["hidden_act"] == "swigluoai"
    assert logits(load(tmp_path / "out")).isfinite().all()


def test_minimax_m3_gets_the_words_that_vllm_needs(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *MOE_CASES["minimax_m3_vl"], dtype=torch.float32)
    assert cli("prune", source, tmp_path / "out", "--keep", 4, "--json").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert {key: config[key] for key in M3_PUBLISHED} == M3_PUBLISHED
    assert config["partial_rotary_factor"] == 1.0 and "hidden_act" not in config  # vLLM assumes a half, and swigluoai


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"moe_layer_freq": [1]}, "moe_layer_freq"),
        ({"sparse_attention_config": {"sparse_attention_freq": 1}}, "sparse_attention_freq"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        (
            {"sparse_attention_config": M3_PUBLISHED["sparse_attention_config"] | {"sparse_index_dim": "16"}},
            "sparse_index_dim",
        ),
    ],
)
def test_wrong_words_of_minimax_m3_are_refused(tmp_path, cli, wrong, named):
    source = save_stock(tmp_path / "moe", *MOE_CASES["minimax_m3_vl"], dtype=torch.float32)
    _edit_text_config(source, drop=M3_OWN, **M3_PUBLISHED | wrong)
    refused = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert refused.code == 3 and named in refused.json["error"]["message"], refused.out


@pytest.mark.parametrize(
    "wrong", [{"indexer_types": [1, 2, 3]}, {"index_topk_pattern": 5}, {"index_topk_pattern": "FX"}]
)
def test_wrong_indexers_are_refused(tmp_path, cli, wrong):
    source = save_stock(tmp_path / "moe", *MOE_CASES["glm_moe_dsa"], dtype=torch.float32)
    edit_json(source / "config.json", **{"indexer_types": None} | wrong)
    refused = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert refused.code == 3 and "indexer_types" in refused.json["error"]["message"], refused.out


# what save_pretrained of dots3-note writes in place of the published words, which are at the top of config.json
_DOTS3_OWN = (
    "layer_types", "mlp_layer_types", "per_layer_config", "sliding_window", "shared_experts_intermediate_size",
    "rope_parameters",
)  # fmt: skip


@pytest.mark.parametrize("words", [{}, {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}])
def test_dots3_note_in_the_published_words_is_the_same_model(tmp_path, cli, words):
    kind, config = MOE_CASES["dots3_note"]
    source = save_stock(tmp_path / "moe", kind, config, dtype=torch.float32)
    expected, kinds = logits(load(source)), open_model(source).layer_kinds
    stated = json.loads((source / "config.json").read_text())
    text = {k: v for k, v in stated.pop("text_config").items() if k not in _DOTS3_OWN}
    text |= {k: v for k, v in config["text_config"].items() if k.startswith("swa_")} | words
    text |= {"sliding_window_size": 5, "moe_shared_expert_intermediate_size": 48, "moe_layer_freq": [0, 1, 1]}
    stated |= text | {"model_type": kind, "architectures": ["Dots3NoteForCausalLM"]}
    (source / "config.json").write_text(json.dumps(stated))
    model = open_model(source)
    assert (model.layer_kinds, model.moe_layers, model.shared_width) == (kinds, (1, 2), 48)
    assert torch.equal(logits(load(source)), expected)
    done = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert done.code == 0, done.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_routed_experts"] == 4 and "text_config" not in config
    assert logits(load(tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"layer_types": ["full_attention"]}, {"layer_types": [1, 2, 3]}, {"use_dsa": False},
              {"mlp_layer_types": None, "moe_layer_freq": [1]}, {"mlp_layer_types": None, "moe_layer_freq": "1"},
              {"per_layer_config": {"2": {"num_attention_heads": 5}}}, {"per_layer_config": {"2": 5}}], ids=str,
)  # fmt: skip
def test_wrong_layers_of_dots3_note_are_refused(tmp_path, cli, wrong):
    source = save_stock(tmp_path / "moe", *MOE_CASES["dots3_note_text"], dtype=torch.float32)
    edit_json(source / "config.json", **wrong)
    refused = cli("inspect", source, "--json")
    assert refused.code == 3, refused.out


# parts of names that save_pretrained writes -> those of the published checkpoints
HY_V4_NAMES = {
    r"hc_pre\.(hc_(attn|mlp)_layer)\.": r"\1.hc_pre.", r"hc_pre\.hc_head\.": "hc_head.",
    r"mlp\.(shared_experts\.)?linear_gate": r"mlp.\1gate_proj",
}  # fmt: skip
# a published prediction layer has these instead of the mixers of the residual streams
HY_V4_STEP = {
    "enorm.weight": (64,),
    "hnorm.weight": (64,),
    "eh_proj.weight": (64, 128),
    "final_layernorm.weight": (64,),
}


def test_hy_v4_with_tencents_names_and_a_prediction_layer_is_the_same_model(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *MOE_CASES["hy_v4"], dtype=torch.float32)
    expected = logits(load(source))
    tensors = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    for file in source.glob("model*"):
        file.unlink()
    for old, new in HY_V4_NAMES.items():
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    step, last = "model.mtp_layers.0.", "model.layers.2."
    tensors |= {n.replace(last, step): t.clone() for n, t in tensors.items() if n.startswith(last) and ".hc_" not in n}
    tensors |= {step + name: torch.ones(shape) for name, shape in HY_V4_STEP.items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, source / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(source)), expected)
    assert len([name for name in tensors if name.startswith(step)]) == 27
    done = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert done.code == 0, done.out
    pruned = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert pruned.keys() == tensors.keys()
    assert len(pruned[step + "mlp.experts.down_proj"]) == len(pruned[last + "mlp.experts.down_proj"]) == 4
    assert logits(load(tmp_path / "out")).isfinite().all()
