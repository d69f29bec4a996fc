"""What opening a checkpoint says of one that it does not take: the reason, and what to give instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moeconv.errors import InputError, Unsupported
from moeconv.families.foreign import FOREIGN
from moeconv.families.kinds import check_kinds
from moeconv.families.methods import METHODS
from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.plan.execute import execute
from moeconv.prune.planner import plan_prune
from tests import tiny

# parts that stand in a weight's place, and what config.json says beside them
HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 128}
NAMED: dict[str, tuple[tuple[str, ...], dict]] = {
    "HQQ": (("W_q", "meta"), {"quantization_config": {"quant_method": "hqq"}}),
    "EXL2": (("q_weight", "q_scale", "q_perm"), {}),
    "AutoFP8": (("weight", "weight_scale"), {"quantization_config": {"quant_method": "fp8"}}),
    "AQLM": (("codes", "codebooks", "scales"), {}),
}


def foreign(path: Path, way: str) -> Path:
    parts, said = NAMED[way]
    tensors = tiny.read_tensors(tiny.make_moe(path, "qwen3_moe"))
    for name in [n for n in tensors if ".experts." in n]:
        del tensors[name]
        tensors |= {name.removesuffix("weight") + part: ("I32", (2, 2), bytes(16)) for part in parts}
    tiny.write_shards(path, tensors)
    tiny.edit_json(path / "config.json", **said)
    return path


@pytest.mark.parametrize("way", NAMED)
def test_a_foreign_quantization_is_named_and_inspect_answers(tmp_path: Path, cli, way: str) -> None:
    path = foreign(tmp_path / "model", way)
    refused = cli("prune", path, tmp_path / "out", "--ratio", 0.5, "--json")
    assert refused.code == 3 and f"quantized by {way}" in refused.json["error"]["message"]
    assert "unquantized checkpoint" in refused.json["error"]["hint"]
    found = cli("inspect", path, "--json")
    assert found.code == 0 and found.json["kind"] == "moe" and found.json["num_experts"] == 4
    said = next(iter(NAMED[way][1].values()), {})
    assert found.json["quantization"]["format"] == said.get("quant_method", way)
    assert found.json["quantization"]["bits"] == said.get("bits")
    assert found.json["dtypes"]["I32"] > 0 and found.json["parameters"]["total"] is None
    assert any("no step accepts this checkpoint" in text for text in found.json["warnings"])
    table = cli("inspect", path)
    assert table.code == 0 and "quantization" in table.out


@pytest.mark.parametrize(("way", "parts"), [("GPTQ", ("g_idx",)), ("AWQ", ())])
def test_a_method_that_is_read_needs_its_settings(tmp_path: Path, cli, way: str, parts: tuple[str, ...]) -> None:
    """Old exports have them in quantize_config.json, which no runtime of today reads."""
    path, tensors = tiny.make_moe(tmp_path / "model", "qwen3_moe"), {}
    for name, tensor in tiny.read_tensors(path).items():
        stem = name.removesuffix("weight")
        words = {stem + part: ("I32", (2, 2), bytes(16)) for part in ("qweight", "qzeros", "scales", *parts)}
        tensors |= words if ".experts." in name else {name: tensor}
    tiny.write_shards(path, tensors)
    refused = cli("prune", path, tmp_path / "out", "--ratio", 0.5, "--json")
    assert refused.code == 3 and f"quantized by {way}, and config.json has no" in refused.json["error"]["message"]
    assert "quantization_config" in refused.json["error"]["hint"]


def test_every_method_of_transformers_is_read_or_named(tmp_path: Path) -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    words = {str(method.value) for method in QuantizationMethod}
    known = {word for way in FOREIGN for word in way.methods}
    path = tiny.make_moe(tmp_path / "model")
    for word in words - set(METHODS):
        tiny.edit_json(path / "config.json", quantization_config={"quant_method": word})
        with pytest.raises(Unsupported) as raised:
            open_model(path)
        assert "which moeconv does not read" in raised.value.message, word
        assert word in known or word in raised.value.message


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "brandnew"}, "quantized by brandnew"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24",
             "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}}},
            "compressed-tensors marlin-24",
        ),
    ],
)  # fmt: skip
def test_a_quantization_that_nobody_knew_is_named_before_its_tensors_are(
    tmp_path: Path, cli, quantization, says
) -> None:
    path = tiny.make_moe(tmp_path / "model")
    tensors = tiny.read_tensors(path)
    renamed = {n.replace("weight", "weight_q") if ".experts." in n else n: t for n, t in tensors.items()}
    tiny.write_shards(path, renamed)
    tiny.edit_json(path / "config.json", quantization_config=quantization)
    refused = cli("prune", path, tmp_path / "out", "--ratio", 0.5, "--json")
    assert refused.code == 3 and says in refused.json["error"]["message"]
    found = cli("inspect", path, "--json")
    assert found.code == 0 and found.json["quantization"]["format"] == quantization["quant_method"]


def test_a_kind_of_compressed_tensors_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = tiny.make_moe(tmp_path / "model")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    for layout, changed, word in (
        ("pack-quantized", {"num_bits": 5}, "5-bit int"),
        ("pack-quantized", {"actorder": "group"}, "actorder group"),
        ("marlin-24", {}, "marlin-24"),
        ("pack-quantized", {"strategy": "token"}, "strategy token"),
    ):
        groups = {"group_0": {"targets": ["Linear"], "weights": weights | changed}}
        said = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}
        tiny.edit_json(path / "config.json", quantization_config=said)
        with pytest.raises(Unsupported, match=word):
            open_model(path)


def test_a_quantization_that_stands_inside_another_config_is_said(tmp_path: Path) -> None:
    """Inside text_config transformers reads it; elsewhere nobody does."""
    for key, word in (("text_config", "quantized by HQQ"), ("llm_config", "inside llm_config")):
        other = tiny.make_moe(tmp_path / key)
        tiny.edit_json(other / "config.json", **{key: {"quantization_config": HQQ}})
        with pytest.raises(Unsupported, match=word):
            open_model(other)


def test_an_index_and_a_single_file_are_refused_together(tmp_path: Path, cli) -> None:
    """transformers loads the single file, other programs the shards."""
    path = tiny.make_dense(tmp_path / "model", shards=2)
    shutil.copy(tiny.make_dense(tmp_path / "other", seed=1) / "model.safetensors", path)
    for command in (("inspect", path), ("upcycle", path, tmp_path / "out"), ("verify", path)):
        refused = cli(*command, "--json")
        assert refused.code == 3, command
        assert "model.safetensors and model.safetensors.index.json" in refused.json["error"]["message"]
    assert not (tmp_path / "out").exists()
    one = tiny.make_dense(tmp_path / "one")  # an index of that one file says the same
    names = dict.fromkeys(tiny.read_tensors(one), "model.safetensors")
    (one / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    open_model(one)


LISTS = ("num_experts_per_tok", "num_experts", "moe_intermediate_size")


@pytest.mark.parametrize("key", LISTS)
def test_a_list_that_says_the_same_for_every_layer_is_its_number(tmp_path: Path, cli, key: str) -> None:
    """As the config.json of Hunyuan-A13B has it; and it is written as it was read."""
    path = tiny.make_moe(tmp_path / "model", "qwen3_moe", experts=4, top_k=2)
    plain = plan_prune(open_model(path), keep=2)
    number = json.loads((path / "config.json").read_text())[key]
    tiny.edit_json(path / "config.json", **{key: [number] * 2})
    model = open_model(path)
    assert (model.num_experts, model.top_k) == (4, 2) and model.value(key) == number
    plan = plan_prune(model, keep=2)
    execute(plan, source=model.checkpoint, out=tmp_path / "out")
    assert plan.config[key] == [plain.config[key]] * 2
    assert open_model(tmp_path / "out").num_experts == 2
    tiny.edit_json(path / "config.json", **{key: [number, number + 1]})
    refused = cli("prune", path, tmp_path / "no", "--keep", 2, "--json")
    assert refused.code == 3
    assert f"{key} differs from layer to layer: {number} in layer 0" in refused.json["error"]["message"]
    tiny.edit_json(path / "config.json", **{key: [number] * 3})
    with pytest.raises(InputError, match="3 entries for 2 layers"):
        open_model(path)


@pytest.mark.parametrize("key", ["n_group", "topk_group"])
def test_groups_of_experts_are_counts(key):
    """DeepSeek-V2's default is null, so that nothing but the row states what the keys take."""
    config = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4}
    row = tables().moe["deepseek_v2"]
    check_kinds(row, config | {key: None})
    with pytest.raises(InputError, match=f"{key} must be a whole number"):
        check_kinds(row, config | {key: "two"})
