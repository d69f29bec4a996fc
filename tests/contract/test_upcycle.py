"""Contract: every dense row and every pair, converted by the real command and run by stock transformers."""

from __future__ import annotations

import json

import pytest
import torch

from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.inspect.step import inspect
from moeconv.options import ReadOptions
from moeconv.plan.meter import SilentMeter
from moeconv.requests import InspectRequest
from moeconv.stream.layers import LayerStream
from moeconv.tensors import read_tensor
from tests.contract.stock import CASES, DENSE_CASES, REFUSED, STOCK_PAIRS, load, logits, relative_difference, save_stock

torch.set_num_threads(1)
EVERY_PAIR = [
    pytest.param(case, pair, id=f"{case}->{pair.target}")
    for case, (model_type, _, targets) in CASES.items()
    for pair in tables().pairs
    if pair.source == model_type and (not targets or pair.target in targets)
]


def test_every_pair_is_converted_below():
    covered = {(pair.source, pair.target) for _, pair in (p.values for p in EVERY_PAIR)}
    assert covered == {(p.source, p.target) for p in STOCK_PAIRS}
    assert len(covered) >= 40


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize(("case", "pair"), EVERY_PAIR)
def test_copies_compute_what_the_dense_model_computes(tmp_path, cli, dense, case, pair):
    source, before = dense(case)
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--to", pair.target, "--no-check", "--json")
    assert done.code == 0, done.out
    assert done.json["upcycle"]["exact"]
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == pair.target
    difference = relative_difference(before, logits(moe))
    print(f"{case} -> {pair.target}: {difference:.1e}")
    assert difference <= pair.tolerance
    assert (
        inspect(InspectRequest(str(tmp_path / "moe"), ReadOptions()), meter=SilentMeter())["moe_layers"]
        == done.json["upcycle"]["moe_layers"]
    )
    assert done.json["upcycle"]["moe_layers"] == [i for i, kind in enumerate(_ffn_kinds(moe.config)) if kind != "none"]


def _ffn_kinds(config):
    """What each layer has of an FFN: in a family of one block a layer that is the block's kind."""
    kinds = getattr(config, "layer_types", None) or []
    words = {"moe": "moe", "mlp": "dense"}
    return [words.get(kind, "none") for kind in kinds] if "moe" in kinds else ["moe"] * config.num_hidden_layers


def _bf16_logits(tmp_path, cli, case, *flags):
    """Logits of a dense bf16 model and of its upcycled twin, the experts run by grouped_mm."""
    model_type, config = DENSE_CASES[case]
    source = save_stock(tmp_path / "dense", model_type, config, dtype=torch.bfloat16)
    assert cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--no-check", "-q", *flags).code == 0
    moe = load(tmp_path / "moe", dtype=torch.bfloat16, experts="grouped_mm")
    return logits(load(source, dtype=torch.bfloat16)), logits(moe)


@pytest.mark.parametrize("case", ["llama", "llama-tied", "mistral-sliding", "qwen2-sliding", "qwen3"])
def test_bf16_logits_are_bit_equal_at_top_1(tmp_path, cli, case):
    dense, moe = _bf16_logits(tmp_path, cli, case, "--top-k", 1)
    assert torch.equal(dense, moe)


@pytest.mark.parametrize("case", ["llama", "llama-tied", "mistral", "mistral-sliding"])
def test_bf16_logits_are_bit_equal_at_top_2_where_weights_stay_float32(tmp_path, cli, case):
    dense, moe = _bf16_logits(tmp_path, cli, case, "--top-k", 2)
    assert torch.equal(dense, moe)


