"""plan_prune: criteria on small evidence, budgets, protection, and rows and experts that stay together."""

from __future__ import annotations

import os

import numpy as np
import pytest
from tiny import MOE, decode, edit_json, make_dense, make_moe, random_tensors, read_tensors

from moeconv.calibrate.weights import measure_experts
from moeconv.errors import InputError, UsageError
from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.families.served import TARGETS, check_served
from moeconv.families.spec import FFN_PARTS
from moeconv.plan.execute import execute
from moeconv.prune.choice import DEFAULT, resolve_criterion
from moeconv.prune.criteria import CRITERIA, Evidence, by_score
from moeconv.prune.limits import parse_protect
from moeconv.prune.planner import plan_prune

NONE: frozenset[int] = frozenset()


class Fields:
    """Statistics by hand: every layer has the same fields."""

    def __init__(self, **fields) -> None:
        self.fields = {name: np.asarray(value, np.float64) for name, value in fields.items()}

    def layer(self, layer: int, field: str) -> np.ndarray:
        return self.fields[field]


def order(criterion: str, protected: frozenset[int] = NONE, **fields):
    return CRITERIA[criterion].order(Evidence(statistics=Fields(**fields)), 0, protected)


# -- criteria ----------------------------------------------------------------------------------------------------


def test_low_scores_go_first_and_ties_go_to_the_higher_index():
    made = by_score(np.array([3.0, 1.0, 2.0, 1.0]), NONE)
    assert made.experts == (3, 1, 2, 0) and made.costs == (1.0, 1.0, 2.0, 3.0) and made.scores == (3.0, 1.0, 2.0, 1.0)
    assert by_score(np.array([3.0, 1.0, 2.0]), frozenset({1})).experts == (2, 0)


def test_utilization_counts_tokens_of_all_sources():
    assert order("utilization", count=[[5, 0, 2], [0, 9, 2]]).experts == (2, 0, 1)


def test_reap_is_a_mean_and_saliency_a_sum():
    fields = {"count": [[100, 2, 0]], "gate_norm_sum": [[50.0, 4.0, 0.0]]}
    assert order("reap", **fields).scores == (0.5, 2.0, 0.0)
    assert order("reap", **fields).experts == (2, 0, 1)
    assert order("saliency", **fields).experts == (2, 1, 0)


def test_redundancy_spares_the_last_of_two_twins():
    cosine = np.eye(4)
    cosine[0, 1] = cosine[1, 0] = 0.9  # twins that do much
    made = order("redundancy", gate_norm_sum=[[10.0, 9.0, 1.2, 3.0]], output_cosine=cosine)
    assert made.experts[0] == 1, "a tenth of 9 is less than 1.2"
    assert made.experts == (1, 2, 3), "without its twin expert 0 costs its whole weight again"
    assert made.costs == pytest.approx((0.9, 1.2, 3.0))
    assert made.scores == pytest.approx((1.0, 0.9, 1.2, 3.0))
    assert order("redundancy", frozenset({1}), gate_norm_sum=[[10.0, 9.0, 1.2, 3.0]], output_cosine=cosine).experts == (
        0, 2, 3,
    )  # fmt: skip


def test_redundancy_reads_opposite_outputs_as_unlike_and_leaves_its_evidence_alone():
    cosine = np.array([[1.0, -0.9], [-0.9, 1.0]])
    made = order("redundancy", gate_norm_sum=[[2.0, 1.0]], output_cosine=cosine)
    assert made.experts == (1,) and made.costs == (1.0,)
    assert cosine[0, 0] == 1.0


@pytest.mark.parametrize("criterion", ["utilization", "reap", "saliency", "redundancy"])
@pytest.mark.parametrize(("value", "says"), [(0.0, "all zero"), (np.nan, "NaN"), (np.inf, "NaN or infinite")])
def test_evidence_that_says_nothing(criterion, value, says):
    bad = np.full((1, 3), value)
    with pytest.raises(InputError, match=says):
        order(criterion, count=bad, gate_norm_sum=bad, output_cosine=np.eye(3))


