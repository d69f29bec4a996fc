"""config.json as every reader reads it: both wordings, every alias, and the keys that other runtimes look for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tiny import make_dense, make_moe

from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.families.spec import Family
from moeconv.families.written import ALIASES, written_config
from moeconv.prune.planner import plan_prune
from moeconv.quantize.planner import plan_quantize
from moeconv.upcycle.planner import plan_upcycle

FAMILIES = dict(tables().moe)
ROWS = {
    **FAMILIES,
    **{
        f"{outer}/{text}": row
        for outer, rows in tables().wrapped.items()
        for text, row in rows.items()
        if row.kind == "moe"
    },
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}}
# what a config that transformers 5 saved always has
LISTS = {"mimo_v2_flash": {"layer_types": ["full_attention"] * 4, "mlp_layer_types": ["sparse"] * 4}}
SCALED = {"rope_type": "linear", "factor": 4.0}


def _config(row: Family, **more: Any) -> dict[str, Any]:
    """A config.json in the words of transformers 5 alone, sizes and counts included."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
             "num_attention_heads": 4, "head_dim": 8}  # fmt: skip
    counts = {row.experts.count[0]: 8, row.experts.top_k[0]: 2}
    text = row.config.write({"model_type": row.model_type}, sizes | counts) | LISTS.get(row.model_type, {}) | more
    return (
        {"model_type": row.model_type, row.multimodal.root: text, "dtype": "bfloat16"}
        if row.multimodal.root
        else text | {"dtype": "bfloat16"}
    )


def _text(row: Family, config: dict[str, Any]) -> dict[str, Any]:
    return dict(row.config.read(config[row.multimodal.root] if row.multimodal.root else config))


@pytest.mark.parametrize("name", ROWS)
def test_both_wordings_and_every_key_of_other_readers(name):
    row = ROWS[name]
    written = written_config(_config(row, **ROPE), row)
    text = _text(row, written)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    for aliases, count in ((row.experts.count, 8), (row.experts.top_k, 2)):
        for alias in aliases:
            assert text[alias] == ([count] * 4 if alias in row.elsewhere.per_layer else count)
    for key, rule in row.elsewhere.keys.items():
        without = callable(rule) and rule(lambda other: row.config.value(other, text)) is None
        assert (text.get(key) is None) == without, key
    assert all(text[key] is None for key in row.elsewhere.nulls)
    if row.attention.rope in ("plain", "mscale") and "rope_theta" not in row.config.words:
        assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 12345.0
        assert text["rope_scaling"] is None  # said, since a class may assume a scaling
        if row.attention.partial is not None:
            assert text["partial_rotary_factor"] == row.attention.partial


@pytest.mark.parametrize(
    "name", [name for name, row in ROWS.items() if row.attention.rope in ("plain", "mscale") and not row.config.words]
)
def test_a_wording_is_read_as_the_other_says(name):
    row = ROWS[name]
    new = written_config(_config(row, rope_parameters={**SCALED, "rope_theta": 5e5}), row)
    old = written_config(_config(row, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0}), row)
    for text in (_text(row, new), _text(row, old)):
        assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 5e5
        assert text["rope_parameters"]["rope_type"] == "linear" and text["rope_scaling"]["factor"] == 4.0


@pytest.mark.parametrize("name", ROWS)
def test_what_the_source_says_stays_and_nothing_is_added_twice(name):
    row = ROWS[name]
    said = dict.fromkeys(row.elsewhere.keys, "said")
    once = written_config(_config(row, **ROPE, **said), row)
    assert _text(row, once).items() >= said.items()
    assert written_config(once, row) == once


@pytest.mark.parametrize("name", FAMILIES)
def test_no_alias_of_a_changed_number_is_stale(name):
    """Whatever other words a published config has for the number of experts or of those per token."""
    row = FAMILIES[name]
    for key, old, new in ((row.experts.count[0], 8, 6), (row.experts.top_k[0], 2, 1), (row.experts.width, 24, 16)):
        names = next((names for names in ALIASES if key in names), (key,))
        beside = {alias: old for alias in names if alias not in row.config.words}
        said = {**{alias: [old] * 4 for alias in names if alias not in (*beside, *row.config.words)}, **beside}
        config = _config(row) | row.config.write({}, {key: old}) | said
        text = written_config(config, row, changes={key: new})
        listed_now = row.elsewhere.per_layer
        assert all(text[alias] == ([new] * 4 if alias in listed_now else new) for alias in beside)
        assert row.config.read(text)[key] == ([new] * 4 if key in listed_now else new)
        listed = _config(row) | row.config.write({}, {key: old}) | {names[-1]: [old] * 4}
        if names[-1] != key:
            assert written_config(listed, row, changes={key: new})[names[-1]] == [new] * 4
        # a number of its own is nobody's alias
        other = _config(row) | row.config.write({}, {key: old}) | {names[-1]: 77}
        if names[-1] not in (key, *row.experts.count, *row.experts.top_k):
            assert written_config(other, row, changes={key: new})[names[-1]] == 77


