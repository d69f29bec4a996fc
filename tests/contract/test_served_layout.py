"""Codes per expert for families whose class in transformers stacks the experts: written as vLLM reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.quantize.listing import formats_of
from moeconv.tensors import decode_weight, read_tensor
from tests.contract.stock import MOE_CASES, WRAPPED_CASES, row_of, save_stock

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = [case for case in MOE_CASES if row_of(case).tensors.served is not None]
CASES = {case: MOE_CASES[case] for case in ALONE} | {
    case: WRAPPED_CASES[case] for case in ("qwen3_vl_moe", "gemma4-vision", "llama4-vision", "step3p7")
}
# where vLLM's modules look for the experts of a layer (its model files, 0.32)
_MODULES = {
    "granite": "block_sparse_moe.experts",
    "gemma4": "experts",
    "qwen3": "mlp.experts",
    "llama4": "feed_forward.experts",
    "step3": "moe.experts",
}


def apart(source: Path, part: str, *, layer: int, expert: int) -> torch.Tensor:
    """One matrix of one expert of a stacked checkpoint, [out, in]."""
    model = open_model(source)
    key, way = next((k, w) for k, w in model.family.tensors.packed.items() if part in w.parts)
    whole = read_tensor(model.checkpoint, model.family.name(key, layer=layer))[expert]
    whole = whole.T if way.transposed else whole
    return whole.chunk(len(way.parts))[way.parts.index(part)].float()


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_every_expert_has_its_own_codes_under_the_names_of_the_engine(
    tmp_path: Path, cli: Any, case: str, scheme: str
) -> None:
    kind, config = CASES[case]
    inside = config.get("text_config", config)
    if "moe_intermediate_size" in inside:
        inside = inside | {"moe_intermediate_size": 32}  # int4 has groups of 32 weights at least
    config = config | {"text_config": inside} if "text_config" in config else inside
    source = Path(save_stock(tmp_path / "moe", kind, config, dtype=torch.bfloat16))
    flags = ("--format", "compressed-tensors", "--scheme", scheme)
    promised = cli("quantize", source, tmp_path / "out", *flags, "--dry-run", "--json").json
    done = cli("quantize", source, tmp_path / "out", *flags, "--json")
    assert done.code == 0 and done.json["bytes"] == promised["bytes"], done.out
    assert any("as vLLM reads the codes" in w for w in done.json["warnings"])
    assert done.json["quantize"]["loads"]["transformers"] == "no"
    model = open_model(tmp_path / "out")
    assert model.family.only_served and model.num_experts == 8
    limit = 0.2 if scheme == "int4" else 0.02
    module = next(path for start, path in _MODULES.items() if case.startswith(start))
    for layer in model.moe_layers:
        for expert in (0, 3, 7):
            for part in ("gate", "up", "down"):
                name = model.expert_name(part, layer=layer, expert=expert)
                assert name.endswith(f"layers.{layer}.{module}.{expert}.{part}_proj.weight")
                wanted = apart(source, part, layer=layer, expert=expert)
                found = decode_weight(model, name).float()
                assert 0 < float((found - wanted).norm() / wanted.norm()) < limit, "another expert's, or another part"
    assert cli("verify", tmp_path / "out").code == 0
    ignored = set((model.quantization or {})["ignore"])
    for layer in range(model.num_layers):  # vLLM fuses these three, also where the keys are the values
        modules = [f".{layer}.self_attn.{part}_proj" for part in "qkv"]
        assert sum(any(name.endswith(module) for name in ignored) for module in modules) in (0, 3)
    plain = {n for n, role in open_model(source).roles.items() if role.group != "expert"}
    assert all(model.checkpoint.read(n) == open_model(source).checkpoint.read(n) for n in plain)


def test_the_result_is_pruned_and_not_run(tmp_path: Path, cli: Any) -> None:
    source = save_stock(tmp_path / "moe", *MOE_CASES["granitemoe"], dtype=torch.bfloat16)
    assert cli("quantize", source, tmp_path / "out", "--format", "compressed-tensors").code == 0
    done = cli("prune", tmp_path / "out", tmp_path / "cut", "--keep", 4, "--criterion", "magnitude", "--json")
    assert done.code == 0, done.out
    before, after = open_model(tmp_path / "out"), open_model(tmp_path / "cut")
    for layer, kept in done.json["prune"]["keep"].items():
        for new, old in enumerate(kept):
            names = (m.expert_name("up", layer=int(layer), expert=e) for m, e in ((after, new), (before, old)))
            assert torch.equal(decode_weight(after, next(names)), decode_weight(before, next(names)))
    (tmp_path / "text").write_text("some words to measure on. " * 40)
    for words in (
        ("evaluate", tmp_path / "out", "--data", tmp_path / "text"),
        ("calibrate", tmp_path / "out", tmp_path / "stats", "--data", tmp_path / "text"),
    ):
        refused = cli(*words, "--json")
        assert refused.code == 3, refused.out
    with pytest.raises(Exception, match="in the layout of vLLM"):
        from moeconv.stream.layers import LayerStream

        LayerStream(before, torch.ones(1, 4, dtype=torch.int64))
    assert cli("verify", tmp_path / "out", "--load").code == 5


@pytest.mark.parametrize("words", [("--method", "gptq", "--data", "x")])
def test_what_no_engine_reads_stays_refused(tmp_path: Path, cli: Any, words: tuple[str, ...]) -> None:
    source = save_stock(tmp_path / "moe", *MOE_CASES["granitemoe"], dtype=torch.bfloat16)
    refused = cli("quantize", source, tmp_path / "out", *words, "--dry-run", "--json")
    assert refused.code == 3 and "granitemoe" in refused.json["error"]["message"], refused.out


def test_the_list_of_families_names_the_format() -> None:
    found = {case: formats_of(row_of(case)) for case in ("granitemoe", "gemma4", "gpt_oss", "llama4", "dbrx")}
    assert all(("compressed-tensors" in formats) == (case in ALONE) for case, formats in found.items())
    assert "bitsandbytes" in found["granitemoe"] and found["dbrx"] == ["gguf"]


def test_only_families_that_vllm_runs_have_such_names() -> None:
    for row in tables().families.values():
        if row.tensors.served is not None:
            assert row.tensors.served.readers == "vLLM", row.model_type
            assert "vllm" in row.elsewhere.runs or row.multimodal.text or row.model_type.endswith("_text"), (
                row.model_type
            )
