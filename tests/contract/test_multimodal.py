"""Contract: multimodal checkpoints as they lie on the hub; the language model is worked on, all else passes through."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from words import add_tokenizer, text

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.plan.fuse import fuse
from moeconv.plan.planned import planned_model
from moeconv.prune.planner import plan_prune
from moeconv.quantize.step import plan_packing
from moeconv.recipe.read import asked
from moeconv.stream.layers import LayerStream
from tests.contract.stock import (
    HIDDEN,
    MOE_CASES,
    WRAPPED_CASES,
    dropped,
    load,
    logits,
    relative_difference,
    row_of,
    save_stock,
)
from tests.tiny import edit_json

torch.set_num_threads(1)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The checkpoint with these tensors, in one file."""
    for file in path.glob("model*"):
        file.unlink()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("case", list(WRAPPED_CASES))
def test_what_lies_beside_the_language_model_passes_as_it_is(tmp_path, cli, case):
    source = save_stock(tmp_path / "moe", *WRAPPED_CASES[case], dtype=torch.float32)
    found = cli("inspect", source, "--json").json
    assert found["num_experts"] == 8 and found["parameters_by_role"]["vision"] > 0
    images = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
    for name in images:
        (source / name).write_text("{}")
    done = cli("prune", source, tmp_path / "out", "--keep", 6, "--dtype", "bfloat16", "--json")
    assert done.code == 0, done.out
    assert all((tmp_path / "out" / name).read_text() == "{}" for name in images)
    before, after, row = _tensors(source), _tensors(tmp_path / "out"), row_of(case)
    beside = [name for name in before if name.startswith(tuple(row.multimodal.beside))]
    assert beside and not [name for name in beside if not torch.equal(before[name], after[name])]
    assert after[row.name("embedding.tokens")].dtype == torch.bfloat16 != after[beside[0]].dtype
    config, now = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    edited = {key: now["text_config"].get(key) for key in row.experts.count}
    assert edited == dict.fromkeys(row.experts.count, 6) and now["text_config"]["dtype"] == "bfloat16"
    assert now["vision_config"] == config["vision_config"] and now["architectures"] == [row.architecture]
    # transformers 5.24 cannot run any Llama 4 (its forward asks its outputs for images): the output is no worse.
    original = cli("verify", source, "--load", "--json")
    assert original.code == 0 or (case == "llama4-vision" and "does not run" in original.json["problems"][0])
    checked = cli("verify", tmp_path / "out", "--load", "--json")
    assert (checked.code, checked.json["problems"]) == (original.code, original.json["problems"]), checked.out
    assert "AutoModelForImageTextToText" in (tmp_path / "out" / "README.md").read_text()


def test_verify_compares_every_tensor_beside_the_language_model(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *WRAPPED_CASES["qwen3_vl_moe"], dtype=torch.bfloat16)
    assert cli("prune", source, tmp_path / "out", "--keep", 6, "--json").code == 0
    assert cli("verify", tmp_path / "out", "--source", source, "--json").code == 0
    tensors = _tensors(tmp_path / "out")
    changed = sorted(name for name in tensors if name.startswith("model.visual."))[0]
    tensors[changed] = tensors[changed] + 1
    _rewrite(tmp_path / "out", tensors)
    refused = cli("verify", tmp_path / "out", "--source", source, "--json")
    assert refused.code == 5 and any(changed in p and "differs" in p for p in refused.json["problems"]), refused.out


