"""Bits by layer: the allocator against brute force and the linear program's bound, and plans under budgets."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from words import add_tokenizer, text

from moeconv.errors import UsageError
from moeconv.families.model import open_model
from moeconv.plan.planned import planned_model
from moeconv.quantize.budget import allocate, hull
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.planner import plan_quantize

Layers = list[list[tuple[int, float]]]
option = st.tuples(st.integers(1, 60), st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3)))
problems = st.tuples(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5), st.integers(1, 300))


def cost(layers: Layers, picked) -> tuple[int, float]:
    chosen = [row[i] for row, i in zip(layers, picked)]
    return sum(b for b, _ in chosen), sum(e for _, e in chosen)


def lp_bound(layers: Layers, budget: int) -> float:
    """The least error when layers may take mixtures of two options: walk the hulls' edges, the last one in part."""
    hulls = [[row[i] for i in hull(row)] for row in layers]
    left, error = budget - sum(h[0][0] for h in hulls), sum(h[0][1] for h in hulls)
    edges = [(b[0] - a[0], a[1] - b[1]) for h in hulls for a, b in itertools.pairwise(h)]
    for size, saved in sorted(edges, key=lambda e: -e[1] / e[0]):
        part = min(1.0, left / size)
        error, left = error - part * saved, left - part * size
        if left <= 0:
            break
    return error


@pytest.mark.slow
@given(problems)
@settings(max_examples=300, deadline=None)
def test_within_one_upgrade_of_the_best(problem):
    layers, budget = problem
    best = min(
        (cost(layers, picked)[1] for picked in itertools.product(*(range(len(r)) for r in layers))
         if cost(layers, picked)[0] <= budget), default=None,
    )  # fmt: skip
    picked = allocate(layers, budget)
    assert (picked is None) == (best is None)
    if picked is None or best is None:
        return
    used, error = cost(layers, picked)
    assert used <= budget
    bound = lp_bound(layers, budget)
    largest = max((row[a][1] - row[b][1] for row in layers for a, b in itertools.pairwise(hull(row))), default=0.0)
    assert bound - 1e-9 <= best <= error + 1e-9 and error <= bound + largest + 1e-9


def test_many_layers_meet_the_bound():
    layers = [[(4, 0.01 * w), (5, 0.006 * w), (8, 0.0001 * w)] for w in (math.sin(i) ** 2 + 0.01 for i in range(6144))]
    for budget in (4 * 6144, 5 * 6144, 6 * 6144, 8 * 6144):
        picked = allocate(layers, budget)
        assert picked is not None
        assert cost(layers, picked)[1] == pytest.approx(lp_bound(layers, budget), rel=1e-3)
    assert allocate(layers, 4 * 6144 - 1) is None


# -- plans ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return open_model(tiny.make_moe(tmp_path / "m", hidden=128, intermediate=256, layers=4))


IMPORTANCE = {0: 1.0, 1: 5.0, 2: 0.1, 3: 2.0}
VLLM = {"target": ("vllm",)}


def bits(plan) -> list[int]:
    return list(plan.block["bits_by_layer"].values())


@pytest.mark.parametrize("format", [f.name for f in FORMATS.values() if f.merge])
def test_average_bits(model, format):
    more = {} if FORMATS[format].mixed["transformers"] == "ok" else VLLM
    found = {}
    for average in (4.6, 5.6, 6.6, 8.6):
        plan = plan_quantize(
            model, format=format, scheme="mixed", average_bits=average, importance=IMPORTANCE, group_size="auto", **more
        )
        weights = [i for i in plan.items() if i.changed == "expert"]
        used = sum(i.nbytes for i in weights) * 8 / sum(s.params for i in weights for s in i.outputs)
        assert average - 1.6 < used <= average and plan.promise == plan.changed
        found[average] = bits(plan)
        assert planned_model(plan).quantization
    assert found[4.6] == [4] * 4 and found[8.6] == [8] * 4
    assert found[5.6] == [4, 8, 4, 4]  # the layer that matters most first
    assert found[6.6] == [4, 8, 4, 8]


@pytest.mark.parametrize("among", [None, "int2,int3,int4", "w3a16, int2"])
def test_a_budget_below_four_bits_takes_narrower_schemes(model, among):
    asked = {"scheme": "mixed", "importance": IMPORTANCE, "among": among, "target": ("vllm",)}
    plan = plan_quantize(model, average_bits=3, **asked)
    weights = [i for i in plan.items() if i.changed == "expert"]
    used = sum(i.nbytes for i in weights) * 8 / sum(s.params for i in weights for s in i.outputs)
    assert 2.4 < used <= 3 and min(bits(plan)) == 2 and bits(plan)[1] == max(bits(plan)) > 2
    assert any("vllm was not proven to load compressed-tensors int2" in w for w in plan.warnings)
    names = {"int2", "int3"} if among == "w3a16, int2" else {"int2", "int3", "int4", "int8"}
    assert {*plan.block["scheme_by_layer"].values()} <= names
    assert plan_quantize(model, average_bits=5.3, **(asked | {"among": None})).block["bits_by_layer"] == {
        "0": 4, "1": 8, "2": 4, "3": 4,
    }  # fmt: skip


