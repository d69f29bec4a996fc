"""Contract: siblings of one base as experts, and routers that are measured on what they will read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import edit_json
from transformers import AutoModelForCausalLM

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.recipe.read import DEMO_DATA as DEMO
from moeconv.upcycle.centroids import balanced_centroids
from moeconv.upcycle.planner import origins_of, plan_upcycle
from tests.contract.stock import DENSE_CASES, load, logits, relative_difference, save_stock, skip_where_stock_is_broken

torch.set_num_threads(1)


def family(tmp_path, case="llama", count=3, dtype=torch.float32):
    """A base and siblings: the base with small changes in every FFN."""
    base = save_stock(tmp_path / "base", *DENSE_CASES[case], dtype=dtype)
    paths = []
    for i in range(count):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(100 + i)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "mlp" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        paths.append(tmp_path / f"sibling{i}")
        model.to(dtype).save_pretrained(paths[-1])
    return base, paths


_ONE_OF_EACH = [("llama", "mixtral"), ("llama", "granitemoe"), ("phi3", "mixtral"), ("qwen3", "qwen3_moe")]


@pytest.mark.parametrize(("case", "target"), _ONE_OF_EACH)
def test_each_expert_is_its_siblings_ffn(tmp_path, case, target):
    """With one expert a token and a router that always picks it, the model is the base with that sibling's FFNs."""
    skip_where_stock_is_broken(target)
    base, paths = family(tmp_path, case, count=2)
    model, siblings = open_model(base), [open_model(path) for path in paths]
    plan = plan_upcycle(model, siblings=siblings, to=target, top_k=1, router_std=0.0)
    assert not plan.block["exact"] and plan.block["method"] == "experts-from" and plan.block["num_experts"] == 2
    assert plan.changed == plan.promise
    execute(plan, source=model.checkpoint, origins=origins_of(siblings), out=tmp_path / "moe", jobs=2)
    written = load(tmp_path / "moe")
    for i, path in enumerate(paths):
        for layer in written.model.layers:
            block = next(m for m in layer.modules() if type(m).__name__.endswith("Router"))
            forward = type(block).forward

            def always(x, block=block, forward=forward, expert=i):
                out = forward(block, x)
                return out[0], torch.ones_like(out[1]), torch.full_like(out[2], expert)

            block.forward = always
        assert relative_difference(logits(load(path)), logits(written)) <= 1e-5


@pytest.mark.slow
def test_the_command_takes_siblings_and_its_manifest_names_them(tmp_path, cli):
    base, paths = family(tmp_path)
    flags = [word for path in (base, *paths) for word in ("--experts-from", path)]
    done = cli("upcycle", base, tmp_path / "moe", *flags, "--json")
    assert done.code == 0, done.out
    assert done.json["upcycle"]["num_experts"] == 4 and done.json["upcycle"]["equivalence"]["checked"]
    steps = json.loads((tmp_path / "moe" / "moeconv_manifest.json").read_text())["steps"]
    assert steps[-1]["parameters"]["experts_from"] == [open_model(p).identity for p in (base, *paths)]
    for part in ("0/2", "1/2"):
        done = cli(
            "upcycle", base, tmp_path / "parts", *flags, "--no-check", "--part", part, "--shard-size", "100KB", "--json"
        )
        assert done.code == 0, done.out
    assert done.json["complete"]
    assert torch.equal(logits(load(tmp_path / "moe")), logits(load(tmp_path / "parts")))