def test_solar_open_says_that_the_whole_head_turns(tmp_path):
    """llama.cpp's converter assumes half of it where config.json does not say it."""
    model = open_model(make_dense(tmp_path / "m", "llama"))
    upcycled = plan_upcycle(model, to="solar_open", experts=4).config
    saved = written_config(_config(FAMILIES["solar_open"], **ROPE), FAMILIES["solar_open"])
    for config in (upcycled, saved):
        assert config["partial_rotary_factor"] == 1.0
    half = {"rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 0.5}}
    kept = written_config(_config(FAMILIES["solar_open"], **half), FAMILIES["solar_open"])
    assert kept["partial_rotary_factor"] == kept["rope_parameters"]["partial_rotary_factor"] == 0.5


def test_mellum_says_that_it_predicts_no_further_token():
    """transformers writes null for none, to which vLLM cannot add."""
    text = written_config(_config(FAMILIES["mellum"]) | {"num_nextn_predict_layers": None}, FAMILIES["mellum"])
    assert text["num_nextn_predict_layers"] == 0


def test_gpt_oss_says_experts_per_token_anew():
    row = FAMILIES["gpt_oss"]
    text = written_config(_config(row) | {"experts_per_token": 2}, row, changes={"num_experts_per_tok": 1})
    assert text["experts_per_token"] == text["num_experts_per_tok"] == 1


def test_every_verb_writes_what_is_missing(tmp_path):
    """A source in the words of transformers 5 alone, as its save_pretrained makes them."""
    path = make_moe(tmp_path / "m", "qwen3_moe", hidden=128, intermediate=256)
    config = json.loads((path / "config.json").read_text())
    theta = config.pop("rope_theta")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta * 3}
    del config["num_experts"]
    (path / "config.json").write_text(json.dumps(config))
    model = open_model(path)
    for plan in (
        plan_prune(model, keep=2, criterion="random"),
        plan_quantize(model, group_size="128"),
        plan_upcycle(model, experts=8),
    ):
        assert plan.config["rope_theta"] == theta * 3 and plan.config["rope_scaling"] is None
        assert plan.config["torch_dtype"] == plan.config["dtype"]
        assert plan.config["num_experts"] == plan.config["num_local_experts"]


@pytest.mark.parametrize(
    ("source", "target"),
    [(p.source, p.target) for p in tables().pairs if p.source in ("llama", "mistral", "qwen2", "qwen3")],
)
def test_upcycled_configs_have_both_wordings_and_the_readers_keys(tmp_path, source, target):
    path = make_dense(tmp_path / "m", source)
    config = json.loads((path / "config.json").read_text())
    del config["rope_theta"]
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 54321.0}}
    (path / "config.json").write_text(json.dumps(config))
    row = tables().moe[target]
    plan = plan_upcycle(open_model(path), to=target, **({"top_k": 2} if row.experts.routing.top_k else {}))
    text = row.config.read(plan.config)
    assert plan.config["dtype"] == plan.config["torch_dtype"]
    assert set(row.elsewhere.keys) <= {key for key, value in text.items() if value is not None}
    if row.attention.rope == "plain":
        assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 54321.0 and text["rope_scaling"] is None
    ignored = any("norm_topk_prob = True is ignored by llama.cpp and mlx-lm" in text for text in plan.warnings)
    assert ignored == (target == "qwen2_moe")
    if target == "gpt_oss":  # whose activation transformers 4 and the engines compute with numbers of their own
        assert any("swiglu_alpha" in warning for warning in plan.warnings)


