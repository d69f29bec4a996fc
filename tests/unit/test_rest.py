"""--rest: the layers that --scope leaves out, in a scheme and a config group of their own."""

from __future__ import annotations

import re

import pytest
from tiny import make_moe

from moeconv.errors import InputError, UsageError
from moeconv.families.model import open_model
from moeconv.families.module_groups import groups_of
from moeconv.plan.execute import execute
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.planner import plan_quantize
from moeconv.quantize.proof import prove_packing
from moeconv.quantize.rest import patterns
from tests.unit.test_mtp import make as make_mtp

PAIRS = [("int4", "fp8"), ("nvfp4", "fp8"), ("mxfp4", "w8a8"), ("nvfp4", "nvfp4"), ("int8", "int4")]


@pytest.fixture
def model(tmp_path):
    """A model with a dense layer, shared experts and a gate of theirs."""
    return open_model(make_moe(tmp_path / "m", "qwen2_moe", hidden=64, intermediate=128, layers=3, mlp_only_layers=[1]))


@pytest.mark.parametrize(("scheme", "rest"), PAIRS)
def test_both_schemes_are_read_back(tmp_path, model, scheme, rest):
    plan = plan_quantize(model, scheme=scheme, rest=rest)
    execute(plan, source=model.checkpoint, out=tmp_path / "out")
    found = prove_packing(plan, model, tmp_path / "out")
    assert found["counted"] == {"expert": 2 * 4 * 3, "shared": 2 * 3, "attention": 3 * 4, "ffn": 3}
    assert plan.block["rest"]["scheme"] == rest
    limit = max(FORMATS["compressed-tensors"].scheme(s).limit for s in (scheme, rest)) / 2
    assert all(row["max"] < limit for row in found["error"]["layers"])
    assert plan.promise == plan.changed


def test_modules_belong_to_their_group_and_also_those_that_an_engine_joins(model):
    config = plan_quantize(model, scheme="int4", rest="fp8").config["quantization_config"]
    groups = groups_of(config)
    experts, rest = "group_0", "group_1"
    for module, group in {
        "model.layers.0.mlp.experts.3.gate_proj": experts,
        "model.layers.0.self_attn.q_proj": rest,
        "model.layers.2.self_attn.qkv_proj": rest,
        "model.layers.0.mlp.shared_expert.gate_up_proj": rest,
        "model.layers.1.mlp.down_proj": rest,
        "model.layers.0.mlp.experts": experts,
        "model.layers.0.mlp.gate": None,
        "model.layers.0.mlp.shared_expert_gate": None,
        "lm_head": None,
    }.items():
        assert groups.group_of(module) == group, module
    assert config["format"] == "mixed-precision"
    same = plan_quantize(model, scheme="fp8", rest="fp8").config["quantization_config"]
    assert same["format"] == "float-quantized"


def test_what_is_joined_shares_its_scale(model):
    plan = plan_quantize(model, scheme="int4", rest="nvfp4")
    reads = {
        item.outputs[0].name: [ref.tensor.rpartition("self_attn.")[2] for ref in item.inputs] for item in plan.items()
    }
    keys = reads["model.layers.0.self_attn.k_proj.weight_packed"]
    assert keys == ["k_proj.weight", "q_proj.weight", "v_proj.weight"]
    assert len(reads["model.layers.0.self_attn.o_proj.weight_packed"]) == 1


@pytest.mark.parametrize(
    ("parameters", "error", "says"),
    [
        ({"rest": "fp8", "format": "bitsandbytes"}, UsageError, "--rest cannot be combined with --format bitsandbytes"),
        ({"rest": "fp8", "scope": "all-linear"}, UsageError, "leaves no weight for --rest"),
        ({"rest": "nf4"}, UsageError, "--rest nf4"),
        ({"rest": "fp8-block"}, InputError, "128"),
        ({"rest": "w8a8", "target": ("transformers",)}, UsageError, "transformers cannot load"),
        ({"scheme": "nvfp4", "rest": "fp8", "target": ("transformers",)}, UsageError, "transformers cannot load"),
    ],
)
def test_what_cannot_be_combined_is_refused(model, parameters, error, says):
    with pytest.raises(error, match=says):
        plan_quantize(model, **parameters)


def test_a_layer_of_prediction_does_not_stand_for_one_that_lacks_the_module(tmp_path):
    """Shared experts in every layer but the first, and in the multi-token-prediction layer: as many as the model has
    layers."""
    path, _ = make_mtp(tmp_path / "moe", "glm4_moe", first_k_dense_replace=1)
    model = open_model(path)
    weights = [model.checkpoint.tensors[n] for n, r in model.roles.items() if r.key == "shared.gate"]
    assert len(weights) == model.num_layers
    (found,) = patterns(model, weights)
    modules = {layer: f"model.layers.{layer}.mlp.shared_experts.gate_proj" for layer in range(4)}
    matched = {layer for layer, name in modules.items() if re.match(found.removeprefix("re:"), name)}
    assert matched == {model.roles[ref.name].layer for ref in weights}
