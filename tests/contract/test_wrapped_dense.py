"""Contract: dense language models inside multimodal models, upcycled within them and alone (--text-only)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.families.model import open_model
from moeconv.families.pairs import find_conversion
from moeconv.families.registry import tables
from tests.contract.stock import WRAPPED_DENSE, load, logits, relative_difference, save_stock
from tests.tiny import edit_json

torch.set_num_threads(1)
INSIDE = [case for case, (_, _, target) in WRAPPED_DENSE.items() if target]
ALONE = [case for case, (_, _, target) in WRAPPED_DENSE.items() if not target]


def _save(path: Path, case: str, dtype: torch.dtype = torch.float32) -> Path:
    return save_stock(path, *WRAPPED_DENSE[case][:2], dtype=dtype)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_every_multimodal_family_with_a_dense_language_model_is_converted_below():
    covered = {WRAPPED_DENSE[case][0] for case in WRAPPED_DENSE}
    assert covered | {"vipllava"} == {name for name, rows in tables().wrapped_dense.items() if rows}


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("case", INSIDE)
def test_the_language_model_becomes_experts_and_all_else_keeps_its_bytes(tmp_path, cli, case):
    source = _save(tmp_path / "dense", case)
    family = open_model(source).family
    before = logits(load(source))
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--no-check", "--json")
    assert done.code == 0, done.out
    pair, target = find_conversion(family, None)
    assert (done.json["upcycle"]["to"], done.json["upcycle"]["exact"]) == (WRAPPED_DENSE[case][2], True)
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == target.model_type
    assert moe.config.get_text_config().model_type == pair.target
    assert relative_difference(before, logits(moe)) <= pair.tolerance
    old, new = _tensors(source), _tensors(tmp_path / "moe")
    beside = [name for name in old if name.startswith(tuple(family.multimodal.beside))]
    assert beside and not [name for name in beside if not torch.equal(old[name], new[name])]
    config, now = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "moe"))
    assert now["architectures"] == [target.architecture]
    told = set(config) - {"text_config", "vision_config", "model_type", "architectures", "transformers_version"}
    assert {key: now[key] for key in told} == {key: config[key] for key in told}


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("case", list(WRAPPED_DENSE))
def test_the_language_model_alone_computes_the_same(tmp_path, cli, case):
    source = _save(tmp_path / "dense", case)
    family = open_model(source).family
    before = logits(load(source))
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--text-only", "--no-check", "--json")
    assert done.code == 0, done.out
    pair, target = find_conversion(family, None, text_only=True)
    assert done.json["upcycle"]["to"] == target.model_type == pair.target
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == target.model_type
    assert relative_difference(before, logits(moe)) <= pair.tolerance
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert not {"text_config", "vision_config", "image_token_id", "image_token_index"} & written.keys()
    assert not [name for name in _tensors(tmp_path / "moe") if "vis" in name]


@pytest.mark.parametrize("case", ALONE)
def test_a_wrapper_without_a_stock_counterpart_names_the_option(tmp_path, cli, case):
    source = _save(tmp_path / "dense", case)
    refused = cli("upcycle", source, tmp_path / "moe", "--json")
    assert refused.code == 3 and not (tmp_path / "moe").exists()
    assert "--text-only" in refused.json["error"]["hint"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_5", "llava"])
def test_the_written_model_is_checked_against_the_whole_source(tmp_path, cli, case):
    source = _save(tmp_path / "dense", case)
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--json")
    assert done.code == 0, done.out
    check = done.json["upcycle"]["equivalence"]
    assert check["checked"] and check["relative"] <= 1e-5 and check["all_on"]["relative"] <= 1e-5


@pytest.mark.slow
def test_a_language_model_alone_is_checked_against_the_exact_counterpart(tmp_path, cli):
    source = _save(tmp_path / "dense", "mistral3-mistral")
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--method", "drop", "--text-only", "--json")
    assert done.code == 0, done.out
    assert done.json["upcycle"]["equivalence"]["counterpart"]["relative"] <= 1e-5
    assert done.json["upcycle"]["equivalence"]["counterpart"]["difference"] is None
    assert cli("verify", tmp_path / "moe", "--load", "--json").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--text-only",)])
def test_the_ffn_is_split_inside_a_multimodal_model_and_alone(tmp_path, cli, flags):
    source = _save(tmp_path / "dense", "qwen3_5")
    arguments = ("--method", "split", "--experts", 5, "--shared-experts", 1, "--top-k", 5, "--dry-run", "--json")
    planned = cli("upcycle", source, tmp_path / "moe", *arguments, *flags)
    assert planned.code == 0, planned.out
    assert planned.json["upcycle"]["shared_width"] == 16


def test_older_files_with_the_settings_at_the_top_are_read(tmp_path, cli):
    """Qwen2-VL's first files have no text_config; a rope_type of "mrope" rotates text as "default" does."""
    source = _save(tmp_path / "dense", "qwen2_vl")
    before = logits(load(source))
    config = json.loads((source / "config.json").read_text())
    text = config.pop("text_config")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    kept = {"model_type", "architectures"}
    text = {key: value for key, value in text.items() if key not in kept} | {"rope_theta": 1e4}
    (source / "config.json").write_text(json.dumps(config | text))
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--text-only", "--no-check", "--json")
    assert done.code == 0, done.out
    assert relative_difference(before, logits(load(tmp_path / "moe"))) <= 1e-5
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert "vision_config" not in written and written["rope_scaling"] is None


