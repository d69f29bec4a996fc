"""Contract: every form that packed weights are stored in, with each of its parts taken away, misshapen and of another
dtype in turn; and each decodes as the library that wrote it decodes it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.errors import InputError, Unsupported
from moeconv.families.encodings import PARTS
from moeconv.families.model import Model, open_model
from moeconv.families.packed import SHARED
from moeconv.plan.execute import execute
from moeconv.prune.planner import plan_prune
from moeconv.quantize.decode import plan_decode
from moeconv.quantize.planner import plan_quantize
from moeconv.tensors import decode_weight
from tests.contract.stock import MOE_CASES, load, logits, save_stock
from tests.contract.test_shapes import with_tensors
from tests.tiny import edit_json

torch.set_num_threads(1)

# name -> (layout of compressed-tensors, its `weights`): what that library itself packs
COMPRESSED = {
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}),
    "int4-asymmetric": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int8-asymmetric-channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "w8a8-asymmetric": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 32]},
    ),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4-rows": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
}
OURS = {
    "int4-ours": ("qwen3_moe", {"format": "compressed-tensors", "scheme": "int4"}),
    "int8-ours": ("qwen3_moe", {"format": "compressed-tensors", "scheme": "int8", "group_size": "channel"}),
    "nf4": ("qwen3_moe", {"format": "bitsandbytes", "scheme": "nf4"}),
    "fp4-nested": ("qwen3_moe", {"format": "bitsandbytes", "scheme": "fp4", "double_quant": True}),
    "llm-int8": ("qwen3_moe", {"format": "bitsandbytes", "scheme": "int8"}),
    "nf4-all-linear": ("mixtral", {"format": "bitsandbytes", "scheme": "nf4", "scope": "all-linear"}),
    "nf4-stacked": ("granitemoe", {"format": "bitsandbytes", "scheme": "nf4", "double_quant": True}),
    "llm-int8-stacked": ("gpt_oss", {"format": "bitsandbytes", "scheme": "int8"}),
}
FP8 = {"fp8": [32, 32], "fp8-ragged": [24, 40], "fp8-whole": None}
FORMS = [*COMPRESSED, *OURS, *FP8, "mxfp4"]


def library(layout: str, weights: dict):
    """(compressor, scheme) of compressed-tensors."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**({"type": "int", "symmetric": True, "dynamic": False} | weights))
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    return BaseCompressor.get_value_from_registry(layout), scheme


