"""Experts that a quantization_config names by number: after a prune every entry means the experts that it meant."""

from __future__ import annotations

import re

import pytest
from tiny import edit_json, make_moe

from moeconv.errors import InputError
from moeconv.families.model import Model, open_model
from moeconv.prune.named_modules import renumbered
from moeconv.prune.planner import plan_prune

EXPERTS = 12
KEEP = {0: [1, 7, 11], 1: [0, 2, 10]}
EXPERT = re.compile(r"experts\.(\d+)\.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(make_moe(tmp_path_factory.mktemp("named") / "moe", "qwen3_moe", experts=EXPERTS))


def modules(model: Model, experts: int) -> list[str]:
    names = [name.removesuffix(".weight") for name in model.checkpoint.tensors if name.endswith(".weight")]
    return [name for name in names if not (found := EXPERT.search(name)) or int(found[1]) < experts]


def exact(words: list[str], name: str) -> bool:
    from compressed_tensors.utils.match import match_name

    return any(match_name(name, word) for word in words)


def part(words: list[str], name: str) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, words)


def expected(model: Model, words: list[str], reads) -> set[str]:
    """What the readers' own function matches before, under the numbers after."""
    found = set()
    for name in modules(model, EXPERTS):
        if not reads(words, name):
            continue
        expert = EXPERT.search(name)
        if expert is None:
            found.add(name)
            continue
        kept = KEEP[int(name.split(".")[2])]
        if int(expert[1]) in kept:
            found.add(name.replace(f"experts.{expert[1]}.", f"experts.{kept.index(int(expert[1]))}."))
    return found


UP = "model.layers.0.mlp.experts.7.up_proj"
EXACT = [
    ["lm_head", "model.layers.0.mlp.gate", UP],
    [UP, "model.layers.0.mlp.experts.0.up_proj", "model.layers.1.mlp.experts.0.down_proj"],
    [r"re:.*experts\.7\..*"],
    [r"re:.*experts\.1\..*", "re:.*self_attn.*"],
    [r"re:.*(lm_head|layers\.1\.mlp\.experts\.10\.down_proj)"],
    [r"re:.*experts\.\d\..*"],  # one digit: no number in it, and it means other experts afterwards
    [r"re:.*experts\..*up_proj"],
    [r"re:model\.layers\.0\..*"],
    [r"re:.*experts\.(3|4)\..*"],  # all of them go
]
PART = [
    ["lm_head", "gate", UP],
    ["model.layers.0.mlp.experts.1"],
    ["experts.7.up_proj", "mlp.gate"],
    [r"model.layers.\d+.mlp.experts.1[01]", "lm_head"],
    ["model.layers.1"],
    ["model.layers.0.mlp.experts.3", "self_attn.q_proj"],
]


@pytest.mark.parametrize(
    ("method", "key", "words"),
    [("compressed-tensors", "ignore", words) for words in EXACT]
    + [("bitsandbytes", "llm_int8_skip_modules", words) for words in PART]
    + [("fp8", "modules_to_not_convert", words) for words in PART[:2]],
)
def test_a_list_means_the_same_experts_afterwards(model, method, key, words):
    reads = exact if key == "ignore" else part
    made = renumbered(model, {"quant_method": method, key: words}, KEEP)[key]
    left = {name for name in modules(model, 3) if reads(made, name)}
    assert left == expected(model, words, reads)
    numbers = [int(found[1]) for word in made if (found := EXPERT.search(f"{word}."))]
    assert all(number < 3 for number in numbers)


def test_what_means_the_same_stays_word_for_word(model):
    groups = {"group_0": {"targets": [r"re:.*layers\.(0)\..*experts\..*", "Linear"], "weights": {"num_bits": 4}}}
    config = {"quant_method": "compressed-tensors", "ignore": ["lm_head", "re:.*gate$"], "config_groups": groups}
    assert renumbered(model, config, KEEP) == config


def test_groups_by_expert_are_renumbered_and_an_empty_one_goes(model):
    groups = {
        "group_0": {"targets": [r"re:.*experts\.7\..*"], "weights": {"num_bits": 8}},
        "group_1": {"targets": [r"re:.*experts\.5\..*"], "weights": {"num_bits": 4}},
    }
    made = renumbered(model, {"quant_method": "compressed-tensors", "config_groups": groups}, KEEP)["config_groups"]
    assert sorted(made) == ["group_0"]
    names = [f"model.layers.0.mlp.experts.1.{part}_proj" for part in ("down", "gate", "up")]
    assert made["group_0"] == {"targets": names, "weights": {"num_bits": 8}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ignore": ["model.language.layers.0.mlp.experts.7.up_proj"]}, "an expert that has no tensor"),
        ({"extra_config": {UP: {"bits": 16}}}, r"extra_config names single experts"),
        ({"dynamic": {r"-:.*experts\.7\..*": {}}}, r"dynamic names single experts"),
        ({"rules": [{"name": UP}]}, r"rules\.name names single experts"),
    ],
)
def test_what_cannot_be_renumbered_is_refused_before_anything_is_measured(tmp_path, config, message):
    made = make_moe(tmp_path / "moe", "qwen3_moe")
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    edit_json(made / "config.json", quantization_config=said | config)
    with pytest.raises(InputError, match=message) as caught:
        plan_prune(open_model(made), keep=2)  # no evidence: a dry run
    assert "unquantized" in caught.value.hint