def test_schemes_of_other_layouts_stand_beside_each_other(model, cli, tmp_path):
    """Layers in NVFP4 and in FP8: each is read in its own layout, and no runtime was proven to load the two."""
    flags = ("--scheme", "mixed", "--average-bits", 6, "--among", "fp8,nvfp4", "--target", "vllm", "--json")
    asked = {"scheme": "mixed", "average_bits": 6, "among": "fp8,nvfp4", "importance": IMPORTANCE} | VLLM
    plan = plan_quantize(model, **asked)
    assert {*plan.block["scheme_by_layer"].values()} == {"nvfp4", "fp8"}
    assert plan.block["scheme_by_layer"]["1"] == "fp8"  # the layer that matters most
    assert plan.config["quantization_config"]["format"] == "mixed-precision"
    assert plan.block["loads"]["vllm"] == "unknown"
    assert any("vllm was not proven to load compressed-tensors nvfp4" in w for w in plan.warnings)
    stats = tmp_path / "stats.safetensors"
    (tmp_path / "text.txt").write_text(text(300, seed=1))
    source = add_tokenizer(model.checkpoint.path)
    assert cli("calibrate", source, stats, "--data", tmp_path / "text.txt", "--seq-len", 16).code == 0
    done = cli("quantize", source, tmp_path / "out", *flags, "--stats", stats)
    assert done.code == 0, done.out
    assert 0.02 < done.json["quantize"]["error"]["relative_rms"]["mean"] < 0.12


def test_groups_of_layers_match_their_experts_and_nothing_else(model):
    plan = plan_quantize(model, scheme="mixed", average_bits=5.3, importance=IMPORTANCE, **VLLM)
    groups = plan.config["quantization_config"]["config_groups"]
    assert len(groups) == len(
        {(s, plan.block["group_size_by_layer"][k]) for k, s in plan.block["scheme_by_layer"].items()}
    )
    for item in plan.items():
        if item.changed != "expert":
            continue
        module = item.inputs[0].tensor.removesuffix(".weight")
        targets = [g for g in groups.values() if re.match(g["targets"][0].removeprefix("re:"), module)]
        (group,) = targets
        assert group["weights"]["num_bits"] == item.params["bits"]
        assert group["weights"]["group_size"] == item.params["group_size"]
    assert not any(
        re.match(g["targets"][0].removeprefix("re:"), "model.layers.0.self_attn.q_proj") for g in groups.values()
    )


def test_max_bytes_counts_the_files(model):
    sizes = [plan_quantize(model, scheme=s).nbytes for s in ("int4", "int8")]
    for share in (0.0, 0.3, 0.7, 1.0):
        limit = round(sizes[0] + share * (sizes[1] - sizes[0])) + 600  # a header that names more
        plan = plan_quantize(model, scheme="mixed", max_bytes=str(limit), importance=IMPORTANCE, **VLLM)
        assert limit - (sizes[1] - sizes[0]) / 3 < plan.nbytes <= limit
    with pytest.raises(UsageError, match="too small"):
        plan_quantize(model, scheme="mixed", max_bytes=str(sizes[0] // 2), importance=IMPORTANCE, **VLLM)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"average_bits": 5, **VLLM, "importance": None}, "--scheme mixed needs --stats"),
        ({"average_bits": 5}, "transformers cannot load compressed-tensors with bits that differ by layer"),
        ({"average_bits": 5, "target": ("vllm", "transformers")}, "--target transformers cannot load"),
        ({"average_bits": 5, "format": "mlx"}, "--format mlx does not support --scheme mixed"),
        (VLLM, "either --average-bits or --max-bytes"),
        ({"average_bits": 5, "max_bytes": "1GB", **VLLM}, "either --average-bits or --max-bytes"),
        ({"average_bits": 2, **VLLM}, "--average-bits 2 is too small: the smallest scheme takes 2."),
        ({"average_bits": 3, "among": "int4,int8", **VLLM}, "is too small: the smallest scheme takes 4."),
        ({"average_bits": 3, "among": "int3,nf4", **VLLM}, "--among nf4 is not a scheme that"),
        ({"among": "int4", "scheme": "int4"}, "--among needs --scheme mixed"),
        ({"average_bits": 5, "scope": "all-linear", **VLLM}, "--scope all-linear"),
        ({"average_bits": 5, "scheme": "int4"}, "--average-bits needs --scheme mixed"),
    ],
)
def test_refused(model, parameters, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        plan_quantize(model, **({"scheme": "mixed", "importance": IMPORTANCE} | parameters))


def test_without_statistics_the_command_names_what_makes_them(cli, model, tmp_path):
    flags = ("--scheme", "mixed", "--average-bits", 5, "--target", "vllm", "--dry-run", "--json")
    done = cli("quantize", model.checkpoint.path, tmp_path / "out", *flags)
    assert done.code == 2 and "moeconv calibrate" in done.json["error"]["hint"]