def test_aimer_removes_the_most_even_expert(tmp_path):
    model = open_model(make_moe(tmp_path / "m", experts=3, top_k=1, dtype="F32"))
    measure = CRITERIA["aimer"].needs.weights
    assert measure is not None
    scores = measure_experts(model, measure, jobs=2)
    tensors = read_tensors(tmp_path / "m")
    for layer in model.moe_layers:
        for e in range(3):
            values = np.concatenate([
                decode(d, t, s).ravel()
                for t, s, d in (tensors[model.expert_name(p, layer=layer, expert=e)] for p in FFN_PARTS)
            ]).astype(np.float64)  # fmt: skip
            assert scores[layer][e] == pytest.approx(np.abs(values).mean() / np.sqrt((values**2).mean()), rel=1e-6)
    made = CRITERIA["aimer"].order(Evidence(weights=scores), 0, NONE)
    assert made.experts[0] == int(np.argmax(scores[0]))


# -- what gets written -------------------------------------------------------------------------------------------

EVERY_FAMILY = pytest.mark.parametrize("family", sorted(MOE))
KEEP = {0: [1, 2], 1: [0, 3]}


def statistics(experts: int = 4) -> Evidence:
    """Expert e of every layer has seen e + 1 tokens."""
    ramp = np.arange(1.0, experts + 1)[None]
    return Evidence(statistics=Fields(count=ramp, gate_norm_sum=ramp, output_cosine=np.eye(experts)))


@EVERY_FAMILY
def test_experts_and_router_rows_stay_together(tmp_path, family):
    model = open_model(make_moe(tmp_path / "m", family, experts=4, top_k=2))
    plan = plan_prune(model, keep=2, keep_experts=KEEP)
    execute(plan, source=model.checkpoint, out=tmp_path / "out", jobs=1)
    pruned = open_model(tmp_path / "out")
    before, after = read_tensors(tmp_path / "m"), read_tensors(tmp_path / "out")
    for layer, kept in KEEP.items():
        for new, old in enumerate(kept):
            for part in FFN_PARTS:
                name = pruned.expert_name(part, layer=layer, expert=new)
                assert after.pop(name) == before[model.expert_name(part, layer=layer, expert=old)]
        dtype, shape, data = after.pop(pruned.router_name(layer))
        rows = decode(before[model.router_name(layer)][2], dtype, (4, 32))
        assert shape == (2, 32) and (decode(data, dtype, shape) == rows[kept]).all()
    assert all(after[name] == before[name] for name in after)
    assert pruned.num_experts == 2 and pruned.top_k == 2
    counts = model.family.experts.count
    assert {key: plan.config[key] for key in model.config if key not in counts} == {
        key: value for key, value in model.config.items() if key not in counts
    }
    assert plan.promise == plan.changed == {"router": 2, "expert": 12}