def packed_by_library(weight: torch.Tensor, layout: str, weights: dict) -> dict[str, torch.Tensor]:
    """The tensors that compressed-tensors stores for a weight, scales and zero points drawn at random."""
    compressor, scheme = library(layout, weights)
    rows, columns = weight.shape
    args = scheme.weights
    grid = {
        "tensor": (1,),
        "channel": (rows, 1),
        "block": args.block_structure and tuple(-(-n // b) for n, b in zip((rows, columns), args.block_structure)),
    }.get(str(args.strategy), (rows, columns // (args.group_size or columns)))
    scale = torch.rand(grid) * 0.02 + 0.01
    state = {"weight": weight, "weight_scale": scale.bfloat16()}
    if layout == "nvfp4-pack-quantized":
        state |= {"weight_scale": (scale * 448).to(torch.float8_e4m3fn).bfloat16()}
        state |= {"weight_global_scale": torch.tensor([300.0])}
    if layout == "mxfp4-pack-quantized":
        state |= {"weight_scale": torch.exp2(torch.randint(-8, -3, grid).float())}
    if not args.symmetric:
        half = 1 << (args.num_bits - 1)
        state["weight_zero_point"] = torch.randint(-half, half, grid, dtype=torch.int8)
    return compressor.compress(state, scheme)


def rewritten(path: Path, change, quantization: dict) -> Path:
    """The checkpoint with its experts' matrices passed through `change(weight) -> {suffix for .weight: tensor}`."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    made = {}
    for name, tensor in tensors.items():
        parts = change(tensor) if ".experts." in name else {"": tensor}
        stem = name.removesuffix("weight") if ".experts." in name else name
        made |= {stem + part: t.contiguous() for part, t in parts.items()}
    save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    edit_json(path / "config.json", quantization_config=quantization)
    return path


def fp8_blocks(weight: torch.Tensor, block: list[int] | None) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    high, wide = block or weight.shape
    grid = (-(-rows // high), -(-columns // wide)) if block else ()
    scale = torch.rand(grid) * 0.01 + 0.001
    full = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns] if block else scale
    return {"weight": (weight.float() / full).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def compressed_config(layout: str, weights: dict) -> dict:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "dynamic": False} | weights}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory):
    """A function from a form's name to a model stored in it; each is made once."""
    root, made = tmp_path_factory.mktemp("stored"), {}

    def make(form: str) -> Model:
        torch.manual_seed(0)
        if form == "mxfp4":
            from tests.unit.test_stored_floats import make_mxfp4

            return open_model(make_mxfp4(root / form))
        case, parameters = OURS.get(form, ("qwen3_moe", {}))
        source = save_stock(root / f"{form}-plain", *MOE_CASES[case], dtype=torch.bfloat16)
        if form in OURS:
            model = open_model(source)
            execute(plan_quantize(model, **parameters), source=model.checkpoint, out=root / form)
            return open_model(root / form)
        if form in FP8:
            said = {"quant_method": "fp8", "weight_block_size": FP8[form]}
            return open_model(rewritten(source, lambda w: fp8_blocks(w, FP8[form]), said))
        return open_model(
            rewritten(source, lambda w: packed_by_library(w, *COMPRESSED[form]), compressed_config(*COMPRESSED[form]))
        )

    def once(form: str) -> Model:
        if form not in made:
            made[form] = make(form)
        return made[form]

    return once


def without(model: Model, name: str):
    other = with_tensors(model.checkpoint)
    other.tensors = {n: ref for n, ref in other.tensors.items() if n != name}
    return other


@pytest.mark.parametrize("form", FORMS)
def test_every_part_that_is_missing_or_misshapen_is_named(stored, form: str) -> None:
    model = stored(form)
    weights = {}
    for weight, found in model.stored.items():  # one of every kind of weight
        weights.setdefault(model.roles[next(iter(found.parts.values()))].key, (weight, found))
    assert {key.partition(".")[0] for key in weights} >= {"expert"}
    for weight, found in weights.values():
        assert len(found.parts) > 1
        for part, name in found.parts.items():
            ref = model.checkpoint.tensors[name]
            with pytest.raises(InputError) as raised:
                open_model(without(model, name))
            assert f"'{name}'" in raised.value.message, (part, raised.value.message)
            other = "F64" if ref.dtype != "F64" else "F32"
            wrong = [replace(ref, dtype=other), replace(ref, shape=(*ref.shape, 3))]
            wrong += [replace(ref, shape=(2 * ref.shape[0], *ref.shape[1:]))] if ref.shape and part != "state" else []
            for bad in wrong:
                with pytest.raises(InputError) as raised:
                    open_model(with_tensors(model.checkpoint, **{name: bad}))
                assert f"'{name}'" in raised.value.message or f"'{weight}'" in raised.value.message, part


@pytest.mark.parametrize("form", FORMS)
def test_a_part_that_does_not_belong_is_named(stored, form: str) -> None:
    """Of another form, or beside a weight that is stored plain."""
    model = stored(form)
    weight, found = next(iter(model.stored.items()))
    alien = weight.removesuffix(".weight") + (".weight_g_idx" if weight.endswith(".weight") else ".nested_offset")
    ref = replace(model.checkpoint.tensors[next(iter(found.parts.values()))], name=alien)
    with pytest.raises(InputError) as raised:
        open_model(with_tensors(model.checkpoint, **{alien: ref}))
    assert f"'{alien}' is not expected" in raised.value.message
    if "embedding.lm_head" in {role.key for role in model.roles.values()}:
        head = replace(ref, name="lm_head.weight_scale", dtype="F32", shape=(1,))
        with pytest.raises(InputError, match="lm_head"):
            open_model(with_tensors(model.checkpoint, **{head.name: head}))


@pytest.mark.slow
def test_every_form_is_tried(stored) -> None:
    tried = {found.encoding.name for form in FORMS for found in stored(form).stored.values()}
    elsewhere = {name for name in PARTS if name.startswith("mlx-")} | {"gptq", "gptq-v2", "awq", "mxfp8-rows"}
    elsewhere.add("nvfp4-modelopt")  # test_modelopt.py
    assert tried | elsewhere == set(PARTS) and not tried & elsewhere


@pytest.mark.parametrize("form", COMPRESSED)
def test_it_decodes_as_compressed_tensors_does_also_after_a_prune(stored, tmp_path: Path, form: str) -> None:
    model = stored(form)
    compressor, scheme = library(*COMPRESSED[form])
    for weight, found in list(model.stored.items())[::7]:
        stem = weight.removesuffix("weight")
        tensors = load_file(model.checkpoint.path / "model.safetensors")
        state = {n.removeprefix(stem): tensors[n] for n in found.parts.values()}
        theirs = compressor.decompress(state, scheme)["weight"]
        ours = decode_weight(model, weight)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        counted = sum(model.numel(model.checkpoint.tensors[name]) for name in found.parts.values())
        assert counted == math.prod(found.shape) == ours.numel()
    kept = {layer: [1, 2, 4, 5] for layer in model.moe_layers}
    execute(plan_prune(model, keep=4, keep_experts=kept), source=model.checkpoint, out=tmp_path / "pruned")
    pruned = open_model(tmp_path / "pruned")
    first = next(iter(pruned.stored)).replace("experts.1.", "experts.0.")
    assert torch.equal(decode_weight(pruned, first), decode_weight(model, first.replace("experts.0.", "experts.1.")))


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("form", FORMS)
def test_it_decodes_to_a_plain_model_that_stock_transformers_runs(stored, tmp_path: Path, form: str) -> None:
    model = stored(form)
    execute(plan_decode(model), source=model.checkpoint, out=tmp_path / "plain")
    plain = open_model(tmp_path / "plain")
    assert not plain.stored and plain.quantization is None
    for weight in list(model.stored)[::11]:
        assert torch.equal(decode_weight(model, weight, torch.bfloat16), decode_weight(plain, weight))
    assert torch.isfinite(logits(load(tmp_path / "plain", dtype=torch.bfloat16))).all()


def test_blocks_are_those_that_config_says(stored, tmp_path: Path, cli) -> None:
    """The size is read, not guessed from the shapes of the scales; without the key it is transformers' 128 x 128."""
    path = shutil.copytree(stored("fp8-ragged").checkpoint.path, tmp_path / "model")
    quantization = json.loads((path / "config.json").read_text())["quantization_config"]
    for said in ({"weight_block_size": [32, 32]}, {"weight_block_size": None}, {}):
        told = {k: v for k, v in quantization.items() if k != "weight_block_size"} | said
        edit_json(path / "config.json", quantization_config=told)
        with pytest.raises(InputError, match="weight_scale_inv' is F32"):
            open_model(path)
    for said in ([32], ["a", 32], 32, [0, 32]):
        edit_json(path / "config.json", quantization_config=quantization | {"weight_block_size": said})
        with pytest.raises(InputError, match="weight_block_size must be two whole numbers"):
            open_model(path)


def test_fp8_is_not_decoded_bare(stored, tmp_path: Path, cli) -> None:
    """Neither without its scale, nor where config.json does not say that it has one."""
    model = stored("fp8")
    path = shutil.copytree(model.checkpoint.path, tmp_path / "model")
    edit_json(path / "config.json", drop=("quantization_config",))
    with pytest.raises(InputError, match=r"weight_scale_inv' is not part|no quantization_config"):
        open_model(path)
    name = "model.layers.1.mlp.experts.5.up_proj.weight_scale_inv"
    tensors = load_file(model.checkpoint.path / "model.safetensors")
    path = shutil.copytree(model.checkpoint.path, tmp_path / "lost")
    save_file({n: t for n, t in tensors.items() if n != name}, path / "model.safetensors", metadata={"format": "pt"})
    checked = cli("verify", path, "--load", "--json")
    assert checked.code == 5 and name in checked.json["problems"][0] and checked.json["loads"]["transformers"] is False
    (tmp_path / "text").write_text("some words " * 50)
    for command in (
        ("evaluate", path, "--data", tmp_path / "text"),
        ("prune", path, tmp_path / "out", "--keep", 4, "--criterion", "random"),
        ("quantize", path, tmp_path / "out", "--requantize"),
        ("inspect", path),
    ):
        refused = cli(*command, "--json")
        assert refused.code == 3 and name in refused.json["error"]["message"], command
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["int4-ours", "nf4", "nf4-stacked"])
def test_verify_reads_what_no_header_shows(stored, tmp_path: Path, cli, form: str) -> None:
    """The shape that a weight states beside its codes."""
    model = stored(form)
    path = shutil.copytree(model.checkpoint.path, tmp_path / "model")
    (path / "moeconv_manifest.json").unlink()
    assert cli("verify", path, "--json").json["problems"] == []
    weight, found = next(iter(model.stored.items()))
    part = "shape" if "shape" in found.parts else "state"
    file = path / model.checkpoint.tensors[found.parts[part]].shard
    tensors = load_file(file)
    said = tensors[found.parts[part]]
    if part == "shape":
        tensors[found.parts[part]] = said * torch.tensor([2, 1])
    else:
        fields = json.loads(bytes(said.numpy())) | {"shape": [2 * found.shape[-2], found.shape[-1] // 2]}
        text = json.dumps(fields).ljust(len(said)).encode()
        tensors[found.parts[part]] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    assert f"'{weight}' states the shape" in cli("verify", path, "--json").json["problems"][0]
    with pytest.raises(InputError, match=r"cannot be decoded|decodes to shape"):
        decode_weight(open_model(path), weight)
    assert set(SHARED) >= {"state"}


def test_a_quantized_router_and_codes_in_another_storage_are_said_to_be_that(stored, tmp_path: Path) -> None:
    model = stored("fp8")
    name = "model.layers.0.mlp.gate.weight"
    ref = model.checkpoint.tensors[name]
    scale = replace(ref, name=name + "_scale_inv", dtype="F32", shape=(1, 2))
    with pytest.raises(Unsupported, match="the router of layer 0 is quantized"):
        open_model(with_tensors(model.checkpoint, **{name: replace(ref, dtype="F8_E4M3"), scale.name: scale}))
    path = shutil.copytree(stored("nf4").checkpoint.path, tmp_path / "model")
    quantization = json.loads((path / "config.json").read_text())["quantization_config"]
    edit_json(path / "config.json", quantization_config=quantization | {"bnb_4bit_quant_storage": "bfloat16"})
    with pytest.raises(Unsupported, match="stored as bfloat16"):
        open_model(path)
