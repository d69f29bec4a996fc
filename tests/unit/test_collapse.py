"""`moeconv collapse`: what is written for which weights, what is refused, and that it resumes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from crash.faults import Faults
from tiny import decode as values_of
from tiny import edit_json, hashes, make_dense, make_moe, read_tensors, write_shards
from words import add_tokenizer, text

from moeconv.collapsing import step
from moeconv.errors import Interrupted
from moeconv.families.model import open_model

DATA = ("--seq-len", 16, "--tokens", 512)


def matrices(path):
    """{name: float64 matrix} of a checkpoint."""
    return {n: values_of(data, d, s).astype(np.float64) for n, (d, s, data) in read_tensors(path).items()}


@pytest.fixture
def copies(tmp_path, cli):
    """A dense model, and the Mixture-of-Experts that was upcycled of it."""
    dense = add_tokenizer(make_dense(tmp_path / "dense", dtype="BF16"))
    assert cli("upcycle", dense, tmp_path / "moe", "--experts", 4, "--no-check", "-q").code == 0
    return dense, tmp_path / "moe"


COPIES = {
    "whole": ("--experts", 8),
    "pieces": ("--experts", 8, "--granularity", 2, "--top-k", 4),
    "zero shared expert": ("--experts", 8, "--to", "qwen2_moe"),
    "shared piece": ("--experts", 6, "--top-k", 3, "--to", "glm4_moe", "--granularity", 4, "--shared-experts", 1),
}


@pytest.mark.parametrize("flags", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("with_data", [False, True])
def test_a_model_of_copies_becomes_the_dense_model_again(tmp_path, cli, flags, with_data):
    """Bit for bit in bfloat16, whole copies, pieces and shared pieces alike."""
    dense = add_tokenizer(make_dense(tmp_path / "dense", dtype="BF16"))
    done = cli("upcycle", dense, tmp_path / "moe", "--no-check", "-q", *flags)
    assert done.code == 0, done.out + done.err
    (tmp_path / "text.txt").write_text(text(600))
    more = ("--data", tmp_path / "text.txt", *DATA) if with_data else ()
    done = cli("collapse", tmp_path / "moe", tmp_path / "out", "--width", 64, "--to", "llama", "--json", *more)
    assert done.code == 0, done.out
    before, after = matrices(dense), matrices(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.array_equal(_sorted(n, before), _sorted(n, after)) for n in before)
    assert all(row["distinct"] == 64 and not row["fitted"] for row in done.json["collapse"]["layers"])


def _sorted(name, tensors):
    """A tensor of an FFN with its neurons in the order of the gate's rows: pieces and shared experts come in another
    order than in the dense model."""
    if ".mlp." not in name:
        return tensors[name]
    order = np.lexsort(tensors[name.rpartition(".mlp.")[0] + ".mlp.gate_proj.weight"].T)
    return tensors[name][:, order] if "down" in name else tensors[name][order]


def test_without_data_the_largest_norms_stay_with_the_mean_of_the_weights(tmp_path, cli):
    source = make_moe(tmp_path / "moe", "mixtral", experts=4, dtype="F32")
    done = cli("collapse", source, tmp_path / "out", "--width", 40, "--json")
    assert done.code == 0, done.out
    assert "256 distinct neurons in the experts of a layer, of which 40 stay" in done.json["warnings"][0]
    before, after = matrices(source), matrices(tmp_path / "out")
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe.experts.{{}}.{{}}.weight"
        gate, up, down = (
            np.concatenate([before[name.format(e, w)].T if w == "w2" else before[name.format(e, w)] for e in range(4)])
            for w in ("w1", "w3", "w2")
        )
        score = np.prod([np.linalg.norm(m, axis=1) for m in (gate, up, down)], axis=0)
        chosen = np.sort(np.argsort(-score, kind="stable")[:40])
        mlp = f"model.layers.{layer}.mlp.{{}}_proj.weight"
        assert np.array_equal(after[mlp.format("gate")], gate[chosen])
        assert np.array_equal(after[mlp.format("up")], up[chosen])
        assert np.allclose(after[mlp.format("down")], down[chosen].T / 4, rtol=1e-6, atol=0)


def test_dense_layers_keep_their_ffn_and_get_neurons_of_zero(tmp_path, cli):
    """Qwen3-MoE with one dense layer of 64 neurons beside experts of 64, top-2: all layers get 128."""
    source = make_moe(tmp_path / "moe", "qwen3_moe", dtype="F32", layers=3, mlp_only_layers=[1])
    done = cli("collapse", source, tmp_path / "out", "--json")
    assert done.code == 0, done.out
    model = open_model(source)
    width = 2 * model.expert_width
    assert done.json["collapse"]["width"] == width and done.json["collapse"]["collapsed_layers"] == [0, 2]
    before, after = matrices(source), matrices(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == width
    dense = model.ffn_width
    for part in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.{part}_proj.weight"
        made = after[name].T if part == "down" else after[name]
        old = before[name].T if part == "down" else before[name]
        assert made.shape[0] == width and np.array_equal(made[:dense], old) and not made[dense:].any()
    few = cli("collapse", source, tmp_path / "few", "--width", dense - 8, "--json")
    assert few.code == 2 and f"layer 1 of the source is dense and has {dense} neurons" in few.json["error"]["message"]


@pytest.mark.parametrize("with_data", [False, True])
def test_a_dry_run_states_the_bytes_that_are_written(tmp_path, cli, copies, with_data):
    (tmp_path / "text.txt").write_text(text(600))
    more = ("--data", tmp_path / "text.txt", *DATA) if with_data else ()
    words = ("collapse", copies[1], tmp_path / "out", "--multiple", 48, "--dtype", "float32", "--json", *more)
    planned, done = cli(*words, "--dry-run"), cli(*words)
    assert planned.code == done.code == 0, planned.out + done.out
    same = ("tensors", "shards", "bytes", "parameters", "changed")
    assert {key: planned.json[key] for key in same} == {key: done.json[key] for key in same}
    assert done.json["collapse"]["width"] == 144  # 2 experts of 64, rounded up
    assert done.json["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert ("memory" in planned.json) == with_data


@pytest.mark.parametrize(
    ("make", "flags", "code", "word"),
    [
        (lambda path: make_dense(path), (), 3, "has no experts to collapse"),
        (lambda path: make_moe(path, "olmoe"), (), 3, "no dense family of transformers is known"),
        (lambda path: make_moe(path, "mixtral"), ("--to", "qwen3"), 3, "mixtral cannot become it"),
        (lambda path: make_moe(path, "mixtral"), ("--width", 0), 2, "--width 0"),
        (lambda path: make_moe(path, "mixtral"), ("--width", 8, "--multiple", 4), 2, "--multiple"),
        (lambda path: make_moe(path, "mixtral"), ("--multiple", 10**9), 2, "--multiple 1000000000 makes a width"),
        (lambda path: make_moe(path, "mixtral"), ("--neurons", "surgeon"), 2, "there is no --data"),
        (lambda path: make_moe(path, "mixtral"), ("--shard-by", "expert"), 2, "the result has no experts"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(tmp_path, cli, make, flags, code, word):
    done = cli("collapse", make(tmp_path / "moe"), tmp_path / "out", *flags, "--json")
    assert done.code == code and word in done.json["error"]["message"], done.out
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_and_damaged_experts_are_refused(tmp_path, cli, left_over):
    source = make_moe(tmp_path / "moe", "mixtral", hidden=64, intermediate=64, dtype="F32")
    assert cli("quantize", source, tmp_path / "packed", "-q").code == 0
    done = cli("collapse", tmp_path / "packed", tmp_path / "out", "--json")
    assert done.code == 3 and "quantized" in done.json["error"]["message"]
    tensors = dict(read_tensors(source))
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    kind, shape, data = tensors[name]
    tensors[name] = (kind, shape, np.full(shape, np.nan, np.float32).tobytes() if data else data)
    write_shards(source, tensors)
    done = cli("collapse", source, tmp_path / "out", "--json")
    assert done.code == 3 and "NaN" in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_a_head_of_its_own_in_a_model_that_says_tied_is_kept(tmp_path, cli):
    source = make_moe(tmp_path / "moe", "mixtral", experts=4, dtype="F32", tie_word_embeddings=False)
    edit_json(source / "config.json", tie_word_embeddings=True)
    done = cli("collapse", source, tmp_path / "out", "--json")
    assert done.code == 0, done.out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert np.array_equal(matrices(source)["lm_head.weight"], matrices(tmp_path / "out")["lm_head.weight"])


def test_settings_that_no_dense_twin_has_are_refused_by_name(tmp_path, cli):
    source = make_moe(tmp_path / "moe", "qwen2_moe")
    edit_json(source / "config.json", hidden_act="gelu")
    assert cli("collapse", source, tmp_path / "out", "-q").code == 0, "a setting that both have is kept"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_act"] == "gelu"


def test_an_interrupted_run_resumes_and_does_not_measure_again(tmp_path, cli, copies, monkeypatch):
    def stopped(*_args, **_keywords):
        raise Interrupted(2)

    assert cli("collapse", copies[1], tmp_path / "whole", "-q").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(step, "run_plan", stopped)
        assert cli("collapse", copies[1], tmp_path / "out", "-q").code not in (0, 1)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(step, "_measured", stopped)
    done = cli("collapse", copies[1], tmp_path / "out", "-q")
    assert done.code == 0, done.err
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_at_any_moment_leaves_no_output_and_the_next_run_finishes(tmp_path, cli, copies):
    with Faults() as counted:
        assert cli("collapse", copies[1], tmp_path / "whole", "-q", "--jobs", 1).code == 0
    assert counted.count > 12
    for at in range(0, counted.count, max(1, counted.count // 8)):
        out = tmp_path / f"out{at}"
        with Faults(at=at, mode="full"):
            code = cli("collapse", copies[1], out, "-q", "--jobs", 1).code
        if not out.exists():
            assert code == 4, at
            assert cli("collapse", copies[1], out, "-q", "--jobs", 1).code == 0, at
        assert hashes(out) == hashes(tmp_path / "whole"), at


@pytest.mark.slow
def test_memory_depends_on_one_layer_and_not_on_their_number(tmp_path, command):
    sizes = {"experts": 8, "hidden": 128, "intermediate": 512}
    peaks = []
    for layers in (2, 16):
        source = make_moe(tmp_path / f"moe{layers}", "mixtral", layers=layers, **sizes)
        done = command("collapse", source, tmp_path / f"out{layers}", "--width", 512, "--jobs", 1, "--json")
        assert done.code == 0, done.err
        peaks.append(done.json["peak_rss_bytes"])
    assert peaks[1] - peaks[0] < 25_000_000  # 14 layers of 3 MB in bfloat16 are 44 MB


def test_distillation_from_the_source_heals_the_dense_model(tmp_path, cli):
    moe = add_tokenizer(make_moe(tmp_path / "moe", "qwen3_moe", dtype="F32", hidden=64))
    loud = {n: (d, s, (np.frombuffer(data, np.float32) * 8).tobytes() if ".experts." in n or "lm_head" in n else data)
            for n, (d, s, data) in read_tensors(moe).items()}  # fmt: skip
    write_shards(moe, loud)  # experts whose outputs matter
    (tmp_path / "text.txt").write_text(text(2000))
    data = ("--data", tmp_path / "text.txt", "--seq-len", 16)
    assert cli("collapse", moe, tmp_path / "out", "--width", 32, "--tokens", 512, "-q", *data).code == 0
    words = ("tune", tmp_path / "out", tmp_path / "tuned", "--teacher", moe, "--steps", 30, "--json", *data)
    done = cli(*words, "--objective", "distill", "--train", "ffn,norms", "--learning-rate", 0.01)
    assert done.code == 0, done.out
    assert done.json["tune"]["kl_after"] < done.json["tune"]["kl_before"] and done.json["tune"]["improved"]
    assert done.json["changed"] == {"ffn": 6, "norm": 5} and done.json["tune"]["layers"] == []
    for flags, code, word in [
        ((), 3, "is dense: it has no router to tune"),
        (("--train", "ffn"), 2, "--objective layerwise trains Mixtures-of-Experts"),
        (("--train", "ffn", "--objective", "distill", "--z-loss", 0.1), 2, "--z-loss concerns routers"),
    ]:
        refused = cli(*words[:2], tmp_path / "no", *words[3:], *flags)
        assert refused.code == code and word in refused.json["error"]["message"]


def test_a_step_of_a_recipe(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add_tokenizer(make_dense(tmp_path / "dense"))
    (tmp_path / "recipe.yaml").write_text(
        "name: there-and-back\nsteps:\n"
        "- {step: upcycle, from: dense, to: moe, with: {to: mixtral, experts: 4}}\n"
        "- {step: collapse, from: moe, to: dense-again, with: {width: 64}}\n"
    )
    planned = cli("run", tmp_path / "recipe.yaml", "--dry-run", "--json")
    done = cli("run", tmp_path / "recipe.yaml", "--json")
    assert planned.code == done.code == 0, planned.out + done.out
    assert [row["bytes"] for row in planned.json["steps"]] == [row["bytes"] for row in done.json["steps"]]
    assert open_model(tmp_path / "dense-again").family.model_type == "llama"
    before, after = matrices(tmp_path / "dense"), matrices(tmp_path / "dense-again")
    assert all(np.array_equal(before[name], after[name]) for name in before)
