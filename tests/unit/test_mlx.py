"""--format mlx: the codes against plain arithmetic, the layout of mlx-lm, and what reads it again."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from moeconv.errors import InputError
from moeconv.families.mlx_lm import SWITCH, switch_form
from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.plan.kernels.pack.mlx import pack_mlx, unpack_mlx
from moeconv.quantize.mlx import MLX
from moeconv.tensors import decode_weight, read_tensor
from tests.contract.stock import MOE_CASES, save_stock

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [(s.name.rstrip("0123456789") if s.usual else s.name, s.bits, g) for s in MLX.schemes for g in s.groups]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def bits_of(codes: np.ndarray, bits: int) -> bytes:
    """Codes one after the other, the lowest bit first."""
    return np.packbits((codes.reshape(-1, 1) >> np.arange(bits) & 1).astype(np.uint8), bitorder="little").tobytes()


def plain_affine(group: np.ndarray, bits: int) -> tuple[np.ndarray, float, float]:
    """(codes, scale, bias) of one group, value by value, in float32."""
    steps, low, high = np.float32((1 << bits) - 1), group.min(), group.max()
    scale = max((high - low) / steps, np.float32(1e-7)) * np.float32(1 if abs(low) > abs(high) else -1)
    edge, bias = (low if abs(low) > abs(high) else high), np.float32(0)
    if (zero := np.rint(edge / scale)) != 0:
        scale, bias = edge / zero, edge
    return np.clip(np.rint((group - bias) / scale), 0, steps).astype(np.int64), scale, bias


def plain_float(group: np.ndarray, mode: str, bits: int) -> tuple[np.ndarray, int]:
    """(codes, stored scale) of one group."""
    peak = np.float32(np.abs(group).max() / np.float32(6 if bits == 4 else 448))
    if mode == "nvfp4":
        scale = torch.tensor(peak).to(torch.float8_e4m3fn)
        stored, by = int(scale.view(torch.uint8)), float(scale)
    else:
        power = math.ceil(math.log2(peak)) if peak else 0
        stored, by = power + 127, 2.0**power
    found = group / np.float32(by) if by else np.zeros_like(group)
    if bits == 8:
        return torch.from_numpy(found).to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.int64), stored
    level = np.abs(np.abs(found)[:, None] - np.array(E2M1, np.float32)).argmin(1)  # the first of two equal distances
    return level + 8 * ((found < 0) & (level > 0)), stored


def weights(dtype: torch.dtype) -> torch.Tensor:
    """Rows with what rounding depends on: zeros, constants, one sign, outliers, ties, and tiny values."""
    weight = torch.randn(12, 384, generator=torch.Generator().manual_seed(1)) * 0.05
    weight[0], weight[1, :32], weight[2], weight[3] = 0, 0.5, weight[2].abs(), -weight[3].abs()
    weight[4] *= 1e-5
    weight[5, 0], weight[6], weight[7, ::2] = 30, (weight[6] * 40).round() / 40, 0
    weight[8, :8] = torch.tensor([6, 0.25, 0.75, 1.25, -1.75, 2.5, -3.5, 5.0])
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("mode", "bits", "group"), KINDS)
def test_codes_are_those_of_plain_arithmetic(mode, bits, group, dtype):
    weight = weights(dtype)
    made = pack_mlx(weight, mode=mode, bits=bits, group_size=group)
    groups = weight.float().numpy().reshape(-1, group)
    if mode == "affine":
        codes, scales, biases = zip(*[plain_affine(one, bits) for one in groups], strict=True)
        assert torch.equal(made["scales"].flatten(), torch.tensor(np.array(scales, np.float32)).to(dtype))
        assert torch.equal(made["biases"].flatten(), torch.tensor(np.array(biases, np.float32)).to(dtype))
    else:
        codes, scales = zip(*[plain_float(one, mode, bits) for one in groups], strict=True)
        assert made["scales"].flatten().tolist() == list(scales) and set(made) == {"weight", "scales"}
    assert made["weight"].numpy().tobytes() == bits_of(np.concatenate(codes), bits)
    parts = made | {"weight": made["weight"].view(torch.uint32)}
    decoded = unpack_mlx(parts, mode=mode, bits=bits)
    if mode == "affine":
        levels = torch.tensor(np.concatenate(codes)).view(12, -1, group).to(dtype)
        assert torch.equal(decoded, (levels * made["scales"][..., None] + made["biases"][..., None]).view(12, -1))
    else:
        by = (
            made["scales"].view(torch.float8_e4m3fn).float()
            if mode == "nvfp4"
            else 2.0 ** (made["scales"].float() - 127)
        )
        fp8 = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
        table = fp8 if bits == 8 else torch.tensor([*E2M1, *(-x for x in E2M1)])
        values = table[torch.tensor(np.concatenate(codes))].view(12, -1, group)
        assert torch.equal(decoded.float(), (values * by[..., None]).view(12, -1))


@pytest.mark.parametrize(("mode", "bits", "group"), [KINDS[0], *KINDS[-3:]])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(mode, bits, group, value):
    weight = torch.ones(4, 128)
    weight[1, 3] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        pack_mlx(weight, mode=mode, bits=bits, group_size=group)


@pytest.fixture
def made(tmp_path, cli):
    def make(*flags: str, family: str = "mixtral"):
        source = tiny.make_moe(tmp_path / "m", family, hidden=64, intermediate=128, shards=2)
        asked = ("quantize", source, tmp_path / "out", "--format", "mlx", *flags)
        promised = cli(*asked, "--dry-run", "--json").json
        done = cli(*asked, "--json")
        assert done.code == 0 and done.json["bytes"] == promised["bytes"], done.out
        return source, tmp_path / "out", done.json

    return make


def test_experts_are_stacked_under_the_names_of_mlx_lm(made, cli):
    source, out, done = made("--scheme", "affine3", "--group-size", "32")
    before, after = open_model(source), open_model(out)
    refs, stem = after.checkpoint.tensors, "model.layers.1.block_sparse_moe.switch_mlp."
    experts = before.num_experts
    assert (refs[stem + "down_proj.weight"].dtype, refs[stem + "down_proj.weight"].shape) == ("U32", (experts, 64, 12))
    assert refs[stem + "gate_proj.biases"].shape == refs[stem + "gate_proj.scales"].shape == (experts, 128, 2)
    assert not [name for name in refs if ".experts." in name]
    for part, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        decoded = decode_weight(after, f"{stem}{name}.weight")
        for expert in range(experts):
            weight = read_tensor(before.checkpoint, before.expert_name(part, layer=1, expert=expert))
            codes = pack_mlx(weight, mode="affine", bits=3, group_size=32)
            parts = codes | {"weight": codes["weight"].view(torch.uint32)}
            assert torch.equal(decoded[expert], unpack_mlx(parts, mode="affine", bits=3))
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 3, "mode": "affine"}
    assert done["quantize"]["loads"]["mlx"] == "ok" and done["quantize"]["loads"]["transformers"] == "no"
    assert cli("verify", out).code == 0
    shown = cli("inspect", out, "--json").json
    assert shown["parameters"] == cli("inspect", source, "--json").json["parameters"]
    assert cli("verify", out, "--load").code == 5


def test_group_size_is_that_of_mlx_lm_where_it_divides(made):
    assert made()[2]["quantize"]["group_size"] == 64


def test_the_result_is_pruned_as_it_lies(made, tmp_path, cli):
    _, out, _ = made("--scheme", "mxfp4")
    assert cli("prune", out, tmp_path / "cut", "--keep", 2, "--criterion", "random", "--json").code == 0
    keep = json.loads((tmp_path / "cut" / "moeconv_manifest.json").read_text())["steps"][-1]
    before, after = open_model(out), open_model(tmp_path / "cut")
    assert after.num_experts == 2 and keep["command"] == "prune"
    for name in (n for n, role in after.roles.items() if role.group == "expert"):
        whole, cut = read_tensor(before.checkpoint, name), read_tensor(after.checkpoint, name)
        assert all(any(bool((one == row).all()) for row in whole) for one in cut)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["quantization"]["mode"] == "mxfp4"


@pytest.mark.parametrize("scheme", ["affine8", "nvfp4"])
def test_requantize_starts_from_the_decoded_weights(made, tmp_path, cli, scheme):
    _, out, _ = made("--scheme", scheme)
    done = cli("quantize", out, tmp_path / "int4", "--requantize", "--format", "compressed-tensors", "--json")
    assert done.code == 0, done.out
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert "quantization" not in config and config["quantization_config"]["quant_method"] == "compressed-tensors"
    before, after = open_model(out), open_model(tmp_path / "int4")
    for layer in before.moe_layers:
        name = f"model.layers.{layer}.block_sparse_moe.switch_mlp.up_proj.weight"
        whole = decode_weight(before, name, torch.bfloat16).float()
        for expert in range(before.num_experts):
            mine = decode_weight(after, after.expert_name("up", layer=layer, expert=expert)).float()
            assert float((mine - whole[expert]).norm() / whole[expert].norm()) < 0.2


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("scales", lambda t: t[:, :-1]), ("biases", lambda t: t.int()), ("weight", lambda t: t[..., :-1]),
        ("scales", None), ("biases", None), ("weight", lambda t: t.view(torch.int32)),
    ],
)  # fmt: skip
def test_damaged_parts_are_refused(made, cli, part, change):
    _, out, _ = made()
    for file in out.glob("*.safetensors"):
        tensors, name = load_file(file), f"model.layers.0.block_sparse_moe.switch_mlp.up_proj.{part}"
        if name in tensors:
            tensor = tensors.pop(name)
            if change is not None:
                tensors[name] = change(tensor).contiguous()
            save_file(tensors, file, {"format": "pt"})
    found = cli("inspect", out, "--json")
    assert found.code == 3 and "switch_mlp.up_proj" in found.json["error"]["message"], found.out


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "group_size": 48}, {"bits": 7, "group_size": 64}, {"bits": "4", "group_size": 64},
        {"bits": 4, "group_size": 64, "mode": "mxfp4"}, {"bits": 4, "group_size": 64, "mode": "nf4"},
        {"bits": 4, "group_size": 16, "mode": "nvfp4", "global_scale": True}, {"bits": None, "group_size": 64},
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(made, cli, settings):
    _, out, _ = made()
    tiny.edit_json(out / "config.json", quantization=settings, quantization_config=settings)
    found = cli("prune", out, out.with_suffix(".cut"), "--keep", 2, "--criterion", "random", "--json")
    assert found.code == 3 and "MLX" in found.json["error"]["message"], found.out


def test_old_files_of_mlx_lm_state_their_settings_once(made, cli):
    _, out, _ = made()
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "moeconv_manifest.json").unlink()
    assert cli("verify", out).code == 0 and open_model(out).quantization == config["quantization"]


@pytest.mark.parametrize("family", ["qwen3_next", "dbrx", "cohere2_moe"])
def test_families_that_it_cannot_be_written_for_are_refused_with_the_reason(tmp_path, cli, family):
    source = save_stock(tmp_path / "m", *MOE_CASES[family], dtype=torch.bfloat16)
    refused = cli("quantize", source, tmp_path / "out", "--format", "mlx", "--dry-run", "--json")
    assert refused.code == 3 and "mlx-lm" in refused.json["error"]["message"], refused.out


def test_every_row_is_a_family_that_mlx_lm_lists():
    from moeconv.families.measured import LISTED

    assert LISTED["mlx"] >= SWITCH.keys()
    rows = tables().moe | {n: next(iter(rows.values())) for n, rows in tables().wrapped.items()}
    for name, row in SWITCH.items():
        form = switch_form(rows[name])
        assert (form is None) == bool(row.refused)
        if form is not None:
            assert form.only_served and all(len(way.parts) == 1 for way in form.tensors.packed.values())
            assert form.own_form.tensors.names == rows[name].tensors.names


def test_the_dense_layers_of_lfm2_moe_stay_floats(tmp_path, cli):
    """mlx-lm renames the weights of these, but not the scales that would lie beside them."""
    source = save_stock(tmp_path / "lfm2", *MOE_CASES["lfm2_moe"], dtype=torch.bfloat16)
    words = ("--format", "mlx", "--scheme", "affine4", "--group-size", "32", "--scope", "all-linear")
    done = cli("quantize", source, tmp_path / "out", *words)
    assert done.code == 0, done.err
    model = open_model(tmp_path / "out")
    dense = [name for name, role in model.roles.items() if role.group == "ffn"]
    assert dense and not [name for name in dense if not name.endswith(".weight")]
    assert all(model.checkpoint.tensors[name].dtype == "BF16" for name in dense)
    assert [name for name, role in model.roles.items() if role.group == "attention" and name.endswith(".scales")]