@EVERY_FAMILY
def test_sizes_do_not_depend_on_which_experts_go(tmp_path, family):
    model = open_model(make_moe(tmp_path / "m", family, experts=4, top_k=2))
    dry = plan_prune(model, keep=2, criterion="saliency")
    assert dry.block["keep"] is None and dry.block["scores"] is None
    made = plan_prune(model, keep=2, criterion="saliency", evidence=statistics())
    assert made.nbytes == dry.nbytes and made.changed == dry.changed and made.tensors == dry.tensors
    assert made.block["keep"] == {"0": [2, 3], "1": [2, 3]}
    assert made.block["scores"] == {"0": [1.0, 2.0, 3.0, 4.0], "1": [1.0, 2.0, 3.0, 4.0]}
    layout = {s.name: (s.dtype, s.shape) for i in made.items() for s in i.outputs}
    expected = random_tensors(MOE[family], made.config, dtype="BF16", seed=0)
    assert layout == {n: (d, s) for n, (d, s, _) in expected.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_cast_router_has_the_same_rows(tmp_path, dtype):
    model = open_model(make_moe(tmp_path / "m"))
    plan = plan_prune(model, keep=2, keep_experts=KEEP, dtype=dtype)
    execute(plan, source=model.checkpoint, out=tmp_path / "out", jobs=1)
    before, after = read_tensors(tmp_path / "m"), read_tensors(tmp_path / "out")
    name = model.router_name(1)
    rows = decode(before[name][2], "BF16", (4, 32))[[0, 3]]
    made = decode(after[name][2], after[name][0], (2, 32))
    assert (made == rows.astype(made.dtype)).all()
    assert plan.config["dtype"] == dtype and {t for t, _, _ in after.values()} == {
        {"float32": "F32", "float16": "F16"}[dtype]
    }


def test_dense_layers_between_are_left_alone(tmp_path):
    model = open_model(make_moe(tmp_path / "m", "qwen3_moe", layers=4, mlp_only_layers=[0], decoder_sparse_step=1))
    plan = plan_prune(model, keep=3, criterion="saliency", evidence=statistics())
    assert plan.promise == {"router": 3, "expert": 27} == plan.changed
    assert set(plan.block["keep"]) == {"1", "2", "3"}


# -- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "left"), [(0.25, 6), (0.5, 4), (0.1, 7), (0.74, 2), (0.31, 6)])
def test_ratio(tmp_path, ratio, left):
    model = open_model(make_moe(tmp_path / "m", experts=8))
    assert plan_prune(model, ratio=ratio).block["experts_after"] == left


def test_max_bytes_keeps_as_many_as_fit_to_the_byte(tmp_path):
    model = open_model(make_moe(tmp_path / "m", experts=6))
    size = {k: plan_prune(model, keep=k).nbytes for k in (2, 3, 4, 5)}
    for k in (3, 4, 5):
        assert plan_prune(model, max_bytes=str(size[k])).block["experts_after"] == k
        assert plan_prune(model, max_bytes=str(size[k] - 1)).block["experts_after"] == k - 1
    assert plan_prune(model, max_bytes="1GB").block["experts_after"] == 5
    plan = plan_prune(model, max_bytes=str(size[4]), shard_size="8KB")
    execute(plan, source=model.checkpoint, out=tmp_path / "out")
    shards = [f for f in os.scandir(tmp_path / "out") if f.name.endswith(".safetensors")]
    assert sum(f.stat().st_size for f in shards) == plan.nbytes <= size[4]


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({}, "exactly one of"), ({"keep": 2, "ratio": 0.5}, "not 2"), ({"keep": 0}, "a prune cannot keep"),
        ({"keep": 4}, "a prune cannot keep"), ({"keep": 9}, "a prune cannot keep"), ({"keep": -1}, "a prune cannot "
                                                                                                   "keep"),
        ({"keep": 1}, "fewer than the 2"), ({"ratio": 0.9}, "a prune cannot keep"),
        ({"ratio": 0.7}, "fewer than the 2"),
        ({"ratio": 0.0}, "between 0 and 1"), ({"ratio": 1.0}, "between 0 and 1"),
        ({"ratio": float("nan")}, "between 0 and 1"), ({"ratio": 0.01}, "rounds to 0 experts"),
        ({"max_bytes": "1KB"}, "too small"), ({"max_bytes": "x"}, "--max-bytes x"),
        ({"keep": 2, "criterion": "magic"}, "--criterion magic"), ({"keep": 2, "kepe": 2}, "unknown parameter"),
        ({"keep": 2, "protect": "0:0,0:1,0:2"}, "--protect names 3"),
    ],
)  # fmt: skip
def test_budgets_that_cannot_be_met(tmp_path, parameters, says):
    with pytest.raises(UsageError, match=says):
        plan_prune(open_model(make_moe(tmp_path / "m", experts=4, top_k=2)), **parameters)


def test_an_explicit_choice_must_be_whole(tmp_path):
    model = open_model(make_moe(tmp_path / "m", experts=4, top_k=1))
    for keep in (
        {0: [0, 1]},
        {0: [0, 1], 1: [0]},
        {0: [0, 1], 1: [0, 4]},
        {0: [0, 1], 1: [0, 0]},
        {0: [0, 1], 1: [0, 1, 1]},
    ):
        with pytest.raises(UsageError, match="keep_experts"):
            plan_prune(model, keep=2, keep_experts=keep)
    plan = plan_prune(model, keep=2, keep_experts={0: [3, 1], 1: (0, 2)})
    assert plan.block["keep"] == {"0": [1, 3], "1": [0, 2]}


# -- protection --------------------------------------------------------------------------------------------------


def test_protected_experts_stay(tmp_path):
    model = open_model(make_moe(tmp_path / "m", experts=4, top_k=2))
    plan = plan_prune(model, keep=2, criterion="utilization", evidence=statistics(), protect="0:0,*:1")
    assert plan.block["keep"] == {"0": [0, 1], "1": [1, 3]}