@pytest.mark.parametrize("case", ["qwen2", "qwen2-sliding", "qwen3", "qwen3-tied"])
def test_bf16_logits_are_bit_equal_at_top_2_with_a_small_router(tmp_path, cli, case):
    # transformers rounds these families' expert weights to bf16; only equal weights (1/2) survive that exactly
    dense, moe = _bf16_logits(tmp_path, cli, case, "--top-k", 2, "--router-std", 1e-4)
    assert torch.equal(dense, moe)


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_bf16_logits_differ_by_rounding_alone_with_the_default_router(tmp_path, cli, case):
    dense, moe = _bf16_logits(tmp_path, cli, case, "--top-k", 2)
    assert relative_difference(dense.float(), moe.float()) < 0.05


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_the_target_cannot_express_is_refused_by_name(tmp_path, cli, case):
    model_type, config, target, word = REFUSED[case]
    source = save_stock(tmp_path / "dense", model_type, config, dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "moe", *(["--to", target] if target else []), "--json")
    assert done.code == 3
    assert word in done.json["error"]["message"]
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("case", "target", "layers", "said"),
    [
        ("qwen2", "qwen2_moe", "0,2", {"mlp_only_layers": [1]}),
        ("qwen3", "qwen3_moe", "0,2", {"mlp_only_layers": [1]}),
        ("llama", "qwen2_moe", "0,2", {"mlp_only_layers": [1]}),
        ("qwen3", "mellum", "0,2", {"mlp_layer_types": ["sparse", "dense", "sparse"]}),
        ("qwen3", "hy_v3", "1", {"mlp_layer_types": ["dense", "sparse", "dense"]}),
        ("nemotron_h", "nemotron_h", "3", {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"]}),
        ("cohere2", "cohere2_moe", "0,2", {"mlp_layer_types": ["sparse", "dense", "sparse"]}),
        ("glm", "glm4_moe", "1,2", {"first_k_dense_replace": 1}),
        ("qwen3", "dots1", "2", {"first_k_dense_replace": 2}),
        ("lfm2", "lfm2_moe", "1,2", {"num_dense_layers": 1}),
        ("minicpm3", "deepseek_v3", "1,2", {"first_k_dense_replace": 1}),
        ("ernie4_5", "ernie4_5_moe", "0,1", {"moe_layer_start_index": 0, "moe_layer_end_index": 1}),
    ],
)
def test_chosen_layers_stay_dense_through_native_config(tmp_path, cli, dense, case, target, layers, said):
    source, before = dense(case)
    arguments = ("--experts", 4, "--layers", layers, "--to", target, "--no-check", "--json")
    done = cli("upcycle", source, tmp_path / "moe", *arguments)
    assert done.code == 0, done.out
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert {key: config[key] for key in said} == said
    assert relative_difference(before, logits(load(tmp_path / "moe"))) <= 1e-5
    assert inspect(InspectRequest(str(tmp_path / "moe"), ReadOptions()), meter=SilentMeter())["moe_layers"] == [
        int(i) for i in layers.split(",")
    ]


@pytest.mark.parametrize("case", ["phi3-partial-longrope", "helium", "stablelm", "llama-mlp-bias", "hunyuan_v1_dense"])
def test_movements_and_halves_are_exact_in_bfloat16(tmp_path, cli, case):
    """The written weights hold the source's values bit for bit, so float32 arithmetic sees the same function."""
    model_type, config, targets = CASES[case]
    source = save_stock(tmp_path / "dense", model_type, config, dtype=torch.bfloat16)
    to = ("--to", targets[0]) if targets else ()
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, *to, "--no-check", "--json").json
    difference = relative_difference(logits(load(source)), logits(load(tmp_path / "moe")))
    assert done["upcycle"]["exact"] == (difference <= 1e-5)
    assert done["upcycle"]["exact"] or any("float32" in text for text in done["warnings"])


@pytest.mark.parametrize("case", ["gemma", "minicpm3", "olmo", "nemotron"])
def test_folds_round_in_bfloat16_and_say_so_and_are_exact_in_float32(tmp_path, cli, case):
    model_type, config = DENSE_CASES[case]
    source = save_stock(tmp_path / "dense", model_type, config, dtype=torch.bfloat16)
    before = logits(load(source))
    for dtype in ("bfloat16", "float32"):
        out = tmp_path / dtype
        done = cli("upcycle", source, out, "--experts", 4, "--dtype", dtype, "--no-check", "--json").json
        difference = relative_difference(before, logits(load(out)))
        assert done["upcycle"]["exact"] == (dtype == "float32") == (difference <= 1e-5)
        assert any("--dtype float32" in text for text in done["warnings"]) == (dtype == "bfloat16")


@pytest.mark.parametrize(
    ("case", "target"),
    [("llama", "granitemoe"), ("llama", "gpt_oss"), ("llama", "aria_text"), ("olmo-clip", "dbrx")],
)
def test_packed_experts_are_inspected_and_not_taken_for_separate_ones(tmp_path, cli, case, target):
    source = save_stock(tmp_path / "dense", *DENSE_CASES[case], dtype=torch.bfloat16)
    assert cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--to", target, "--no-check", "-q").code == 0
    seen = inspect(InspectRequest(str(tmp_path / "moe"), ReadOptions()), meter=SilentMeter())
    dense = 3 * 96 * 64 * 3  # gate, up and down of three layers
    biases = 3 * (2 * 96 + 64) if target == "gpt_oss" else 0
    assert seen["num_experts"] == 4
    assert seen["parameters"]["experts"] == 4 * (dense + biases)
    done = cli("quantize", tmp_path / "moe", tmp_path / "out", "--json")
    if target == "granitemoe":  # vLLM loads it with separate names
        assert done.code == 0 and any("stacks them and does not load" in text for text in done.json["warnings"])
        return
    assert done.code == 3
    assert "one tensor" in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["noise", "drop"])