def _broken(path, **config):
    copy = path.with_name(path.name + "-other")
    shutil.copytree(path, copy)
    edit_json(copy / "config.json", **config)
    return copy


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"rope_theta": 5e5}, 3, "rope_theta"),
        ({"rms_norm_eps": 1e-6}, 3, "rms_norm_eps = 1e-06, SOURCE has 1e-05"),
        ({"hidden_act": "gelu"}, 3, "hidden_act = gelu, SOURCE has silu"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, 3, "self_attn.q_proj.bias"),
    ],
)
def test_what_is_no_sibling_is_refused_by_its_difference(tmp_path, cli, change, code, words):
    base, paths = family(tmp_path, count=2)
    if "rope_theta" in change:  # the config that transformers 5 writes nests it
        change = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
        words = "rope_parameters"
    odd = _broken(paths[1], **change)
    done = cli("upcycle", base, tmp_path / "moe", "--experts-from", paths[0], "--experts-from", odd, "--json")
    assert (done.code, words in done.json["error"]["message"]) == (code, True), done.out
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method", "experts-from"), "needs --experts-from"),
        (("--experts-from", "BASE"), "at least two"),
        (("--experts-from", "BASE", "--experts-from", "BASE", "--experts", 3), "the 2 experts of 2 siblings"),
        (("--experts-from", "BASE", "--experts-from", "BASE", "--method", "shuffle"), "cannot be combined with"),
        (("--router", "hidden"), "needs --data"),
    ],
)
def test_wrong_uses_are_usage_errors(tmp_path, cli, flags, words):
    base = save_stock(tmp_path / "base", *DENSE_CASES["llama"], dtype=torch.float32)
    flags = [base if word == "BASE" else word for word in flags]
    done = cli("upcycle", base, tmp_path / "moe", *flags, "--json")
    assert (done.code, words in done.json["error"]["message"]) == (2, True), done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}, ()),
        (
            {"max_position_embeddings": 4096},
            ("max_position_embeddings = 4096 (SOURCE: 64)", "siblings give only their FFNs"),
        ),
        ({"torch_dtype": "bfloat16"}, ()),
        ({"rope_scaling": None, "rope_theta": 10000.0, "rope_parameters": None}, ()),
        ({"head_dim": None, "num_key_value_heads": 2, "layer_types": None}, ()),
    ],
    ids=["mistral", "longer", "dtype", "older rotary words", "derived"],
)
def test_what_concerns_no_layer_is_a_warning_and_other_words_are_none(tmp_path, cli, change, words):
    base, paths = family(tmp_path, count=2)
    odd = _broken(paths[1], **change)
    flags = ("--experts-from", paths[0], "--experts-from", odd, "--json")
    plain = cli("upcycle", base, tmp_path / "plain", "--experts-from", paths[0], "--experts-from", paths[1], "--json")
    done = cli("upcycle", base, tmp_path / "moe", *flags)
    assert done.code == 0, done.out
    new = [text for text in done.json["warnings"] if text not in plain.json["warnings"]]
    assert len(new) == bool(words) and all(word in new[0] for word in words)
    assert torch.equal(logits(load(tmp_path / "moe")), logits(load(tmp_path / "plain")))


@pytest.mark.slow
def test_tokens_that_were_added_and_renamed_are_named(tmp_path, cli):
    base, paths = family(tmp_path, count=2)
    words = {f"w{i}": i for i in range(40)}
    odd = {k: v for k, v in words.items() if k != "w39"} | {"<tool>": 39, "<end>": 40}
    for path, vocabulary in ((base, words), (paths[0], words), (paths[1], odd)):
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    done = cli("upcycle", base, tmp_path / "moe", "--experts-from", paths[0], "--experts-from", paths[1], "--json")
    told = next(text for text in done.json["warnings"] if "tokens" in text)
    assert done.code == 0 and "has 2 (<end>, <tool>) and lacks 1 (w39)" in told and str(paths[1]) in told


def test_another_tie_flag_is_a_warning_that_names_it(tmp_path):
    base, paths = family(tmp_path, count=1)
    model_type, config = DENSE_CASES["llama"]
    tied = save_stock(tmp_path / "tied", model_type, config | {"tie_word_embeddings": True}, dtype=torch.float32)
    plan = plan_upcycle(open_model(base), siblings=[open_model(paths[0]), open_model(tied)])
    assert sum("tie_word_embeddings = True (SOURCE: False)" in text for text in plan.warnings) == 1
    assert plan.config["tie_word_embeddings"] is False


def test_a_base_in_older_words_is_the_base_of_a_fine_tune_in_newer_words(tmp_path):
    """Either of the two may be SOURCE, without a warning."""
    base, paths = family(tmp_path, count=2)
    older = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10000.0, "dtype": None}
    old = open_model(_broken(base, **older, torch_dtype="float32"))
    new = [open_model(path) for path in paths]
    assert "rope_theta" in old.checkpoint.config and old.checkpoint.config.get("rope_parameters") is None
    assert not plan_upcycle(old, siblings=new).warnings
    assert not plan_upcycle(new[0], siblings=[old, new[1]]).warnings


def test_a_longest_context_that_the_rotary_factors_depend_on_is_refused(tmp_path):
    base, paths = family(tmp_path, count=2)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    lengths = zip((base, *paths), (64, 64, 128))
    made = [open_model(_broken(path, rope_parameters=rope, max_position_embeddings=n)) for path, n in lengths]
    with pytest.raises(InputError, match="max_position_embeddings = 128, SOURCE has 64"):
        plan_upcycle(made[0], siblings=made[1:])


@pytest.mark.slow
def test_another_vocabulary_size_is_warned_of_and_so_are_strangers(tmp_path, cli):
    base, paths = family(tmp_path, count=1)
    model_type, config = DENSE_CASES["llama"]
    wide = save_stock(tmp_path / "wide", model_type, config | {"vocab_size": 130}, dtype=torch.float32)
    done = cli("upcycle", base, tmp_path / "moe", "--experts-from", paths[0], "--experts-from", wide, "--json")
    assert done.code == 0 and any("vocab_size = 130 (SOURCE: 128)" in text for text in done.json["warnings"])
    stranger = save_stock(tmp_path / "stranger", model_type, config, dtype=torch.float32, seed=9)
    flags = ("--experts-from", paths[0], "--experts-from", stranger, "--no-check", "--json")
    done = cli("upcycle", base, tmp_path / "other", *flags)
    assert done.code == 0 and any("does not look like a sibling" in text for text in done.json["warnings"])


