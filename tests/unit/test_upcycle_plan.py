"""plan_upcycle: every pair gives the tensors that the target's config asks for, and the inexact is refused."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import decode, edit_json, make_dense, make_moe, random_tensors, read_tensors, write_shards

from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.strictjson import parse_json
from moeconv.errors import InputError, UsageError
from moeconv.families.model import open_model
from moeconv.families.refused import IMPOSSIBLE
from moeconv.families.registry import tables
from moeconv.families.spec import FFN_PARTS
from moeconv.plan.execute import execute
from moeconv.upcycle.methods import METHODS
from moeconv.upcycle.planner import plan_upcycle

# pairs that tiny.py can make by hand, tensors only renamed; tests/contract holds all pairs against transformers
_PLAIN = {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"}
EVERY_PAIR = pytest.mark.parametrize(
    ("source", "target"), [(p.source, p.target) for p in tables().pairs if {p.source, p.target} <= _PLAIN]
)


def written(model, out, **parameters):
    plan = plan_upcycle(model, **parameters)
    execute(plan, source=model.checkpoint, out=out, jobs=1)
    return plan, open_model(out)


def layout(plan):
    return {s.name: (s.dtype, s.shape) for item in plan.items() for s in item.outputs}


@EVERY_PAIR
@pytest.mark.parametrize("tied", [False, True])
def test_the_tensors_are_those_that_the_new_config_asks_for(tmp_path, source, target, tied):
    model = open_model(make_dense(tmp_path / "m", source, tied=tied, layers=2))
    plan = plan_upcycle(model, to=target, experts=4, top_k=2)
    expected = random_tensors(tables().moe[target], plan.config, dtype="BF16", seed=0)
    assert layout(plan) == {n: (d, s) for n, (d, s, _) in expected.items()}
    assert plan.config["model_type"] == target and plan.config["architectures"] == [tables().moe[target].architecture]
    assert (
        all(plan.config[k] == 4 for k in tables().moe[target].experts.count) and plan.config["num_experts_per_tok"] == 2
    )
    assert plan.promise == plan.changed
    assert plan.block["exact"] and plan.block["from"] == source and plan.block["to"] == target


@EVERY_PAIR
def test_experts_are_copies_and_everything_else_is_carried(tmp_path, source, target):
    model = open_model(make_dense(tmp_path / "m", source))
    before = read_tensors(tmp_path / "m")
    _, moe = written(model, tmp_path / "out", to=target, experts=3, top_k=2)
    after = read_tensors(tmp_path / "out")
    for name, role in model.roles.items():
        group, _, part = role.key.partition(".")
        if group == "ffn":
            for e in range(3):
                assert after.pop(moe.expert_name(part, layer=role.layer, expert=e)) == before[name]
        else:
            assert after.pop(moe.family.name(role.key, layer=role.layer)) == before[name]
    for layer in range(2):
        dtype, shape, data = after.pop(moe.router_name(layer))
        rows = decode(data, dtype, shape)
        assert shape == (3, 32) and 0.015 < rows.std() < 0.025 and len(np.unique(rows, axis=0)) == 3
    assert all(".shared_expert" in n and not any(d) for n, (_, _, d) in after.items())
    assert bool(after) == (target == "qwen2_moe")


@pytest.mark.slow
def test_routers_differ_by_layer_and_seed_and_by_nothing_else(tmp_path):
    model = open_model(make_dense(tmp_path / "m", layers=3))
    rows = {}
    for seed, size in ((0, "5GB"), (0, "1KB"), (1, "5GB")):
        _, moe = written(model, tmp_path / f"{seed}{size}", seed=seed, shard_size=size)
        rows[seed, size] = [moe.checkpoint.read(moe.router_name(i)) for i in range(3)]
    assert rows[0, "5GB"] == rows[0, "1KB"]
    everything = [bytes(r) for key in ((0, "5GB"), (1, "5GB")) for r in rows[key]]
    assert len(set(everything)) == 6


@pytest.mark.parametrize("method", ["noise", "drop"])
def test_methods_change_the_same_neurons_of_gate_up_and_down(tmp_path, method):
    model = open_model(make_dense(tmp_path / "m", dtype="F32", layers=1))
    share = {"noise": "noise_fraction", "drop": "drop_ratio"}[method]
    plan, moe = written(model, tmp_path / "out", method=method, experts=3, **{share: 0.25})
    assert not plan.block["exact"]
    before, after = read_tensors(tmp_path / "m"), read_tensors(tmp_path / "out")
    chosen = set()
    for e in range(3):
        per_part = []
        for part in FFN_PARTS:
            old = decode(*_swap(before[model.ffn_name(part, layer=0)]))
            new = decode(*_swap(after[moe.expert_name(part, layer=0, expert=e)]))
            per_part.append(tuple(np.flatnonzero((old != new).any(axis=0 if part == "down" else 1))))
        assert per_part[0] == per_part[1] == per_part[2] and len(per_part[0]) == 16
        chosen.add(per_part[0])
    assert len(chosen) == 3, "every expert draws its own neurons"


def _swap(tensor):
    dtype, shape, data = tensor
    return data, dtype, shape


# those that need more files than the source have tests of their own
@pytest.mark.parametrize("method", sorted(n for n, m in METHODS.items() if not m.partition and m.siblings != "must"))
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_dtype_holds_for_every_tensor_and_for_config(tmp_path, method, dtype):
    model = open_model(make_dense(tmp_path / "m"))
    plan, moe = written(model, tmp_path / "out", method=method, dtype=dtype, experts=2)
    want = {None: "BF16", "bfloat16": "BF16", "float32": "F32", "float16": "F16"}[dtype]
    assert {r.dtype for r in moe.checkpoint.tensors.values()} == {want}
    assert moe.config["dtype"] == moe.config["torch_dtype"] == (dtype or "bfloat16")
    assert plan.block["exact"] == (METHODS[method].exact and want != "F16")  # float32 holds every bfloat16 exactly


# -- some layers stay dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [("llama", "qwen2_moe"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe")])
def test_some_layers_may_stay_dense(tmp_path, source, target):
    model = open_model(make_dense(tmp_path / "m", source, layers=4))
    plan, moe = written(model, tmp_path / "out", to=target, layers="1,3", experts=2)
    assert moe.moe_layers == (1, 3) and moe.config["mlp_only_layers"] == [0, 2]
    assert plan.promise["router"] == 2 and plan.promise["expert"] == 12
    before, after = read_tensors(tmp_path / "m"), read_tensors(tmp_path / "out")
    for layer in (0, 2):
        for part in FFN_PARTS:
            assert after[moe.ffn_name(part, layer=layer)] == before[model.ffn_name(part, layer=layer)]


def test_mixtral_has_no_dense_layers(tmp_path):
    model = open_model(make_dense(tmp_path / "m", layers=3))
    with pytest.raises(InputError, match="cannot leave layer 1 dense") as caught:
        plan_upcycle(model, layers="0,2")
    assert "qwen2_moe" in caught.value.hint


# -- config --------------------------------------------------------------------------------------------------------


@EVERY_PAIR
def test_what_a_config_leaves_out_is_said_with_the_sources_default(tmp_path, source, target):
    """Families assume different values for a missing key, so each must be spelled out."""
    path = make_dense(tmp_path / "m", source, heads=4, kv_heads=4)
    edit_json(
        path / "config.json",
        drop=["rms_norm_eps", "rope_theta", "max_position_embeddings", "hidden_act", "tie_word_embeddings"],
    )
    model = open_model(path)
    config = plan_upcycle(model, to=target).config
    for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings", "hidden_act", "tie_word_embeddings"):
        assert config[key] == model.family.config.defaults[key], key


def test_rope_parameters_get_their_base(tmp_path):
    for parameters, expected in (
        ({"rope_type": "default"}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
        ),
    ):
        path = make_dense(tmp_path / expected["rope_type"], rope_parameters=parameters)
        edit_json(path / "config.json", drop=["rope_theta"])
        assert plan_upcycle(open_model(path)).config["rope_parameters"] == expected


@pytest.mark.parametrize(
    ("source", "target", "config", "says"),
    [
        ("llama", "mixtral", {"pretraining_tp": 2}, "pretraining_tp = 2"),
        ("llama", "mixtral", {"attention_bias": True}, "attention_bias = True"),
        ("llama", "mixtral", {"mlp_bias": True}, "mlp_bias = True"),
        ("qwen2", "qwen2_moe", {"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ("mistral", "mixtral", {"sliding_window": "x"}, "sliding_window must be"),
        ("mistral", "mixtral", {"sliding_window": -1}, "sliding_window must be"),
        ("qwen2", "qwen2_moe", {"layer_types": ["full_attention"]}, "layer_types must be a list of 2"),
        ("qwen2", "qwen2_moe", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers must be"),
        (
            "qwen3", "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window in some layers",
        ),
    ],
)  # fmt: skip
def test_what_the_target_cannot_say_is_refused_by_name(tmp_path, source, target, config, says):
    path = make_dense(tmp_path / "m", source, **config)
    with pytest.raises(InputError, match=says) as caught:
        plan_upcycle(open_model(path), to=target)
    assert caught.value.hint


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
def test_sizes_that_the_source_derives_are_said_to_the_target(tmp_path, target):
    """transformers' Qwen2MoeAttention takes head_dim as it stands in the config, null included."""
    path = make_dense(tmp_path / "m", head_dim=16, heads=4, kv_heads=4)
    assert plan_upcycle(open_model(path), to=target).config["head_dim"] == 16
    derived = make_dense(tmp_path / "derived", heads=4, kv_heads=4)
    edit_json(derived / "config.json", head_dim=None, num_key_value_heads=None)
    config = plan_upcycle(open_model(derived), to=target).config
    assert config["head_dim"] == 8 and config["num_key_value_heads"] == 4