@pytest.mark.parametrize("target", ["mixtral", "granitemoe", "gpt_oss"])
def test_packed_experts_are_drawn_as_separate_ones_are(tmp_path, cli, dense, method, target):
    source, before = dense("llama")
    arguments = ("--experts", 4, "--method", method, "--to", target, "--no-check", "-q")
    assert cli("upcycle", source, tmp_path / target, *arguments).code == 0
    assert cli("upcycle", source, tmp_path / "apart", *arguments, "--to", "mixtral").code == 0
    apart, packed = logits(load(tmp_path / "apart")), logits(load(tmp_path / target))
    assert relative_difference(apart, packed) <= 1e-5
    assert relative_difference(before, packed) > 1e-3


def test_a_target_without_dense_layers_refuses_to_leave_one(tmp_path, cli):
    source = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "moe", "--layers", "0", "--no-check", "--json")
    assert done.code == 3
    assert "dense" in done.json["error"]["message"]


def test_layers_without_an_ffn_are_left_as_they_are_and_cannot_be_asked_for(tmp_path, cli):
    source = save_stock(tmp_path / "dense", *DENSE_CASES["nemotron_h"], dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "moe", "--layers", "0,1", "--no-check", "--json")
    assert done.code == 3
    assert "layer 0 has no FFN" in done.json["error"]["message"]
    planned = cli("upcycle", source, tmp_path / "moe", "--dry-run", "--json").json
    assert planned["upcycle"]["moe_layers"] == [1, 3]


@pytest.mark.slow
def test_a_router_with_a_norm_of_its_own_reads_what_the_ffn_reads(tmp_path, cli):
    source = save_stock(tmp_path / "dense", *DENSE_CASES["gemma4_text"], dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--json").json
    assert done["upcycle"]["equivalence"]["all_on"]["relative"] <= 1e-3
    model = open_model(tmp_path / "moe")
    for layer in LayerStream(model, torch.arange(3, 43).view(2, 20)).layers():
        for batch in layer.batches():
            expected = batch.ffn_input @ read_tensor(model.checkpoint, model.router_name(layer.index)).T
            assert torch.allclose(batch.router_logits, expected, atol=1e-5)


@pytest.mark.slow
def test_what_one_norm_more_makes_of_small_outputs_is_refused_with_the_reason(tmp_path, cli):
    model_type, config = DENSE_CASES["gemma4_text"]
    source = save_stock(tmp_path / "dense", model_type, config | {"rms_norm_eps": 0.1}, dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--json")
    assert done.code == 5 and not (tmp_path / "moe").exists()
    assert "differs from its source" in done.json["error"]["message"]
    assert "variance is not well above rms_norm_eps" in done.json["error"]["hint"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["noise", "drop"])
def test_methods_that_change_the_function_load_and_differ_between_experts(tmp_path, cli, method):
    source = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    assert cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--method", method, "--no-check", "-q").code == 0
    dense, moe = load(source), load(tmp_path / "moe")
    assert relative_difference(logits(dense), logits(moe)) > 1e-3
    experts = moe.model.layers[0].mlp.experts.down_proj
    assert not torch.equal(experts[0], experts[1])


def test_drop_redraws_the_same_neurons_in_gate_up_and_down(tmp_path, cli):
    source = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    arguments = ("--experts", 2, "--method", "drop", "--drop-ratio", 0.25, "--no-check", "-q")
    assert cli("upcycle", source, tmp_path / "moe", *arguments).code == 0
    mlp = load(source).model.layers[1].mlp
    experts = load(tmp_path / "moe").model.layers[1].mlp.experts
    for e in range(2):
        gate, up = experts.gate_up_proj[e].chunk(2)
        changed = (gate != mlp.gate_proj.weight).any(1)
        assert changed.sum() == 24  # a quarter of 96
        assert torch.equal(changed, (up != mlp.up_proj.weight).any(1))
        assert torch.equal(changed, (experts.down_proj[e] != mlp.down_proj.weight).any(0))


@pytest.mark.slow
def test_the_check_before_the_commit_runs_and_reports(tmp_path, cli):
    source = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--json")
    assert done.code == 0, done.out
    check = done.json["upcycle"]["equivalence"]
    assert check["checked"] is True
    assert check["tokens"] > 0
    assert check["relative"] <= 1e-5