def test_a_number_that_a_reader_wants_per_layer_is_a_list_and_stays_one():
    """llama.cpp's converter takes the first of HunYuan's moe_topk; a new value replaces every entry."""
    row = ROWS["hunyuan_v1_moe"]
    written = written_config(_config(row), row)
    assert written["moe_topk"] == [2, 2, 2, 2]
    assert written_config(written, row, changes={"moe_topk": 1})["moe_topk"] == [1, 1, 1, 1]
    assert written_config(written, row) == written


def test_keys_of_layers_with_a_window_are_those_of_the_published_model():
    """vLLM and llama.cpp's converter read them; with the class's own rotary parameters there is no other wording."""
    row = ROWS["mimo_v2_flash"]
    written = written_config(_config(row, rope_parameters=row.config.defaults["rope_parameters"]), row)
    assert "rope_parameters" not in written
    assert (written["rope_theta"], written["swa_rope_theta"], written["partial_rotary_factor"]) == (5e6, 1e4, 0.334)
    assert written["swa_num_key_value_heads"] == 2 * row.config.value("num_key_value_heads", written)
    assert written["swa_head_dim"] == row.config.value("head_dim", written)
    assert written["sliding_window_size"] == row.config.value("sliding_window", written) - 1
    other = dict(row.config.defaults["rope_parameters"], sliding_attention={"rope_type": "default", "rope_theta": 7.0})
    kept = written_config(_config(row, rope_parameters=other), row)
    assert kept["rope_parameters"] == other and kept["swa_rope_theta"] == 7.0


def test_a_class_is_named_as_every_reader_knows_it():
    row = ROWS["phimoe"]
    written = written_config(_config(row, architectures=["PhimoeForCausalLM"]), row)
    assert written["architectures"] == ["PhiMoEForCausalLM"]
    assert written["original_max_position_embeddings"] == row.config.value("max_position_embeddings", written)


@pytest.mark.parametrize("name", [name for name in ROWS if "/" in name])
def test_a_multimodal_model_has_the_keys_that_readers_of_its_language_model_need(name):
    text = next((row for row in tables().families.values() if row.model_type == name.partition("/")[2]), None)
    if text is not None:  # the language models of some wrappers do not exist alone
        ours, alone = ROWS[name].elsewhere, text.elsewhere
        assert all(ours.keys.get(key) == value for key, value in alone.keys.items())
        assert alone.implied <= ours.implied
        kept = {"keys": ours.keys, "implied": ours.implied, "not_loaded": ours.not_loaded}
        assert replace(alone, **kept, runs=ours.runs, runs_not=ours.runs_not) == ours


def test_gemma4_states_the_sizes_of_layers_without_a_window_as_every_reader_knows_them():
    """transformers 5.24 saves them by layer; all others then assume those of the class."""
    row, words = ROWS["gemma4_text"], ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    each = {"1": {"head_dim": 16, "num_key_value_heads": 1}, "3": {"head_dim": 16, "num_key_value_heads": 1}}
    written = written_config(_config(row, layer_types=words, per_layer_config=each), row)
    assert (written["global_head_dim"], written["num_global_key_value_heads"]) == (16, 1)
    assert written["per_layer_config"] == each
    apart = each | {"3": {"head_dim": 32}}
    other = written_config(_config(row, layer_types=words, per_layer_config=apart), row)
    assert not {"global_head_dim", "num_global_key_value_heads"} & other.keys()
    same = written_config(_config(row, layer_types=words, per_layer_config={}), row)
    assert same["global_head_dim"] == same["head_dim"] and "num_global_key_value_heads" not in same


@pytest.mark.parametrize(
    ("full", "interval"), [((1, 3), 2), ((3,), 4), ((0, 3), None), ((1,), None), ((), None), ((0, 1, 2, 3), 1)]
)
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe_text"])
def test_an_interval_is_stated_for_regular_layers_alone(name, full, interval):
    words = ["full_attention" if i in full else "linear_attention" for i in range(4)]
    assert written_config(_config(ROWS[name], layer_types=words), ROWS[name]).get("full_attention_interval") == interval


def test_exaone_says_which_layers_have_experts():
    row = ROWS["exaone_moe"]
    written = written_config(_config(row) | {"first_k_dense_replace": 1}, row)
    assert written["is_moe_layer"] == [False, True, True, True]
    named = written_config(_config(row) | {"mlp_layer_types": ["sparse", "dense", "dense", "sparse"]}, row)
    assert named["is_moe_layer"] == [True, False, False, True]