def test_another_vocabulary_is_refused_by_a_word(tmp_path, cli):
    base, paths = family(tmp_path, count=2)
    for path, words in ((base, {"a": 0, "b": 1}), (paths[0], {"a": 0, "b": 1}), (paths[1], {"a": 1, "b": 0})):
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))
    flags = ("--experts-from", paths[0], "--experts-from", paths[1])
    done = cli("upcycle", base, tmp_path / "moe", *flags, "--json")
    assert done.code == 3 and "token a has id 1, in SOURCE 0" in done.json["error"]["message"].replace("'", "")


# -- routers from data -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two kinds of text that the demo's tokenizer tells apart."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "digits.txt").write_text(" ".join(str(i * 7919 % 10007) for i in range(4000)))
    (folder / "prose.txt").write_text((DEMO / "calibration.txt").read_text()[:24000])
    return folder / "digits.txt", folder / "prose.txt"


_FEW = ("--tokens", 2048, "--seq-len", 64)


@pytest.mark.slow
def test_hidden_routers_send_text_to_the_expert_of_its_kind(tmp_path, cli, texts):
    source = DEMO / "model"
    data = [word for path in texts for word in ("--data", path)]
    arguments = ("--experts", 2, "--top-k", 1, "--router", "hidden", *data, *_FEW, "--json")
    done = cli("upcycle", source, tmp_path / "moe", *arguments)
    assert done.code == 0, done.out
    router = done.json["upcycle"]["router"]
    assert [s["name"] for s in router["sources"]] == ["digits.txt", "prose.txt"]
    assert all(layer["own"] > 0.75 for layer in router["layers"])
    # copies of one FFN: whatever the router says, the function stays
    assert done.json["upcycle"]["exact"] and done.json["upcycle"]["equivalence"]["relative"] <= 1e-5
    again = cli("upcycle", source, tmp_path / "again", *arguments)
    assert again.json["files"] == done.json["files"]


def test_centroid_routers_spread_their_tokens_over_all_experts(tmp_path, cli, texts):
    arguments = ("--experts", 4, "--method", "drop", "--router", "centroid", "--data", texts[1], *_FEW, "--no-check")
    done = cli("upcycle", DEMO / "model", tmp_path / "moe", *arguments, "--json")
    assert done.code == 0, done.out
    for layer in done.json["upcycle"]["router"]["layers"]:
        assert max(layer["load"]) < 0.5 and min(layer["load"]) > 0.08


def test_a_dry_run_with_a_measured_router_measures_nothing_and_knows_the_size(tmp_path, cli, texts):
    arguments = ("--experts", 4, "--router", "centroid", "--data", texts[1], *_FEW, "--no-check", "--json")
    dry = cli("upcycle", DEMO / "model", tmp_path / "moe", *arguments, "--dry-run")
    assert dry.code == 0, dry.out
    assert cli("upcycle", DEMO / "model", tmp_path / "moe", *arguments).json["bytes"] == dry.json["bytes"]


@pytest.mark.slow
def test_measured_rows_are_repeated_for_the_pieces_of_a_copy(tmp_path, cli, texts):
    arguments = (
        "--method",
        "granular",
        "--experts",
        8,
        "--top-k",
        4,
        "--router",
        "centroid",
        "--data",
        texts[1],
        *_FEW,
    )
    done = cli("upcycle", DEMO / "model", tmp_path / "moe", *arguments, "--json")
    assert done.code == 0, done.out
    assert done.json["upcycle"]["equivalence"]["relative"] <= 1e-5
    written = open_model(tmp_path / "moe")
    rows = load(tmp_path / "moe").state_dict()[written.router_name(0).replace("block_sparse_moe", "mlp")]
    assert torch.equal(rows[0::2], rows[1::2]) and not torch.equal(rows[0], rows[2])


def test_hidden_needs_one_text_an_expert(tmp_path, cli, texts):
    done = cli(
        "upcycle", DEMO / "model", tmp_path / "moe", "--experts", 4, "--router", "hidden", "--data", texts[0], "--json"
    )
    assert done.code == 2 and "one --data value per expert" in done.json["error"]["message"]


def test_clusters_are_balanced_and_do_not_depend_on_anything_but_the_seed():
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((3, 16))
    sizes = (900, 200, 100)
    vectors = np.concatenate([c + 0.4 * draw.standard_normal((n, 16)) for c, n in zip(centers, sizes)]).astype(
        np.float32
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    one = balanced_centroids(vectors, 6, seed=1, layer=0)
    assert np.array_equal(one, balanced_centroids(vectors, 6, seed=1, layer=0))
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    load = np.bincount((vectors @ one.T).argmax(1), minlength=6)
    assert load.min() > 0.3 * 200 and load.max() < 2 * 200
