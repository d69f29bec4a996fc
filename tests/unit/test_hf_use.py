"""Packed experts in use: adapters of PEFT, offloading to disk, decoding, and the switches that people pass along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from packed import experts_of, load, make, stacked, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import moeconv.hf
from moeconv.hf.modules import PackedExperts, PackedLinear, encode, weight_of

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERT_WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    made = {}

    def get(scheme: str, **options):
        if scheme not in made:
            made[scheme] = make(tmp_path_factory.mktemp(scheme), "qwen3_moe", scheme, dtype=torch.float32, **options)[0]
        return made[scheme]

    return get


def adapted(model, seed: int = 0, **options):
    """The model with a LoRA whose both factors are random, so that it changes every output."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))
    return model


def logits(model, rows: int = 2, length: int = 7) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(rows, length)).logits


@pytest.mark.parametrize("scheme", ["nf4", "int8", "nf4-nested"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": EXPERT_WEIGHTS},
    ],
    ids=["all-linear", "projections", "parameters"],
)
def test_an_adapter_computes_on_packed_experts_what_it_computes_on_decoded_ones(packed, scheme, options):
    """For many tokens (every expert is hit) and for one (two of eight are)."""
    pytest.importorskip("peft")
    mine, theirs = load(packed(scheme)), load(packed(scheme)).dequantize()
    before = logits(mine)
    mine, theirs = adapted(mine, **options), adapted(theirs, **options)
    shapes = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (mine, theirs)]
    assert shapes[0] == shapes[1]
    assert any("experts" in name for name in shapes[0])
    for rows, length in ((2, 7), (1, 1)):
        torch.testing.assert_close(logits(mine, rows, length), logits(theirs, rows, length), rtol=1e-4, atol=1e-4)
    assert (logits(mine) - before).abs().max() > 0.1
    with mine.disable_adapter():
        assert torch.equal(logits(mine), before)


def test_an_adapter_trains_and_is_saved_and_loads_on_packed_and_on_plain_weights(packed, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(packed("nf4")), peft.LoraConfig(r=2, target_modules="all-linear"))
    codes = {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    ids = tokens(2, 9)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "experts" in n and "lora_B" in n)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert codes and all(torch.equal(p, codes[n]) for n, p in model.named_parameters() if n in codes)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(packed("nf4")), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    plain = peft.PeftModel.from_pretrained(load(packed("nf4")).dequantize(), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-4)
    exact = plain.merge_and_unload()
    torch.testing.assert_close(logits(exact), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-nested", "int8"])
def test_a_merged_adapter_is_rounded_to_the_packed_type_with_a_warning_and_can_be_taken_back(packed, scheme, tmp_path):
    pytest.importorskip("peft")
    model = load(packed(scheme))
    before = logits(model)
    model = adapted(model, target_modules=[], target_parameters=EXPERT_WEIGHTS)
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    base, name = wrapper.get_base_layer(), wrapper.parameter_name
    whole = weight_of(base, name, dtype=torch.float32) + wrapper.get_delta_weight("default")
    with pytest.warns(UserWarning, match="rounds them to the packed type again"):
        model.merge_adapter()
    held = weight_of(base, name, dtype=torch.float32)
    step = whole.abs().amax() / (127 if scheme == "int8" else 5)
    assert 0 < (held - whole).abs().max() < step
    again = encode(base.packed[name], whole, quant_map=base._buffers.get(name + "_quant_map"))
    assert torch.equal(again[""], base._parameters[name])
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    assert all(isinstance(module, PackedExperts) for module in experts_of(merged))
    wanted = logits(merged)
    assert not torch.equal(wanted, before)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), wanted)


def test_packed_linear_layers_take_adapters_too(tmp_path):
    import re

    pytest.importorskip("peft")
    folder, _ = make(
        tmp_path, "qwen3_moe", "nf4", dtype=torch.float32, also=re.compile(r"self_attn\.[qkvo]_proj\.weight$")
    )
    mine, theirs = load(folder), load(folder).dequantize()
    assert not any(isinstance(module, PackedLinear) for module in theirs.modules())
    mine, theirs = (adapted(m, target_modules="all-linear") for m in (mine, theirs))
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="rounds them"):
        mine.merge_and_unload()


def test_experts_in_one_tensor_take_adapters_too(tmp_path, cli):
    pytest.importorskip("peft")
    folder = stacked(tmp_path, cli)
    mine, theirs = load(folder, dtype=torch.float32), load(folder, dtype=torch.float32).dequantize()
    options = {"target_modules": [], "target_parameters": EXPERT_WEIGHTS}
    mine, theirs = adapted(mine, **options), adapted(theirs, **options)
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-nested", "int8"])
def test_layers_on_disk_compute_and_are_saved(packed, scheme, tmp_path):
    wanted = logits(load(packed(scheme)))
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(packed(scheme), device_map=places, offload_folder=tmp_path / "disk")
    assert model.model.layers[1].mlp.experts._parameters["down_proj"].is_meta
    for _ in range(2):
        assert torch.equal(logits(model), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that what lies on disk must fit into memory
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), wanted)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_decoded_model_is_the_stock_one(packed, scheme, tmp_path):
    model = load(packed(scheme))
    wanted = logits(model)
    model = model.dequantize()
    assert not any(isinstance(module, PackedExperts) for module in model.modules())
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "decoded")
    assert "quantization_config" not in json.loads((tmp_path / "decoded" / "config.json").read_text())
    again = load(tmp_path / "decoded")
    assert torch.equal(logits(again), wanted)
    assert {type(m).__name__ for m in experts_of(again)} == {"Qwen3MoeExperts"}


@pytest.mark.parametrize("passed", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_bitsandbytes_config_passed_along_gives_way_to_the_checkpoints_own(packed, passed):
    wanted = logits(load(packed("nf4")))
    with pytest.warns(UserWarning, match="from the model will be used"):
        model = load(packed("nf4"), quantization_config=BitsAndBytesConfig(**passed))
    assert isinstance(experts_of(model)[0], moeconv.hf.PackedExperts)
    assert torch.equal(logits(model), wanted)


IMPLEMENTATIONS = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 11)[None]
for name in (None, "eager", "grouped_mm", "batched_mm"):
    chosen = {"experts_implementation": name} if name else {}
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **chosen)
    print(name, model.config._experts_implementation, bool(torch.isfinite(model(ids).logits).all()))
assert "moeconv" not in sys.modules
plain = model.dequantize()
plain.save_pretrained(sys.argv[2])
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[2])).__name__)
"""


@pytest.mark.slow
def test_self_contained_checkpoints_take_every_experts_implementation_and_decode(tmp_path, cli):
    from tiny import make_moe

    source = make_moe(tmp_path / "source", "qwen3_moe", hidden=64, intermediate=128)
    flags = ("--format", "bitsandbytes", "--self-contained", "--no-check", "-q")
    assert cli("quantize", source, tmp_path / "out", *flags).code == 0
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", IMPLEMENTATIONS, str(tmp_path / "out"), str(tmp_path / "plain")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:5] == [
        "None grouped_mm True", "eager eager True", "grouped_mm grouped_mm True", "batched_mm batched_mm True",
        "Qwen3MoeForCausalLM",
    ]  # fmt: skip


def test_a_transformers_that_cannot_build_packed_experts_is_named(monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, moeconv.hf.METHOD)
    monkeypatch.setattr("moeconv.hf.quantizer.transformers.__version__", "5.20.2")
    with pytest.raises(ImportError, match=r"need transformers 5\.23 or newer, and this is 5\.20\.2"):
        moeconv.hf.register()