@pytest.mark.parametrize(
    ("source", "target", "config", "pattern"),
    [
        ("mistral", "mixtral", {"sliding_window": 8}, [True] * 4),
        ("mistral", "mixtral", {"sliding_window": None}, [False] * 4),
        ("qwen2", "qwen2_moe", {"use_sliding_window": False, "sliding_window": 8}, [False] * 4),
        ("qwen2", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, [True] * 4),
        (
            "qwen2", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            [False, False, False, True],
        ),
        ("qwen3", "qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, [True] * 4),
    ],
)  # fmt: skip
def test_sliding_windows_mean_the_same_layers_in_the_target(tmp_path, source, target, config, pattern):
    model = open_model(make_dense(tmp_path / "m", source, layers=4, **config))
    read = tables().moe[target].attention.sliding.read(plan_upcycle(model, to=target).config, 4)
    assert list(read.layers) == pattern and read.window == (8 if any(pattern) else None)


def test_unknown_keys_are_carried_with_a_warning_and_code_is_left_behind(tmp_path):
    model = open_model(
        make_dense(tmp_path / "m", invented=5, auto_map={"AutoModel": "evil.Model"}, _name_or_path="/home")
    )
    plan = plan_upcycle(model)
    assert plan.config["invented"] == 5 and not {"auto_map", "_name_or_path"} & set(plan.config)
    assert [w for w in plan.warnings if "invented" in w] and [w for w in plan.warnings if "evil.Model" in w]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), sorted(pair for pair in IMPOSSIBLE if pair[0] in _PLAIN))
