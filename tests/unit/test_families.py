"""`moeconv families`: what can be done with each source, and the family of a hub name."""

from __future__ import annotations

import pytest

from moeconv.errors import Unsupported, UsageError
from moeconv.families.find import accepted, find_family
from moeconv.families.hub_names import HUB_NAMES, model_type_of
from moeconv.families.listing import families
from moeconv.families.registry import tables
from moeconv.families.served import ENGINES
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.listing import formats_of


@pytest.fixture(scope="module")
def sources() -> list[dict]:
    return families(formats_of)["sources"]


def test_every_source_has_one_row(sources):
    names = {row["model_type"] for row in sources}
    assert names == {name for group in accepted().values() for name in group} | set(tables().aliases) & names
    assert {"kimi_k2", "qwen3_5_moe", "llama", "mixtral"} <= names
    keys = [(row["model_type"], row["kind"], row["text"]) for row in sources]
    assert len(set(keys)) == len(keys)


def test_a_row_states_what_the_commands_take(sources):
    for row in sources:
        assert set(row["formats"]) <= set(FORMATS) and set(row["runtimes"]) == set(ENGINES)
        assert ("upcycle" in row["verbs"]) == bool(row["targets"]) and ("quantize" in row["verbs"]) == bool(
            row["formats"]
        )
        assert ("prune" in row["verbs"]) == (row["kind"] == "moe")
        assert set(row["runtimes"].values()) <= {"same", "differs", "refused", "listed", "no", "unknown"}
    by_name = {(row["model_type"], row["kind"], row["text"]): row for row in sources}
    mixtral = by_name["mixtral", "moe", None]
    assert "gguf" in mixtral["formats"] and mixtral["runtimes"]["llama.cpp"] == "same"
    assert by_name["llama", "dense", None]["targets"][0] == "mixtral"
    assert by_name["llama", "dense", None]["runtimes"] == mixtral["runtimes"]
    assert by_name["gpt_oss", "moe", None]["formats"] != mixtral["formats"]
    alias, row = by_name["kimi_k2", "moe", None], by_name["deepseek_v3", "moe", None]
    assert alias == row | {"model_type": "kimi_k2", "alias_of": "deepseek_v3"}


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("Qwen3-30B-A3B", "qwen3_moe"), ("Qwen/Qwen3-235B-A22B-Instruct-2507", "qwen3_moe"), ("Qwen3-8B", "qwen3"),
        ("hf://moonshotai/Kimi-K2-Instruct@main", "kimi_k2"), ("Kimi-K2", "kimi_k2"), ("Kimi-K2.5", "kimi_k25"),
        ("Qwen3.5-397B-A17B", "qwen3_5_moe"), ("Qwen3.5-27B", "qwen3_5"), ("DeepSeek-V3-0324", "deepseek_v3"),
        ("DeepSeek-V3.2", "deepseek_v32"), ("DeepSeek-R1-Distill-Llama-70B", "llama"), ("GLM-4.5-Air", "glm4_moe"),
        ("Mixtral-8x7B-Instruct-v0.1", "mixtral"), ("Mistral-7B-v0.3", "mistral"), ("Llama-3.1-8B", "llama"),
        ("Llama-4-Scout-17B-16E", "llama4"), ("gpt-oss-20b", "gpt_oss"), ("OLMoE-1B-7B-0924", "olmoe"),
        ("Phi-3.5-MoE-instruct", "phimoe"), ("Phi-4-mini-instruct", "phi3"), ("mixtral", "mixtral"),
        ("granite-3.1-1b-a400m-base", "granitemoe"), ("granite-3.3-8b-instruct", "granite"),
    ],
)  # fmt: skip
def test_a_hub_name_finds_its_row(name, model_type):
    found = families(formats_of, model=name)
    assert {row["model_type"] for row in found["sources"]} == {model_type}


def test_a_refused_family_says_why_and_an_unknown_name_how_to_find_out(cli):
    with pytest.raises(Unsupported, match="softcap"):
        families(formats_of, model="google/gemma-2-9b")
    with pytest.raises(UsageError, match="no family is known by this name") as caught:
        families(formats_of, model="someone/Unheard-Of-3B")
    assert "moeconv inspect hf://someone/Unheard-Of-3B" in caught.value.hint
    done = cli("families", "--model", "Kimi-K2-Instruct", "--json")
    assert done.code == 0 and [row["model_type"] for row in done.json["sources"]] == ["kimi_k2"]
    assert cli("families", "--model", "Unheard-Of-3B").code == 2
    assert "qwen3_moe" in cli("families", "--model", "Qwen3-30B-A3B").out
    pairs = families(formats_of, model="Qwen3-8B")["pairs"]
    assert pairs and all(pair["from"] == "qwen3" for pair in pairs)


def test_patterns_are_of_names_in_lower_case_and_each_can_match():
    for i, (pattern, model_type) in enumerate(HUB_NAMES):
        assert pattern == pattern.lower() and model_type
        example = pattern.replace("[5-9]", "5").replace("[56]", "5").replace("[567]", "5").replace("[12]", "2")
        example = example.replace("[34]", "3").replace("[3h]", "3").replace("*", "")
        assert model_type_of(example) == model_type, (i, pattern)


def test_every_model_type_of_a_pattern_is_taken_or_refused_by_name():
    for model_type in {model_type for _, model_type in HUB_NAMES}:
        text = next(iter(tables().wrapped.get(model_type, {})), None)
        try:
            assert find_family({"model_type": model_type, "text_config": {"model_type": text}}).model_type
        except Unsupported as error:
            assert model_type in error.message
