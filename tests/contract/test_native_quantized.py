"""Contract: checkpoints that their vendors publish quantized: Kimi-K2-Thinking, Kimi-K2.5, DeepSeek-V3.2, GLM-5."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
import transformers

from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.quantize.decode import plan_decode
from moeconv.stream.layers import LayerStream
from moeconv.versions import OLDEST_PACKED, release
from tests.contract.stock import MOE_CASES, dropped, load, logits, relative_difference, save_stock
from tests.contract.test_stored_parts import compressed_config, fp8_blocks, packed_by_library, rewritten
from tests.tiny import edit_json

pytestmark = pytest.mark.usefixtures("one_thread")
INT4 = ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32})
MXFP4 = ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32})
# as config.json of Kimi-K2-Thinking and K2.5 lists them
IGNORED = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
SOURCES = [
    ("deepseek_v3", "int4"), ("kimi_k25", "int4"), ("deepseek_v32", "fp8"), ("glm_moe_dsa", "fp8"),
    ("glm_moe_dsa", "mxfp4"),
]  # fmt: skip


def _source(path, case: str, form: str):
    torch.manual_seed(0)
    plain = save_stock(path, *MOE_CASES[case], dtype=torch.bfloat16)
    if form == "fp8":
        stated = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
        return rewritten(plain, lambda weight: fp8_blocks(weight, [32, 32]), stated)
    packing = INT4 if form == "int4" else MXFP4
    stated = compressed_config(*packing) | {"ignore": IGNORED, "quantization_status": "compressed"}
    rewritten(plain, lambda weight: packed_by_library(weight, *packing), stated)
    config = json.loads((plain / "config.json").read_text())
    if case == "kimi_k25":  # Moonshot states it in the part of the language model
        text = config["text_config"] | {"model_type": "kimi_k2", "quantization_config": stated}
        edit_json(plain / "config.json", drop=["quantization_config"], text_config=text)
    elif form == "int4":
        edit_json(plain / "config.json", model_type="kimi_k2")
    return plain


@pytest.fixture(params=SOURCES, ids=lambda source: "-".join(source))
def source(request, tmp_path):
    return _source(tmp_path / "source", *request.param)


def _decoded(model, out):
    execute(plan_decode(model), source=model.checkpoint, out=out)
    return out


def test_it_is_inspected_streamed_and_pruned_as_it_lies_on_disk(tmp_path, cli, source):
    found = cli("inspect", source, "--json")
    assert found.code == 0 and found.json["quantization"]["roles"] == ["expert"], found.out
    model = open_model(source)
    plain = load(_decoded(model, tmp_path / "plain"), dtype=torch.bfloat16)
    decoded = cli("inspect", tmp_path / "plain", "--json").json
    assert found.json["parameters"] == decoded["parameters"] and decoded["quantization"] is None
    ids = np.random.default_rng(0).integers(3, 128, (2, 12))
    streamed = torch.cat([out for _, out in LayerStream(model, ids, dtype=torch.bfloat16).run().logits()])
    with torch.no_grad():
        assert torch.equal(streamed, torch.cat([plain(torch.tensor(ids[i : i + 1])).logits for i in range(2)]))
    done = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert done.code == 0, done.out
    kept = done.json["prune"]["keep"]
    before, after = tiny.read_tensors(source), tiny.read_tensors(tmp_path / "out")
    pruned = open_model(tmp_path / "out")
    for weight, stored in pruned.stored.items():
        role = pruned.roles[next(iter(stored.parts.values()))]
        old = weight.replace(f"experts.{role.expert}.", f"experts.{kept[str(role.layer)][role.expert]}.")
        for name in stored.parts.values():
            assert after[name] == before[name.replace(weight.removesuffix("weight"), old.removesuffix("weight"))]
    plain = load(tmp_path / "plain")
    with dropped(plain, open_model(tmp_path / "plain"), kept):
        masked = logits(plain)
    again = load(_decoded(pruned, tmp_path / "pruned-plain"), dtype=torch.float32)
    assert relative_difference(masked, logits(again)) <= 1e-5


def test_requantize_decodes_it(tmp_path, cli, source):
    refused = cli("quantize", source, tmp_path / "out", "--json")
    assert refused.code == 3 and "--requantize" in refused.json["error"]["hint"]
    flags = ("--format", "bitsandbytes", "--json")
    done = cli("quantize", source, tmp_path / "out", "--requantize", *flags)
    assert done.code == 0, done.out
    _decoded(open_model(source), tmp_path / "plain")
    assert cli("quantize", tmp_path / "plain", tmp_path / "two", *flags).code == 0
    assert tiny.read_tensors(tmp_path / "out") == tiny.read_tensors(tmp_path / "two")
    if release(transformers.__version__) >= OLDEST_PACKED:
        import moeconv.hf  # noqa: F401

        load(tmp_path / "out", dtype=torch.bfloat16)
