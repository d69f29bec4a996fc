"""Contract: every MoE row pruned and quantized by the real command, then run by stock transformers."""

from __future__ import annotations

import json

import pytest
import torch

from moeconv.families.model import open_model
from tests.contract.stock import MOE_CASES, load, logits, relative_difference, save_stock

torch.set_num_threads(1)


def _mask_dropped(model, keep):
    """Give the dropped experts a router logit of minus infinity, in the stock model's own router modules."""
    for layer, kept in keep.items():
        gate = model.model.layers[int(layer)].mlp.gate
        gone = [e for e in range(gate.weight.shape[0]) if e not in kept]

        def forward(hidden, gate=gate, gone=gone):
            scores = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight)
            scores[:, gone] = -torch.inf
            weights = scores.softmax(-1, dtype=torch.float32)
            top, index = weights.topk(gate.top_k, dim=-1)
            if getattr(gate, "norm_topk_prob", True):
                top = top / top.sum(-1, keepdim=True)
            return scores, top.to(scores.dtype), index

        gate.forward = forward


@pytest.mark.parametrize("keep", [6, 4])
@pytest.mark.parametrize("case", list(MOE_CASES))
def test_pruned_equals_the_unpruned_with_the_dropped_experts_masked(tmp_path, cli, case, keep):
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    done = cli("prune", source, tmp_path / "pruned", "--keep", keep, "--json")
    assert done.code == 0, done.out
    kept = done.json["prune"]["keep"]
    assert all(len(experts) == keep for experts in kept.values())
    masked = load(source)
    _mask_dropped(masked, kept)
    assert relative_difference(logits(masked), logits(load(tmp_path / "pruned"))) <= 1e-5


@pytest.mark.parametrize("case", list(MOE_CASES))
def test_dry_run_states_the_bytes_that_are_written(tmp_path, cli, case):
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.bfloat16)
    steps = (("prune", "--keep", 4), ("quantize", "--format", "bitsandbytes"), ("quantize", "--bits", 8))
    for i, (verb, *flags) in enumerate(steps):
        out = tmp_path / f"out{i}"
        promised = cli(verb, source, out, *flags, "--dry-run", "--json").json
        done = cli(verb, source, out, *flags, "--json").json
        shards = [f for f in done["files"] if f.endswith(".safetensors")]
        assert promised["bytes"] == done["bytes"] == sum((out / f).stat().st_size for f in shards)
        assert promised["plan_id"] == done["plan_id"] or promised["prune"]["keep"] is None


def _dequantized(source, quantized, folder):
    """A stock bf16 checkpoint that holds the decoded weights of a quantized one."""
    from safetensors.torch import load_file, save_file

    from moeconv.tensors import decode_weight

    model = open_model(quantized)
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, role in open_model(source).roles.items():
        if role.group == "expert":
            tensors[name] = decode_weight(model, name, torch.bfloat16).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("case", list(MOE_CASES))
def test_compressed_tensors_load_in_transformers_as_the_decoded_weights(tmp_path, cli, case, scheme):
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.bfloat16)
    done = cli("quantize", source, tmp_path / "packed", "--scheme", scheme, "--json")
    assert done.code == 0, done.out
    assert done.json["quantize"]["group_size"] in (32, 64)
    plain = load(_dequantized(source, tmp_path / "packed", tmp_path / "plain"), dtype=torch.bfloat16)
    packed = load(tmp_path / "packed", dtype=torch.bfloat16)
    assert torch.equal(logits(plain), logits(packed))


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("case", list(MOE_CASES))
def test_bitsandbytes_load_packed_and_compute_the_decoded_weights(tmp_path, cli, case, scheme):
    import moeconv.hf  # noqa: F401 - registers the loader

    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.bfloat16)
    done = cli("quantize", source, tmp_path / "packed", "--format", "bitsandbytes", "--scheme", scheme, "--json")
    assert done.code == 0, done.out
    plain = load(_dequantized(source, tmp_path / "packed", tmp_path / "plain"), dtype=torch.bfloat16)
    packed = load(tmp_path / "packed", dtype=torch.bfloat16)
    assert torch.equal(logits(plain), logits(packed))
    stored = [p for n, p in packed.named_parameters() if ".experts." in n and p.dtype in (torch.uint8, torch.int8)]
    assert stored, "the experts are not packed in memory"