def test_impossible_pairs_say_why(tmp_path, source, target):
    with pytest.raises(InputError) as caught:
        plan_upcycle(open_model(make_dense(tmp_path / "m", source)), to=target)
    assert IMPOSSIBLE[source, target] in caught.value.message and "It can become" in caught.value.hint


def test_every_dense_family_has_exactly_one_default():
    for family in tables().dense:
        assert sum(p.default for p in tables().pairs if p.source == family) == 1


def test_a_target_nobody_knows_and_a_number_that_experts_cannot_be_multiplied_to(tmp_path):
    with pytest.raises(InputError, match=r"--to \\x1bfoo: no such"):
        plan_upcycle(open_model(make_dense(tmp_path / "m")), to="\x1bfoo")
    with pytest.raises(UsageError, match="2, 3 or more times the source"):
        plan_upcycle(open_model(make_moe(tmp_path / "moe")), experts=6)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"experts": 0}, "--experts 0"), ({"experts": 5000}, "--experts 5000"),
        ({"experts": 2, "top_k": 3}, "--top-k 3"),
        ({"top_k": 0}, "--top-k 0"), ({"method": "clone"}, "--method clone"), ({"drop_ratio": 1.5}, "--drop-ratio"),
        ({"drop_ratio": float("nan")}, "--drop-ratio"), ({"noise_fraction": -0.1}, "--noise-fraction"),
        ({"router_std": float("inf")}, "--router-std"), ({"router_std": -1.0}, "--router-std"),
        ({"noise_scale": float("nan")}, "--noise-scale"), ({"layers": "2"}, "--layers"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"shard_size": "big"}, "--shard-size big"), ({"topk": 1}, "unknown parameter 'topk'"),
    ],
)  # fmt: skip
def test_wrong_parameters(tmp_path, parameters, says):
    model = open_model(make_dense(tmp_path / "m"))
    with pytest.raises(UsageError, match=says):
        plan_upcycle(model, **parameters)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "I64"])