def _stacked(tensors: dict[str, torch.Tensor], under: str, experts: int) -> None:
    """The experts of a layer in two tensors, as the hub's Qwen3.5 has them."""
    gate, up, down = (
        torch.stack([tensors.pop(f"{under}experts.{e}.{part}_proj.weight") for e in range(experts)])
        for part in ("gate", "up", "down")
    )
    tensors[f"{under}experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
    tensors[f"{under}experts.down_proj"] = down


def _as_on_the_hub(path: Path, case: str) -> Path:
    """The layouts of the experts on the hub; save_pretrained writes others."""
    kind = case.partition("-")[0]
    save_stock(path, *WRAPPED_CASES["qwen3_vl_moe" if kind == "qwen3_vl_moe" else "qwen3_5_moe-vision"],
               dtype=torch.float32)  # fmt: skip
    tensors = _tensors(path)
    if kind == "qwen3_vl_moe":
        packed = {name: t.transpose(1, 2) for name, t in tensors.items() if ".experts." in name}
        return _rewrite(path, tensors | packed)
    like, draw = "model.language_model.layers.1.", torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.startswith(like)]:
        tensors["mtp.layers.0." + name.removeprefix(like)] = torch.randn(tensors[name].shape, generator=draw)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"):
        shape = (HIDDEN, 2 * HIDDEN) if name == "fc" else (HIDDEN,)
        tensors[f"mtp.{name}.weight"] = torch.randn(shape, generator=draw)
    for layer in range(3):
        _stacked(tensors, f"model.language_model.layers.{layer}.mlp.", 8)
    if case.endswith("stacked"):
        _stacked(tensors, "mtp.layers.0.mlp.", 8)
    return _rewrite(path, tensors)


