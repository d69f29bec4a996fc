"""Sources in the layouts of ModelOpt (NVFP4 and FP8): decoded bit for bit as they are defined, and passed on untouched
where the target has the same codes and scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from words import add_tokenizer, text

from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.quantize.decode import plan_decode
from moeconv.quantize.formats import FORMATS
from moeconv.tensors import decode_weight
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LEVELS = torch.cat([LEVELS, -LEVELS])


def nvfp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(the tensors that ModelOpt stores of a matrix, what it decodes them to)."""
    rows, columns = weight.shape
    second = weight.float().abs().max() / (6 * 448)
    scales = (weight.float().view(rows, -1, 16).abs().amax(-1) / (6 * second)).to(torch.float8_e4m3fn)
    finest = (scales.float() * second)[..., None]
    codes = ((weight.float().view(rows, -1, 16) / finest)[..., None] - LEVELS).abs().argmin(-1).view(rows, columns)
    parts = {
        "weight": (codes[:, 1::2] << 4 | codes[:, ::2]).to(torch.uint8), "weight_scale": scales,
        "weight_scale_2": second, "input_scale": torch.tensor(0.01),
    }  # fmt: skip
    return parts, (LEVELS[codes].view(rows, -1, 16) * finest).view(rows, columns).bfloat16()


def fp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.01)}, codes.float() * scale


ALGORITHMS = {"NVFP4": nvfp4, "FP8": fp8}


