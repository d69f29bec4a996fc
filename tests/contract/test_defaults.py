"""Every default in every family row is what transformers' class assumes when config.json leaves the key out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moeconv.families.kinds import kind_of
from moeconv.families.registry import tables
from moeconv.families.rope import KEYS as ROPE
from moeconv.families.rope import both_wordings, read_rope
from moeconv.families.sliding import KEYS as SLIDING
from moeconv.families.spec import Family
from moeconv.families.target import TRAINING
from moeconv.plan.meter import SilentMeter
from moeconv.recipe.run import run_step
from tests.contract.stock import DENSE_CASES, save_stock, skip_where_stock_is_broken, skip_where_unknown

# name -> (model_type of the class that reads the keys, row)
ROWS: dict[str, tuple[str, Family]] = {
    f"{row.model_type} ({row.kind})": (row.model_type, row)
    for table in (tables().dense, tables().moe)
    for row in table.values()
    if row.remote is None and row.runs_as is None  # the classes of the others are code in their checkpoints
} | {f"{outer}/{text}": (text, row) for outer, rows in tables().wrapped.items() for text, row in rows.items()}
# what a checkpoint must say; head counts that no class has for a default, so that nothing is right by chance
SIZES = {"vocab_size": 160, "hidden_size": 336, "num_hidden_layers": 6, "num_attention_heads": 12,
         "intermediate_size": 96}  # fmt: skip
# sizes that the class checks against another
_MAMBA = {"mamba_n_heads": 12, "mamba_expand": 2, "mamba_d_head": 56}
BESIDE = {"granitemoehybrid": _MAMBA, "bamba": _MAMBA, "beam": {"num_attention_heads": 16},
          "dots3_note_text": {"num_attention_heads": 128}}  # fmt: skip
# rows and keys whose default is not compared, and why
KNOWN = {
    ("nemotron", "num_key_value_heads"): "the class leaves it null, which its attention cannot compute with",
    ("nemotron_h", "time_step_limit"): "the class's default is infinite, which no JSON holds",
    ("granitemoehybrid", "time_step_limit"): "the class's default is infinite, which no JSON holds",
    ("bamba", "time_step_limit"): "the class's default is infinite, which no JSON holds",
    ("nemotron_h", "mtp_layers_block_type"): "says nothing while there is no prediction layer",
    ("bailing_hybrid", "head_dim"): "the class reads it for its linear heads, and then overwrites it with another",
    ("lfm2", "tie_embedding"): "an older word for tie_word_embeddings, which the class does not keep",
    ("nemotron_h", "layer_types"): "the class's default has no meaning for another number of layers",
}


def _class_config(model_type: str, row: Family, **values: Any) -> dict[str, Any]:
    """What the class makes of these values (in the row's words) and of nothing else."""
    transformers.logging.set_verbosity_error()
    skip_where_unknown(model_type)
    made = CONFIG_MAPPING[model_type](**row.config.write({}, values))
    return row.config.read(made.to_dict())


def _sizes(model_type: str, row: Family, **other: int) -> dict[str, int]:
    return {k: v for k, v in (SIZES | other).items() if k in row.config.defaults} | BESIDE.get(model_type, {})


def _compared() -> list[tuple[str, str]]:
    return [
        (name, key)
        for name, (model_type, row) in ROWS.items()
        for key in row.config.defaults
        if key not in SIZES and key not in ROPE and (model_type, key) not in KNOWN
    ]


@pytest.mark.parametrize("name", ROWS)
def test_defaults_are_those_of_the_class(name):
    model_type, row = ROWS[name]
    said = _sizes(model_type, row)
    plain = _class_config(model_type, row, **said)
    # other sizes: what stays the same is a constant, and what changes is derived
    other = _sizes(model_type, row, hidden_size=672, num_hidden_layers=9)
    other |= {"mamba_d_head": 112} if "mamba_d_head" in other else {}
    elsewhere = _class_config(model_type, row, **other)
    wrong = []
    for key in (key for at, key in _compared() if at == name and key not in said):
        ours, theirs = row.config.value(key, said), plain.get(key)
        if key == "tie_word_embeddings" and row.multimodal.root:  # the classes tie by the outer config
            theirs = plain[key] = getattr(CONFIG_MAPPING[row.model_type](), "tie_word_embeddings", False)
        if key not in plain:  # the class does not know it
            neutral = row.config.neutral.get(key, ())
            if ours is not None and key not in TRAINING and ours not in neutral and row.kind == "dense":
                wrong.append((key, ours, "no such key"))
        elif ours is None:
            if theirs is not None and theirs == elsewhere[key]:
                wrong.append((key, ours, theirs))
        elif key in SLIDING and not said.get("use_sliding_window") and theirs in (None, 0):
            continue  # a window that is switched off; its default is looked at below
        elif ours != theirs:
            wrong.append((key, ours, theirs))
    assert not wrong


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("name", ROWS)
def test_rotary_parameters_are_those_of_the_class(name):
    model_type, row = ROWS[name]
    theirs = _class_config(model_type, row, **_sizes(model_type, row)).get("rope_parameters")
    if not theirs:
        assert row.attention.rope == "none" or (model_type, "rope_parameters") in KNOWN
        return
    assumed = row.config.defaults.get("rope_parameters")
    ours = read_rope(
        {"rope_parameters": assumed}, theta=row.config.defaults["rope_theta"], partial=row.attention.partial
    )
    for kind, each in (
        theirs.items() if theirs.keys() & {"full_attention", "sliding_attention"} else [("full_attention", theirs)]
    ):
        if each is None:  # layers of this kind do not rotate
            assert assumed[kind] is None
            continue
        want = {key: value for key, value in each.items() if key not in ("type", "max_position_embeddings")}
        found = ours if kind == "full_attention" or not assumed else assumed[kind]
        full = {"partial_rotary_factor": 1.0}
        assert full | dict(found) == full | want, kind
    # both wordings mean the same to the class
    if row.attention.rope in ("plain", "mscale"):
        again = _class_config(model_type, row, **_sizes(model_type, row), **both_wordings(ours))
        assert {k: v for k, v in again["rope_parameters"].items() if k in ours} == ours


@pytest.mark.parametrize("window", [{}, {"sliding_window": 5}, {"use_sliding_window": True, "sliding_window": 5,
                                    "max_window_layers": 2}], ids=["nothing", "window", "switched"])  # fmt: skip
@pytest.mark.parametrize("name", ROWS)
def test_layers_without_a_list_are_those_of_the_class(name, window):
    """Which layers slide, are Mixtures-of-Experts, or are of which kind, when config.json has no list of them."""
    model_type, row = ROWS[name]
    said = _sizes(model_type, row) | {key: value for key, value in window.items() if key in row.config.defaults}
    theirs, layers = _class_config(model_type, row, **said), SIZES["num_hidden_layers"]

    def get(key: str) -> Any:
        return row.config.value(key, said)

    words = theirs.get("layer_types")
    if (model_type, "layer_types") not in KNOWN:
        if words is not None and "layer_types" in row.config.defaults and row.layers.kinds is None:
            found = row.attention.sliding.read({**row.config.defaults, **said}, layers)
            slides = tuple(word == "sliding_attention" and theirs["sliding_window"] for word in words)
            assert tuple(map(bool, slides)) == found.layers
            assert not any(found.layers) or found.window == theirs["sliding_window"]
        elif words is None and "sliding_window" in theirs:
            found = row.attention.sliding.read({**row.config.defaults, **said}, layers)
            assert (found.window if any(found.layers) else None) == (theirs["sliding_window"] or None)
        if row.layers.kinds and words is not None:
            indexers = theirs.get("indexer_types") or ["full"] * layers
            words = [f"shared_{word}" if own == "shared" else word for word, own in zip(words, indexers)]
            assert row.layers.kinds(get, layers) == words
        if row.kind == "moe" and (kinds := theirs.get("mlp_layer_types")) is not None:
            assert row.experts.placement.read(get, layers) == tuple(
                i for i, kind in enumerate(kinds) if kind == "sparse"
            )
        if row.kind == "moe" and theirs.get("moe_layers") is not None:
            assert row.experts.placement.read(get, layers) == tuple(theirs["moe_layers"])


def test_hundreds_of_values_are_compared():
    assert len(_compared()) > 800


@pytest.mark.slow
def test_a_derived_value_is_converted_as_the_class_derives_it(tmp_path):
    """HyperCLOVA X scales attention by head_dim ** -0.5 where config.json says nothing; Granite by 1."""
    skip_where_stock_is_broken("granitemoe")
    path = save_stock(tmp_path / "dense", *DENSE_CASES["hyperclovax"], dtype=torch.float32)
    config = json.loads((path / "config.json").read_text())
    del config["attention_multiplier"]
    (path / "config.json").write_text(json.dumps(config))
    result = run_step("upcycle", {"experts": 4}, str(path), str(tmp_path / "moe"), meter=SilentMeter())
    assert result["upcycle"]["exact"]
    made = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert made["attention_multiplier"] == pytest.approx(config["head_dim"] ** -0.5)


def test_a_key_whose_default_is_null_states_the_kind_of_its_values():
    """Else a word in place of a number would reach a computation. The exceptions are checked where they are read."""
    # counts of experts and placements have checks of their own; training and state spaces compute nothing from a list
    checked = {
        "moe_layers", "moe_layer_end_index", "num_experts", "top_k_experts", "moe_intermediate_size",
        "layer_rope_theta", "time_step_limit", "moe_jitter_eps", "moe_layers_enum",
    }  # fmt: skip
    without = {
        (name, key)
        for name, (_, row) in ROWS.items()
        for key in row.config.defaults
        if kind_of(row, key) is None and key not in checked
    }
    assert not without


@pytest.mark.parametrize("name", [name for name, (_, row) in ROWS.items() if row.elsewhere.fixed])
def test_what_other_readers_compute_with_is_the_default_of_the_class(name):
    _, row = ROWS[name]
    assert {key: row.config.defaults[key] for key in row.elsewhere.fixed} == row.elsewhere.fixed


@pytest.mark.parametrize("name", [name for name, (_, row) in ROWS.items() if row.multimodal.root])
def test_the_language_model_is_where_the_class_has_it(name):
    text, row = ROWS[name]
    skip_where_unknown(row.model_type)
    made = CONFIG_MAPPING[row.model_type]().to_dict()
    assert isinstance(made[row.multimodal.root], dict)
    if len(tables().wrapped[row.model_type]) == 1:  # the class of others takes more than one
        assert made[row.multimodal.root]["model_type"] == text
    assert {f"{group}_config" for group in row.multimodal.beside.values()} <= made.keys()