@pytest.mark.parametrize("keep", [6, 4])
@pytest.mark.parametrize("case", ["qwen3_vl_moe", "qwen3_5_moe", "qwen3_5_moe-mtp-stacked"])
def test_layouts_of_the_hub_are_pruned_and_streamed(tmp_path, cli, case, keep):
    source = _as_on_the_hub(tmp_path / "moe", case)
    model = open_model(source)
    assert model.family.tensors.packed["expert.down"].transposed == (case == "qwen3_vl_moe")
    promised = cli("prune", source, tmp_path / "out", "--keep", keep, "--dry-run", "--json").json
    done = cli("prune", source, tmp_path / "out", "--keep", keep, "--json")
    assert done.code == 0 and promised["bytes"] == done.json["bytes"], done.out
    kept = done.json["prune"]["keep"]
    stock = load(source)
    with dropped(stock, model, kept):
        masked = logits(stock)
    assert relative_difference(masked, logits(stock)) > 1e-3
    assert relative_difference(masked, logits(load(tmp_path / "out"))) <= 1e-5
    ids = np.random.default_rng(0).integers(3, 128, (2, 12))
    streamed = torch.cat([out for _, out in LayerStream(model, ids).run().logits()])
    with torch.no_grad():
        expected = stock(torch.tensor(ids)).logits
    assert relative_difference(expected, streamed) <= 1e-5
    if case == "qwen3_vl_moe":
        return
    before, after, last = _tensors(source), _tensors(tmp_path / "out"), kept["2"]
    assert torch.equal(after["mtp.layers.0.mlp.gate.weight"], before["mtp.layers.0.mlp.gate.weight"][last])
    name = "mtp.layers.0.mlp.experts.{}.down_proj.weight"
    if case.endswith("stacked"):
        name = "mtp.layers.0.mlp.experts.gate_up_proj"
        assert torch.equal(after[name], before[name][last])
    else:
        assert all(torch.equal(after[name.format(new)], before[name.format(old)]) for new, old in enumerate(last))
        assert name.format(keep) not in after


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_layouts_of_the_hub_are_multiplied(tmp_path, cli, case):
    source = _as_on_the_hub(tmp_path / "moe", case)
    check = () if case == "qwen3_vl_moe" else ("--no-check",)
    done = cli("upcycle", source, tmp_path / "more", "--experts", 16, *check, "--json")
    assert done.code == 0 and done.json["upcycle"]["top_k"] == 4, done.out
    assert relative_difference(logits(load(source)), logits(load(tmp_path / "more"))) <= 1e-5
    if case == "qwen3_5_moe":
        before, after = _tensors(source), _tensors(tmp_path / "more")
        name = "mtp.layers.0.mlp.experts.{}.up_proj.weight"
        assert all(torch.equal(after[name.format(e)], before[name.format(e // 2)]) for e in range(16))


@pytest.mark.parametrize("flags", [("--bits", 4), ("--format", "bitsandbytes"), ("--bits", 8, "--dtype", "bfloat16")])
def test_stacked_experts_are_packed_as_separate_ones(tmp_path, cli, flags):
    """transformers loads packed weights by the names of separate experts, so both sources become the same model."""
    one = save_stock(tmp_path / "one", *WRAPPED_CASES["qwen3_5_moe-vision"], dtype=torch.float32)
    other, tensors = tmp_path / "other", _tensors(one)
    shutil.copytree(one, other)
    for layer in range(3):
        _stacked(tensors, f"model.language_model.layers.{layer}.mlp.", 8)
    _rewrite(other, tensors)
    for source in (one, other):
        promised = cli("quantize", source, f"{source}-packed", *flags, "--dry-run", "--json").json
        done = cli("quantize", source, f"{source}-packed", *flags, "--json")
        assert done.code == 0 and promised["bytes"] == done.json["bytes"], done.out
        assert done.json["quantize"]["counted"] == {"expert": 3 * 8 * 3}
    packed = _tensors(tmp_path / "one-packed"), _tensors(tmp_path / "other-packed")
    assert packed[0].keys() == packed[1].keys()
    assert all(torch.equal(packed[0][name], packed[1][name]) for name in packed[0])


def test_a_quantization_config_inside_text_config_is_read_and_written_there(tmp_path, cli):
    """transformers looks at the top level first, then into the language model's config."""
    source = save_stock(tmp_path / "plain", *WRAPPED_CASES["glm4v_moe"], dtype=torch.bfloat16)
    add_tokenizer(source)
    (tmp_path / "a.txt").write_text(text(300))
    top = tmp_path / "top"
    assert cli("quantize", source, top, "--bits", 4).code == 0
    config = json.loads((top / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    inside = Path(shutil.copytree(top, tmp_path / "inside"))
    (inside / "config.json").write_text(json.dumps(config))
    said, found = (cli("inspect", path, "--json").json for path in (top, inside))
    assert found["quantization"] == said["quantization"] and found["quantization"]["bits"] == 4
    flags = ("--data", tmp_path / "a.txt", "--seq-len", 16, "--json")
    measured = [cli("evaluate", path, *flags) for path in (top, inside)]
    assert [m.code for m in measured] == [0, 0], measured[0].out
    assert measured[0].json["loss"] == measured[1].json["loss"]
    done = [cli("prune", path, f"{path}-out", "--keep", 6, "--criterion", "random", "--json") for path in (top, inside)]
    assert [d.code for d in done] == [0, 0], done[1].out
    outer, inner = (json.loads((tmp_path / f"{name}-out/config.json").read_text()) for name in ("top", "inside"))
    assert "quantization_config" not in inner and "quantization_config" not in outer["text_config"]
    assert inner["text_config"].pop("quantization_config") == outer.pop("quantization_config") and inner == outer
    assert cli("verify", tmp_path / "inside-out", "--load", "--json").json["ok"]
    redone = cli("quantize", inside, tmp_path / "again", "--bits", 8, "--requantize", "--json")
    assert redone.code == 0, redone.out
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert "quantization_config" in again and "quantization_config" not in again["text_config"]


def test_a_language_model_alone_may_have_stacked_experts_too(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *MOE_CASES["qwen3_5_moe"], dtype=torch.float32)
    expected, tensors = logits(load(source)), _tensors(source)
    for layer in range(3):
        _stacked(tensors, f"model.layers.{layer}.mlp.", 8)
    assert open_model(_rewrite(source, tensors)).packed_experts
    assert relative_difference(expected, logits(load(source))) <= 1e-5
    done = cli("prune", source, tmp_path / "out", "--keep", 6, "--json")
    assert done.code == 0, done.out
    stock = load(source)
    with dropped(stock, open_model(source), done.json["prune"]["keep"]):
        assert relative_difference(logits(stock), logits(load(tmp_path / "out"))) <= 1e-5


def test_stacked_experts_are_pruned_and_packed_in_one_pass(tmp_path):
    source = _as_on_the_hub(tmp_path / "moe", "qwen3_5_moe-mtp-stacked")
    model, packing = open_model(source), asked("quantize", {"bits": 4}, "", "")
    first = plan_prune(model, keep=4, keep_experts={layer: [0, 2, 3, 7] for layer in range(3)})
    second = plan_packing(planned_model(first), packing).plan
    fused = fuse(first, second)
    execute(fused, source=model.checkpoint, out=tmp_path / "fused")
    execute(first, source=model.checkpoint, out=tmp_path / "pruned")
    pruned = open_model(tmp_path / "pruned")
    execute(plan_packing(pruned, packing).plan, source=pruned.checkpoint, out=tmp_path / "packed")
    ours, theirs = _tensors(tmp_path / "fused"), _tensors(tmp_path / "packed")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    load(tmp_path / "fused", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # parts of a cast tensor are no byte ranges
def test_a_recipe_prunes_and_packs_stacked_experts(tmp_path, cli, dtype):
    source = _as_on_the_hub(tmp_path / "moe", "qwen3_5_moe")
    (tmp_path / "recipe.yaml").write_text(
        f"name: both\nsteps:\n  - {{step: prune, from: {source}, to: {tmp_path}/between, with: {{keep: 4, "
        f"criterion: aimer, dtype: {dtype}}}}}\n  - {{step: quantize, from: {tmp_path}/between, to: {tmp_path}/out, "
        "with: {bits: 4}}\n"
    )
    done = cli("run", tmp_path / "recipe.yaml", "--json")
    assert done.code == 0 and not (tmp_path / "between").exists(), done.out
    by_hand = ("--keep", 4, "--criterion", "aimer", "--dtype", dtype)
    assert cli("prune", source, tmp_path / "pruned", *by_hand, "--json").code == 0
    assert cli("quantize", tmp_path / "pruned", tmp_path / "packed", "--bits", 4, "--json").code == 0
    ours, theirs = _tensors(tmp_path / "out"), _tensors(tmp_path / "packed")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = json.loads((tmp_path / "out" / "moeconv_manifest.json").read_text())["steps"]
    assert [step["command"] for step in steps] == ["prune", "quantize"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_vl_moe", "glm4v_moe", "internvl", "gemma4-vision"])
def test_text_measures_the_language_model(tmp_path, cli, case):
    path = add_tokenizer(save_stock(tmp_path / "moe", *WRAPPED_CASES[case], dtype=torch.float32))
    (tmp_path / "text").write_text(text(600))
    data = ("--data", tmp_path / "text", "--seq-len", 16, "--json")
    done = cli("prune", path, tmp_path / "out", "--keep", 6, "--refit", *data)
    assert done.code == 0, done.out
    assert done.json["prune"]["criterion"] == "reconstruction"
    load(tmp_path / "out")
    assert cli("evaluate", tmp_path / "out", "--reference", path, *data).code == 0


def test_what_is_not_done_to_a_multimodal_model_is_refused_with_the_reason(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *WRAPPED_CASES["glm4v_moe"], dtype=torch.bfloat16)
    (tmp_path / "text").write_text(text(400))
    data = ("--data", tmp_path / "text", "--json")
    packing = ("quantize", source, tmp_path / "out", "--format")
    for arguments, code, word in (
        (("tune", source, tmp_path / "out", "--objective", "lm", *data), 3, "multimodal"),
        (("prune", source, tmp_path / "out", "--keep", 4, "--distill", 5, *data), 3, "multimodal"),
        ((*packing, "bitsandbytes", "--self-contained", "--json"), 3, "multimodal"),
        ((*packing, "gguf", "--json"), 3, "glm4v_moe"),
    ):  # fmt: skip
        refused = cli(*arguments)
        assert refused.code == code and word in refused.json["error"]["message"], refused.out
    assert not (tmp_path / "out").exists()
    done = cli("quantize", source, tmp_path / "packed", "--target", "vllm", "--dry-run", "--json").json
    assert done["quantize"]["loads"]["vllm"] == "unknown" and any("vllm was not proven" in w for w in done["warnings"])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a dense language model": ({"model_type": "paligemma", "text_config": {"model_type": "gemma"}}, "dense"),
    "a wrapper without a row": (
        {"model_type": "paligemma", "text_config": {"model_type": "qwen3_moe"}},
        "around qwen3_moe, a Mixture-of-Experts language model, and moeconv does not know which of its tensors",
    ),
    "text and vision experts in one": ({"model_type": "ernie4_5_vl_moe"}, "one count"),
    "an unknown text model": ({"model_type": "internvl", "text_config": {"model_type": "opt"}}, "is not known"),
    "no text config": ({"model_type": "aria", "text_config": 3}, "must be an object"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_other_wrappers_are_refused_by_name(tmp_path, name):
    config, word = WRONG[name]
    source = save_stock(tmp_path / "moe", *WRAPPED_CASES["internvl"], dtype=torch.bfloat16)
    edit_json(source / "config.json", **config)
    with pytest.raises(InputError, match=word):
        open_model(source)


def test_a_tower_that_is_missing_is_named(tmp_path):
    source = save_stock(tmp_path / "moe", *WRAPPED_CASES["internvl"], dtype=torch.bfloat16)
    _rewrite(source, {n: t for n, t in _tensors(source).items() if not n.startswith("vision_tower.")})
    with pytest.raises(InputError, match="begins with vision_tower"):
        open_model(source)


def test_the_language_model_s_config_is_found_under_its_older_name(tmp_path, cli):
    """Nemotron Omni on the hub: llm_config, which transformers reads as text_config, stays what it is."""
    source = save_stock(tmp_path / "moe", *MOE_CASES["nemotron_h_omni"], dtype=torch.float32)
    stated = json.loads((source / "config.json").read_text())
    stated["llm_config"] = stated.pop("text_config")
    (source / "config.json").write_text(json.dumps(stated))
    done = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert done.code == 0, done.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["llm_config"]["n_routed_experts"] == 4 and "text_config" not in config
    assert logits(load(tmp_path / "out")).isfinite().all()


def test_layers_of_step_that_its_files_describe_in_older_words(tmp_path, cli):
    """StepFun's own words for counts, layers and heads; routed outputs are multiplied behind the experts."""
    source = save_stock(tmp_path / "moe", *MOE_CASES["step3p7"], dtype=torch.float32)
    before, stated = logits(load(source)), json.loads((source / "config.json").read_text())
    inner = stated["text_config"]
    for key in ("per_layer_config", "mlp_layer_types", "num_sliding_attention_heads", "query_pre_attn_scalar"):
        del inner[key]
    inner |= {"moe_num_experts": inner.pop("n_routed_experts"), "moe_top_k": inner.pop("num_experts_per_tok")}
    inner |= {"num_attention_groups": inner.pop("num_key_value_heads"), "moe_layers_enum": "1,2,3"}
    inner |= {"attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 6}}
    (source / "config.json").write_text(json.dumps(stated))
    assert torch.equal(before, logits(load(source)))
    model = open_model(source)
    assert model.moe_layers == (1, 2, 3) and model.routed_share == 3.0
    done = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert done.code == 0, done.out
    assert logits(load(tmp_path / "out")).isfinite().all()
    refused = cli("quantize", source, tmp_path / "packed", "--format", "bitsandbytes", "--json")
    assert refused.code == 3 and "which its class in transformers joins" in refused.json["error"]["message"]
