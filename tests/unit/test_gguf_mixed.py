"""GGUF with a type for every tensor of the experts within a budget, and with a type of its own for the other layers."""

from __future__ import annotations

import itertools

import pytest
from unit.test_gguf import floats, make, source_floats

from moeconv.errors import UsageError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.quantize.gguf.mixed import SENSITIVITY, MixedTensor, choose_types
from moeconv.quantize.gguf.types import BY_DTYPE
from moeconv.quantize.planner import plan_quantize
from moeconv.quantize.proof import prove_packing

gguf = pytest.importorskip("gguf")
IMPORTANCE = {0: 1.0, 1: 5.0, 2: 0.1}
KEYS = ("expert.gate", "expert.up", "expert.down")


@pytest.fixture
def path(tmp_path):
    return make(tmp_path / "m", "qwen3_moe", hidden=256, intermediate=512, layers=3)


def plan_of(path, **parameters):
    return plan_quantize(open_model(path), format="gguf", **{"scheme": "mixed", "importance": IMPORTANCE} | parameters)


def used_bits(plan) -> float:
    items = [item for item in plan.items() if item.changed == "expert"]
    return sum(i.nbytes for i in items) * 8 / sum(s.params for i in items for s in i.outputs)


@pytest.mark.parametrize("average", [2.7, 3.0, 3.5, 4.5, 5.5, 6.6])
def test_average_bits(path, average):
    plan = plan_of(path, average_bits=average)
    assert average - 0.45 < used_bits(plan) <= average
    types = plan.block["scheme_by_tensor"]
    assert len(types) == 9 and plan.block["bits_by_layer"] == {} and plan.block["scheme"] == "mixed"
    bits = {name: BY_DTYPE[kind.upper()].error for name, kind in types.items()}
    for role, layer in itertools.product(("gate", "up", "down"), range(3)):
        here = bits[f"blk.{layer}.ffn_{role}_exps.weight"]
        assert bits[f"blk.1.ffn_{role}_exps.weight"] <= here <= bits[f"blk.2.ffn_{role}_exps.weight"]
        assert bits[f"blk.{layer}.ffn_gate_exps.weight"] <= here <= bits[f"blk.{layer}.ffn_up_exps.weight"]
    if average >= 4.5:
        assert "q2_k" not in types.values()


def test_the_file_has_the_chosen_types_and_decodes(tmp_path, path):
    plan = plan_of(path, average_bits=3.4, rest="q8_0")
    model = open_model(path)
    execute(plan, source=model.checkpoint, out=tmp_path / "out")
    found = prove_packing(plan, model, tmp_path / "out")
    assert found["counted"] == {"expert": 3 * 4 * 3, "attention": 3 * 4} and plan.promise == found["counted"]
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    types = plan.block["scheme_by_tensor"]
    assert len(set(types.values())) > 1
    for name, kind in types.items():
        assert tensors[name].tensor_type.name == kind.upper()
    for tensor in (tensors["blk.1.attn_q.weight"], tensors["blk.0.attn_output.weight"]):
        assert tensor.tensor_type.name == "Q8_0"
    assert tensors["token_embd.weight"].tensor_type.name == "BF16"
    decoded = floats(tensors["blk.1.ffn_down_exps.weight"])[2]
    want = source_floats(path, "model.layers.1.mlp.experts.2.down_proj.weight")
    error = ((decoded - want) ** 2).mean() ** 0.5 / (want**2).mean() ** 0.5
    assert error < 2 * BY_DTYPE[types["blk.1.ffn_down_exps.weight"].upper()].error


def test_the_size_of_the_files_is_a_budget(path):
    sizes = [plan_of(path, average_bits=bits).nbytes for bits in (2.7, 6.6)]
    for limit in (sizes[0], sum(sizes) // 2, sizes[1]):
        plan = plan_of(path, max_bytes=str(limit))
        assert sizes[0] <= plan.nbytes <= limit
    with pytest.raises(UsageError, match="too small"):
        plan_of(path, max_bytes=str(sizes[0] // 2))


def test_widths_that_256_does_not_divide_have_the_types_that_fit(tmp_path):
    plan = plan_of(make(tmp_path / "narrow", "qwen3_moe", hidden=64, intermediate=64, layers=3), average_bits=5)
    assert set(plan.block["scheme_by_tensor"].values()) <= {"q4_0", "iq4_nl", "q5_0", "q5_1", "q8_0"}
    assert used_bits(plan) <= 5 and not [w for w in plan.warnings if "stored as" in w]


def test_no_choice_within_the_budget_is_better_by_more_than_one_upgrade():
    tensors = [MixedTensor(f"{layer} {key}", layer, key, (4, 8, 256)) for layer in (0, 1) for key in KEYS]
    dtypes = ("Q2_K", "Q3_K", "Q4_K", "Q6_K")
    options = [t.options(dtypes, IMPORTANCE[t.layer] / sum(IMPORTANCE.values())) for t in tensors]
    for bits in (2.7, 3.1, 4.0, 5.2, 7.0):
        budget = int(bits * 6 * 4 * 8 * 256 / 8)
        cases = (
            [of[dtype] for of, dtype in zip(options, picked)]
            for picked in itertools.product(dtypes, repeat=len(tensors))
        )
        best = min(sum(e for _, e in case) for case in cases if sum(b for b, _ in case) <= budget)
        chosen = choose_types(tensors, dtypes, IMPORTANCE, budget).chosen
        assert chosen is not None
        taken = [of[chosen[t.name]] for of, t in zip(options, tensors)]
        one = max(max(e for _, e in of.values()) for of in options)
        assert sum(b for b, _ in taken) <= budget
        assert best - 1e-12 <= sum(e for _, e in taken) <= best + one


def test_gate_matters_most():
    assert SENSITIVITY["expert.gate"] > SENSITIVITY["expert.down"] > SENSITIVITY["expert.up"]


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"average_bits": 2}, "the smallest scheme takes 2.6"),
        ({"average_bits": 5, "among": "q4_k,f16"}, "--among f16 is not a scheme that"),
        ({"average_bits": 5, "scope": "all"}, "--scope all cannot be combined"),
        ({"scheme": "q3_k", "rest": "q4_k_m"}, "--rest q4_k_m: not one of"),
        ({"scheme": "q4_k_m", "rest": "q8_0"}, "leaves no weight for --rest"),
        ({"scheme": "q3_k", "rest": "fp8"}, "has no scheme fp8"),
        ({"average_bits": 5, "target": ("vllm", "transformers")}, "--target transformers cannot load"),
    ],
)
def test_refused(path, parameters, says):
    with pytest.raises(UsageError, match=says):
        plan_of(path, **({"scheme": "mixed"} | parameters))