def test_text_only_is_refused_where_there_is_nothing_to_leave_out(tmp_path, cli, dense):
    source, _ = dense("llama")
    refused = cli("upcycle", source, tmp_path / "moe", "--text-only", "--json")
    assert refused.code == 2 and "--text-only" in refused.json["error"]["message"]


def test_prediction_layers_of_a_dense_model_are_left_out_with_a_warning(tmp_path, cli):
    source = _save(tmp_path / "dense", "qwen3_5", torch.bfloat16)
    tensors = _tensors(source)
    full = {n: t for n, t in tensors.items() if n.startswith("model.language_model.layers.1.")}
    tensors |= {n.replace("model.language_model.layers.1.", "mtp.layers.0."): t for n, t in full.items()}
    size = full["model.language_model.layers.1.input_layernorm.weight"]
    tensors |= {f"mtp.{name}.weight": size for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    tensors["mtp.fc.weight"] = torch.zeros(len(size), 2 * len(size), dtype=torch.bfloat16)
    for file in source.glob("model*"):
        file.unlink()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, source / "model.safetensors")
    text = json.loads((source / "config.json").read_text())["text_config"]
    edit_json(source / "config.json", text_config=text | {"mtp_num_hidden_layers": 1})
    assert cli("inspect", source, "--json").json["parameters"]["prediction"] > 0
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--no-check", "--json")
    assert done.code == 0, done.out
    assert any("1 multi-token-prediction layer " in text for text in done.json["warnings"])
    assert not [name for name in _tensors(tmp_path / "moe") if name.startswith("mtp.")]
    written = json.loads((tmp_path / "moe" / "config.json").read_text())["text_config"]
    assert not written.get("mtp_num_hidden_layers")
    load(tmp_path / "moe")


@pytest.mark.parametrize("case", ["qwen2_5_vl", "llava_next"])
def test_names_of_later_exports_are_read_as_the_hub_s(tmp_path, cli, case):
    """Some versions of transformers saved the names that the modules have in memory."""
    source = _save(tmp_path / "dense", case)
    before = logits(load(source))
    changed = {new: old for old, new in tables().wrappers[WRAPPED_DENSE[case][0]].variants.items()}
    starts = sorted(changed, key=len, reverse=True)
    tensors = {}
    for name, tensor in _tensors(source).items():
        start = next((s for s in starts if name.startswith(s)), "")
        tensors[changed[start] + name.removeprefix(start) if start else name] = tensor.clone()
    assert sum(name.startswith("model.") for name in tensors) > 10
    for file in source.glob("model*"):
        file.unlink()
    save_file(tensors, source / "model.safetensors")
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--text-only", "--no-check", "--json")
    assert done.code == 0, done.out
    assert relative_difference(before, logits(load(tmp_path / "moe"))) <= 1e-5


def test_stacked_experts_are_transposed_as_on_the_hub(tmp_path, cli):
    """All readers but transformers 5, which takes both, know that layout alone."""
    source = _save(tmp_path / "dense", "qwen3_vl")
    assert cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--no-check", "--json").code == 0
    tensors = _tensors(tmp_path / "moe")
    name = "model.language_model.layers.0.mlp.experts."
    assert tensors[name + "gate_up_proj"].shape == (4, 64, 192) and tensors[name + "down_proj"].shape == (4, 96, 64)
    square = ("--granularity", 3, "--no-check", "--dry-run", "--json")  # 2 * 32 neurons at a hidden size of 64
    refused = cli("upcycle", source, tmp_path / "out", "--experts", 6, *square)
    assert refused.code == 2 and "square matrices" in refused.json["error"]["message"], refused.out