@pytest.mark.parametrize("method", ["copy", "noise"])
def test_ffns_that_are_no_floats(tmp_path, dtype, method):
    path = make_dense(tmp_path / "m")
    tensors = read_tensors(path)
    for name, (_, shape, data) in tensors.items():
        if ".mlp." in name:
            size = {"F8_E4M3": 1, "I8": 1, "I64": 8}[dtype]
            tensors[name] = (dtype, shape, bytes(len(data) // 2 * size))
    write_shards(path, tensors)
    with pytest.raises(InputError, match=f"is {dtype}"):
        plan_upcycle(open_model(path), method=method)


def test_biases_without_a_place_in_the_target(tmp_path):
    path = make_dense(tmp_path / "m", attention_bias=True)
    edit_json(path / "config.json", drop=["attention_bias"])
    with pytest.raises(InputError, match=r"no place for tensor .*q_proj\.bias"):
        plan_upcycle(open_model(path))


def test_leftover_buffers_are_dropped_by_name(tmp_path):
    path = make_dense(tmp_path / "m")
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    write_shards(path, read_tensors(path) | {name: ("F32", (4,), bytes(16))})
    plan = plan_upcycle(open_model(path))
    assert plan.dropped == (name,) and name not in layout(plan)


def test_planning_reads_no_tensor(tmp_path, monkeypatch):
    model = open_model(make_dense(tmp_path / "m"))
    assert model.identity
    monkeypatch.setattr(SafetensorsFile, "read_at", lambda *_: pytest.fail("bytes were read"))
    parse_json(b"".join(plan_upcycle(model, method="drop").canonical()), what="plan")


def test_a_shared_expert_of_zeros_is_said_with_its_size(tmp_path):
    """As wide as a routed expert, and computed for every token."""
    model = open_model(make_dense(tmp_path / "m", intermediate=256, layers=2))
    plan = plan_upcycle(model, to="glm4_moe")
    zeros = 2 * 3 * 256 * 32
    (told,) = [text for text in plan.warnings if "of zero" in text]
    assert f"{zeros:,} parameters of zero" in told and f"{zeros / plan.params_active:.0%}" in told
    for parameters in ({"to": "mixtral"}, {"to": "glm4_moe", "method": "granular", "granularity": 4, "top_k": 3,
                                           "experts": 6, "shared_experts": "1"}):  # fmt: skip
        assert not any("of zero" in text for text in plan_upcycle(model, **parameters).warnings)


@pytest.mark.parametrize("word", ["mixtrl", "MixtralForCausal", "Mixtal"])
def test_a_target_that_is_misspelt_is_guessed(tmp_path, word):
    model = open_model(make_dense(tmp_path / "m"))
    with pytest.raises(InputError, match=f"--to {word}: no such") as caught:
        plan_upcycle(model, to=word)
    assert caught.value.hint.startswith("Did you mean mixtral? llama can become: mixtral, ")
    for unlike in ("zzz", "llama"):
        with pytest.raises(InputError, match="no such") as caught:
            plan_upcycle(model, to=unlike)
        assert caught.value.hint.startswith("llama can become: mixtral, ")
    with pytest.raises(InputError, match="cannot write llama as deepseek_v3"):
        plan_upcycle(model, to="deepseek_v3")