def test_parse_protect(tmp_path):
    model = open_model(make_moe(tmp_path / "m", "qwen3_moe", layers=3, mlp_only_layers=[0]))
    assert parse_protect(None, model) == {1: frozenset(), 2: frozenset()}
    assert parse_protect("1:3, *:0,2:0", model) == {1: frozenset({0, 3}), 2: frozenset({0})}
    for text in (
        "0:0",
        "3:0",
        "1",
        "1:",
        ":1",
        "a:1",
        "1:a",
        "1:-1",
        "-1:1",
        "**:1",
        "1:2:3",
        ",",
        "1:²",
        "²:1",
        "1:" + "9" * 5000,
    ):
        with pytest.raises(UsageError, match="--protect"):
            parse_protect(text, model)
    with pytest.raises(UsageError, match="experts 0 to 3"):
        parse_protect("1:4", model)


# -- refusals ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_pruned(tmp_path):
    with pytest.raises(InputError, match="has no experts to prune"):
        plan_prune(open_model(make_dense(tmp_path / "dense")), keep=2)
    no_moe = make_moe(tmp_path / "none", "qwen3_moe", mlp_only_layers=[0, 1])
    with pytest.raises(InputError, match="no layer of this model is a Mixture-of-Experts"):
        plan_prune(open_model(no_moe), keep=2)
    packed = make_moe(tmp_path / "packed")
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    edit_json(packed / "config.json", quantization_config=said)
    with pytest.raises(UsageError, match="quantized"):
        plan_prune(open_model(packed), keep=2, dtype="float16")


def test_criteria_need_what_they_declare():
    assert resolve_criterion(None, has_data=False) == "aimer" and resolve_criterion(None, has_data=True) == DEFAULT
    assert resolve_criterion("reap", has_data=True) == "reap" and resolve_criterion("aimer", has_data=True) == "aimer"
    for name, criterion in CRITERIA.items():
        if criterion.needs.data:
            with pytest.raises(UsageError, match=f"--criterion {name} needs statistics"):
                resolve_criterion(name, has_data=False)
    with pytest.raises(UsageError, match="unknown --criterion reaper"):
        resolve_criterion("reaper", has_data=True)


def test_a_router_that_does_not_renormalise_is_warned_of(tmp_path):
    for norm, warned in ((True, 0), (False, 1)):
        model = open_model(make_moe(tmp_path / str(norm), "olmoe", norm_topk_prob=norm))
        plan = plan_prune(model, keep=2, criterion="saliency", evidence=statistics())
        assert sum("does not renormalise" in w for w in plan.warnings) == warned


def test_targets_and_expert_parallelism(tmp_path):
    mixtral = open_model(make_moe(tmp_path / "mixtral", experts=8))
    for target in ("transformers", "vllm", "sglang", "llama.cpp"):
        assert not any("not known to run" in w for w in plan_prune(mixtral, keep=4, target=(target,)).warnings)
    with pytest.raises(UsageError, match="unknown runtime"):
        plan_prune(mixtral, keep=4, target=("ollama",))
    assert any("among 4 or 8 devices" in w for w in plan_prune(mixtral, keep=6).warnings)
    assert any("among 8 devices" in w for w in plan_prune(mixtral, keep=4).warnings)
    assert check_served("flex_olmo", ("vllm",)) == ["vllm lists flex_olmo; it was not measured here"]
    with pytest.raises(UsageError, match="does not run flex_olmo"):
        check_served("flex_olmo", ("vllm", "llama.cpp"))
    assert check_served("laguna", ("vllm",)) == ["vllm is not known to run laguna"]
    rows = [*tables().moe.values(), *(row for rows in tables().wrapped.values() for row in rows.values())]
    for row in rows:
        assert row.elsewhere.runs | row.elsewhere.runs_not <= set(TARGETS) - {"transformers"}
        assert not row.elsewhere.runs & row.elsewhere.runs_not


def test_a_router_that_sums_the_best_two_keeps_two_experts(tmp_path, cli):
    """It does so without groups too: glm4_moe with a single expert loads, and fails at its first token."""
    dense = make_dense(tmp_path / "dense", hidden=64, intermediate=64)
    flags = ("--to", "glm4_moe", "--experts", 4, "--top-k", 1, "--no-check", "-q")
    assert cli("upcycle", dense, tmp_path / "moe", *flags).code == 0
    for keep, code in ((1, 2), (2, 0)):
        done = cli("prune", tmp_path / "moe", tmp_path / "out", "--keep", keep, "--dry-run", "--json")
        assert done.code == code, done.out
    assert "their best 2" in cli("prune", tmp_path / "moe", tmp_path / "out", "--keep", 1, "--dry-run").err