def make(path: Path, algorithm: str, *, apart: bool = False) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint whose experts and queries are stored by ModelOpt, with scales of the key-value cache, and what each
    weight decodes to. `apart`: the settings are in a file of their own, as in older exports."""
    tiny.make_moe(path, "qwen3_moe", hidden=64, intermediate=64, dtype="BF16")
    stored, values = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if ".experts." in name or "q_proj" in name:
            parts, values[name] = ALGORITHMS[algorithm](tensor)
            stored |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        else:
            stored[name] = tensor
        if "k_proj" in name:
            stored[name.replace("weight", "k_scale")] = torch.tensor(1.0)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    if apart:
        settings = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        settings |= {"group_size": 16} if algorithm == "NVFP4" else {}
        text = json.dumps({"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": settings})
        (path / "hf_quant_config.json").write_text(text)
    else:
        settings = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
        tiny.edit_json(path / "config.json", quantization_config=settings)
    return path, values


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_decoded_as_it_is_defined(tmp_path, cli, algorithm, apart):
    path, values = make(tmp_path / "m", algorithm, apart=apart)
    model = open_model(path)
    for name, value in values.items():
        found = decode_weight(model, name)
        assert found.dtype == value.dtype and torch.equal(found, value), name
    shown = cli("inspect", path, "--json")
    assert shown.code == 0 and shown.json["parameters"]["total"] == sum(
        values.get(n, t).numel()
        for n, t in load_file(tiny.make_moe(tmp_path / "plain", "qwen3_moe", hidden=64, intermediate=64)
                              / "model.safetensors").items()
    )  # fmt: skip
    assert any("key-value cache" in w for w in shown.json["warnings"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluate_equals_the_decoded_model(tmp_path, cli, algorithm):
    path = add_tokenizer(make(tmp_path / "m", algorithm, apart=True)[0])
    model = open_model(path)
    execute(plan_decode(model), source=model.checkpoint, out=tmp_path / "plain")
    (tmp_path / "text").write_text(text(200))
    losses = [
        cli("evaluate", folder, "--data", tmp_path / "text", "--seq-len", 16, "--json").json["loss"]
        for folder in (path, tmp_path / "plain")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_codes_and_scales_pass_to_compressed_tensors(tmp_path, cli, method):
    path, values = make(tmp_path / "m", "NVFP4", apart=True)
    before = load_file(path / "model.safetensors")
    flags = ("--scheme", "nvfp4", "--requantize", "--method", method, "--json")
    done = cli("quantize", path, tmp_path / "out", *flags)
    assert done.code == 0, done.out
    after = load_file(tmp_path / "out" / "model.safetensors")
    names = [name.removesuffix(".weight") for name in values if ".experts." in name]
    for name in names:
        for new, old in ((".weight_packed", ".weight"), (".weight_scale", ".weight_scale")):
            assert torch.equal(after[name + new].view(torch.uint8), before[name + old].view(torch.uint8))
        assert torch.equal(after[name + ".weight_global_scale"], 1 / before[name + ".weight_scale_2"].reshape(1))
    assert done.json["quantize"]["error"]["relative_rms"]["max"] < 4e-3  # one rounding to bfloat16
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert not any(name.endswith(("k_scale", "weight_scale_2", "input_scale")) for name in after)
    data = tmp_path / "text"
    data.write_text(text(100))
    gptq = ("--method", "gptq", "--data", data, *flags[:3], "--json")
    again = cli("quantize", add_tokenizer(path), tmp_path / "gptq", *gptq)
    assert again.code == 2 and "in this layout already" in again.json["error"]["message"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_target_has_the_bytes_of_the_decoded_model(tmp_path, cli, algorithm):
    path, _ = make(tmp_path / "m", algorithm)
    model = open_model(path)
    execute(plan_decode(model), source=model.checkpoint, out=tmp_path / "plain")
    assert cli("quantize", tmp_path / "plain", tmp_path / "two", "--scheme", "fp8").code == 0
    assert cli("quantize", path, tmp_path / "one", "--scheme", "fp8", "--requantize").code == 0
    assert tiny.read_tensors(tmp_path / "one") == tiny.read_tensors(tmp_path / "two")


def test_prune_keeps_the_stored_words(tmp_path, cli):
    path, values = make(tmp_path / "m", "NVFP4", apart=True)
    assert cli("prune", path, tmp_path / "out", "--keep", 3, "--json").code == 0
    model = open_model(tmp_path / "out")
    assert model.quantization["quant_algo"] == "NVFP4" and model.quantization["ignore"] == ["lm_head"]
    kept = [decode_weight(model, f"model.layers.0.mlp.experts.{e}.up_proj.weight") for e in range(3)]
    whole = [values[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in range(4)]
    assert all(any(torch.equal(one, other) for other in whole) for one in kept)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_algo": "W4A8_AWQ"}, "ModelOpt W4A8_AWQ"), ({"quant_algo": None}, "ModelOpt NONE"),
        ({"quant_algo": "NVFP4", "group_size": 0}, "groups of 0"), ({"quant_algo": "FP8"}, "is expected"),
        ({"quant_algo": "MIXED_PRECISION"}, "quantized_layers"),
    ],
)  # fmt: skip
def test_refused(tmp_path, cli, settings, says):
    path, _ = make(tmp_path / "m", "NVFP4")
    tiny.edit_json(path / "config.json", quantization_config={"quant_method": "modelopt"} | settings)
    done = cli("prune", path, tmp_path / "out", "--keep", 3, "--dry-run", "--json")
    assert done.code == 3 and says in done.json["error"]["message"], done.out


def test_settings_that_nobody_states(tmp_path, cli):
    path, _ = make(tmp_path / "m", "NVFP4", apart=True)
    (path / "hf_quant_config.json").unlink()
    done = cli("prune", path, tmp_path / "out", "--keep", 3, "--dry-run", "--json")
    assert done.code == 3 and "ModelOpt" in done.json["error"]["message"] and "no quantization_config" in done.out


PACKED = FORMATS["compressed-tensors"]


@pytest.mark.parametrize("scheme", [info.name for info in PACKED.schemes if not info.inputs])
def test_weights_in_the_layout_of_the_target_pass_untouched(tmp_path, cli, scheme):
    """Codes that another method chose than the one that is asked for now, and would not choose again."""
    sizes = tiny.packable(PACKED.scheme(scheme), hidden=64, intermediate=128)
    source = tiny.make_moe(tmp_path / "m", "qwen3_moe", **sizes)
    chosen = ("--method", "mse") if "mse" in PACKED.methods_of(PACKED.scheme(scheme)) else ()
    assert cli("quantize", source, tmp_path / "one", "--scheme", scheme, *chosen).code == 0
    done = cli("quantize", tmp_path / "one", tmp_path / "two", "--scheme", scheme, "--requantize", "--json")
    assert done.code == 0, done.out
    assert tiny.read_tensors(tmp_path / "one") == tiny.read_tensors(tmp_path / "two")
    assert done.json["quantize"]["error"]["relative_rms"]["max"] < 4e-3
