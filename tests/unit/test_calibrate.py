"""Statistics against the formulas, evaluated in float64 with loops on a whole stock model; and the file around them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from words import add_tokenizer, text

from moeconv.calibrate.artifact import FIELDS, load_statistics
from moeconv.calibrate.run import calibrate
from moeconv.calibrate.statistics import each_expert
from moeconv.data.windows import load_tokens
from moeconv.errors import InputError, OutputError, UsageError
from moeconv.families.model import Model, open_model
from moeconv.plan.execute import execute
from moeconv.plan.meter import SilentMeter
from moeconv.quantize.planner import plan_quantize
from moeconv.stream.layers import LayerStream

EXPERTS, TOP_K, SEQ_LEN = 6, 2, 16
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen3_moe-renormalised": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3_moe-plain": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen2_moe-shared": ("qwen2_moe", {"norm_topk_prob": True}),
    "olmoe": ("olmoe", {"norm_topk_prob": False}),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def make(path: Path, family: str = "mixtral", **config: Any) -> Path:
    """A model whose routers are decided (not near uniform), with a tokenizer."""
    tiny.make_moe(path, family, experts=EXPERTS, top_k=TOP_K, dtype="F32", **config)
    tensors = tiny.read_tensors(path)
    for name, (dtype, shape, data) in tensors.items():
        if shape == (EXPERTS, 32):
            tensors[name] = (dtype, shape, tiny.encode(tiny.decode(data, dtype, shape) * 8, dtype))
    tiny.write_shards(path, tensors)
    return add_tokenizer(path)


def texts(folder: Path) -> list[str]:
    (folder / "common.txt").write_text(text(170, seed=1))
    (folder / "rare.txt").write_text(" ".join(reversed(text(90, seed=2).split())))
    return [str(folder / "common.txt"), str(folder / "rare.txt")]


def expected(model: Model, data: Any) -> dict[int, dict[str, np.ndarray]]:
    """Every field that does not depend on the sample, and `output_cosine` over all tokens, token by token."""
    from transformers import AutoModelForCausalLM

    path = model.checkpoint.path
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    weights = {n: tiny.decode(d, t, s).astype(np.float64) for n, (t, s, d) in tiny.read_tensors(path).items()}
    seen: dict[int, dict[str, np.ndarray]] = {layer: {} for layer in model.moe_layers}

    def flat(value: torch.Tensor) -> np.ndarray:
        return value.reshape(-1, value.shape[-1]).numpy()

    for index in model.moe_layers:
        decoder, record = stock.model.layers[index], seen[index]
        decoder.post_attention_layernorm.register_forward_pre_hook(lambda _m, a, r=record: r.update(h=flat(a[0])))
        decoder.mlp.register_forward_hook(lambda _m, a, o, r=record: r.update(x=flat(a[0]), moe=flat(o)))
    with torch.no_grad():
        stock(torch.tensor(data.windows))
    source = np.repeat(data.source, data.seq_len)
    return {
        layer: fields_by_loops(model, weights, layer, seen[layer], source, len(data.sources))
        for layer in model.moe_layers
    }


def fields_by_loops(
    model: Model,
    weights: dict[str, np.ndarray],
    layer: int,
    seen: dict[str, np.ndarray],
    source: np.ndarray,
    sources: int,
) -> dict[str, np.ndarray]:
    x, h, moe = seen["x"], seen["h"], seen["moe"]

    def expert(e: int, v: np.ndarray) -> np.ndarray:
        gate, up, down = (weights[model.expert_name(p, layer=layer, expert=e)] for p in ("gate", "up", "down"))
        a = gate @ v
        return down @ (a / (1 + np.exp(-a)) * (up @ v))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    router = weights[model.router_name(layer)]
    per_source = FIELDS[:8]
    out = {name: np.zeros((sources, EXPERTS)) for name in per_source}
    out |= {"entropy_sum": np.zeros(sources), "tokens": np.zeros(sources)}
    pairs, similar = np.zeros((EXPERTS, EXPERTS)), np.zeros((EXPERTS, EXPERTS))
    outputs: list[list[np.ndarray]] = [[] for _ in range(EXPERTS)]
    logits = x @ router.T
    for t in range(len(x)):
        p = np.exp(logits[t] - logits[t].max())
        p /= p.sum()
        top = np.argsort(-p, kind="stable")[:TOP_K]
        g = p[top] / (p[top].sum() if model.renormalises else 1.0)
        s = source[t]
        moved = 1 - cosine(h[t], h[t] + moe[t])
        out["tokens"][s] += 1
        out["entropy_sum"][s] -= (p * np.log(p)).sum()
        for e, weight in zip(top, g):
            f = expert(e, x[t])
            norm = np.linalg.norm(f)
            outputs[e].append(f)
            values = (1, weight, weight**2, norm, norm**2, weight * norm, (weight * norm) ** 2, weight * norm * moved)
            for name, value in zip(per_source, values):
                out[name][s, e] += value
            for other in top:
                pairs[e, other] += 1
        every = [expert(e, x[t]) for e in range(EXPERTS)]
        similar += [[cosine(a, b) for b in every] for a in every]
    stacked = [np.stack(o) if o else np.zeros((1, x.shape[1])) for o in outputs]
    out["out_mean"] = np.stack([o.mean(0) for o in stacked])
    out["out_var"] = np.array([((o - o.mean(0)) ** 2).sum(1).mean() for o in stacked])
    out["coactivation"] = pairs
    out["output_cosine"] = similar / len(x)
    out["router_cosine"] = np.array([[cosine(a, b) for b in router] for a in router])
    out["logit_correlation"] = np.corrcoef(logits.T)
    out["logit_sum"], out["logit_product"] = logits.sum(0), logits.T @ logits
    return out


@pytest.mark.parametrize("case", CASES)
def test_every_field_is_its_formula(tmp_path: Path, case: str) -> None:
    family, config = CASES[case]
    path = make(tmp_path / "model", family, **config)
    paths = texts(tmp_path)
    summary = calibrate(
        path, tmp_path / "stats", data=paths, tokens=10_000, seq_len=SEQ_LEN, batch_size=3, sample_tokens=10_000
    )
    model = open_model(path)
    data = load_tokens(paths, path, tokens=None, seq_len=SEQ_LEN, seed=0)
    assert summary["tokens"] == data.tokens == 15 * SEQ_LEN
    statistics = load_statistics(tmp_path / "stats")
    assert statistics.layers == model.moe_layers
    for layer, fields in expected(model, data).items():
        assert set(fields) == set(FIELDS)
        for name, value in fields.items():
            mine = statistics.layer(layer, name)
            assert mine.shape == value.shape, name
            assert mine.dtype == (np.float32 if name == "out_mean" else np.float64)
            assert np.allclose(mine, value, rtol=2e-4, atol=2e-6), name
        assert np.array_equal(statistics.layer(layer, "count"), fields["count"])
        assert np.array_equal(statistics.layer(layer, "coactivation").diagonal(), fields["count"].sum(0))
        assert fields["count"].sum() == TOP_K * data.tokens
        assert statistics.layer(layer, "easy_ep_sum").sum() > 0


def test_the_summary_tells_the_load(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    heard: list[Any] = []

    class Meter:
        def start(self, *, total_bytes: int, parts: int, unit: str = "shard", tokens: int = 0) -> None:
            heard.append((parts, unit))

        def note(self, text: str) -> None: ...
        def advance(self, nbytes: int) -> None: ...
        def part_done(self) -> None:
            heard.append("done")

    out = tmp_path / "stats"
    summary = calibrate(path, out, data=texts(tmp_path), seq_len=SEQ_LEN, meter=Meter())
    assert heard == [(2, "layer"), "done", "done"]
    statistics = load_statistics(out)
    json.dumps(summary, allow_nan=False)
    assert summary["output"] == str(out)
    assert [s["name"] for s in summary["sources"]] == ["common.txt", "rare.txt"]
    for row in summary["layers"]:
        count = statistics.layer(row["layer"], "count").sum(axis=0)
        assert row["load"] == pytest.approx(count / count.sum())
        assert row["max_over_mean"] == pytest.approx(count.max() / count.mean())
        assert row["dead"] == int((count == 0).sum())
        entropy = statistics.layer(row["layer"], "entropy_sum").sum() / statistics.layer(row["layer"], "tokens").sum()
        assert row["entropy"] == pytest.approx(entropy)
        assert 0 < entropy < np.log(EXPERTS)


def test_same_seed_same_bytes_and_the_sample_is_a_sample(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    files = []
    for name, seed, batch in (("a", 0, 2), ("b", 0, 2), ("c", 1, 2)):
        calibrate(path, tmp_path / name, data=texts(tmp_path), tokens=160, seq_len=SEQ_LEN, seed=seed, batch_size=batch,
                  sample_tokens=20)  # fmt: skip
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] != files[2]
    calibrate(
        path, tmp_path / "all", data=texts(tmp_path), tokens=160, seq_len=SEQ_LEN, batch_size=2, sample_tokens=160
    )
    few, all_ = load_statistics(tmp_path / "a"), load_statistics(tmp_path / "all")
    assert np.array_equal(few.layer(0, "count"), all_.layer(0, "count"))
    assert not np.allclose(few.layer(0, "output_cosine"), all_.layer(0, "output_cosine"))
    assert np.allclose(few.layer(0, "output_cosine"), all_.layer(0, "output_cosine"), atol=0.3)


@pytest.mark.slow
def test_two_files_add_up_to_one_of_all_data(tmp_path: Path, cli: Any) -> None:
    path, paths = make(tmp_path / "model", "qwen3_moe"), texts(tmp_path)
    parameters: dict[str, Any] = {"seq_len": SEQ_LEN, "batch_size": 3, "sample_tokens": 10_000}
    for name, data in (("a", paths[:1]), ("b", paths[1:]), ("both", paths)):
        calibrate(path, tmp_path / name, data=data, **parameters)
    done = cli("calibrate", path, tmp_path / "sum", "--merge", tmp_path / "a", "--merge", tmp_path / "b", "--json")
    assert done.code == 0, done.out
    both, added = load_statistics(tmp_path / "both"), load_statistics(tmp_path / "sum")
    for layer in both.layers:
        for name in FIELDS:
            wanted = both.layer(layer, name)
            np.testing.assert_allclose(added.layer(layer, name), wanted, rtol=1e-5, atol=1e-7, err_msg=name)
    assert added.metadata["sources"] == both.metadata["sources"] and added.metadata["tokens"] == 15 * SEQ_LEN
    parts = added.metadata["merged"]
    assert [[s["name"] for s in p["sources"]] for p in parts] == [["common.txt"], ["rare.txt"]]
    assert [p["seed"] for p in parts] == [0, 0] and done.json["tokens"] == 15 * SEQ_LEN
    added.check_belongs(open_model(path))

    calibrate(path, tmp_path / "seed", data=paths[:1], seed=3, **parameters)
    calibrate(path, tmp_path / "short", data=paths[1:], seed=3, **(parameters | {"seq_len": 8}))
    calibrate(make(tmp_path / "other", seed=5), tmp_path / "foreign", data=paths[1:], **parameters)
    (tmp_path / "old").write_bytes((tmp_path / "b").read_bytes().replace(b"logit_sum", b"logit_xyz"))

    def add(*files: str) -> Any:
        named = [word for file in files for word in ("--merge", tmp_path / file)]
        return cli("calibrate", path, tmp_path / "total", *named, "--overwrite", "--json")

    twice = add("sum", "seed")  # the sum holds common.txt with seed 0
    assert twice.code == 0 and "some tokens may count twice" in twice.json["warnings"][0]
    assert load_statistics(tmp_path / "total").metadata["sources"][0]["tokens"] == 20 * SEQ_LEN
    assert len(load_statistics(tmp_path / "total").metadata["merged"]) == 3
    kept = (tmp_path / "total").read_bytes()
    for files, code, said in (
        (("a",), 2, "at least two"), (("a", "sum"), 3, "count twice"), (("a", "short"), 3, "seq_len: 16 and 8"),
        (("a", "foreign"), 3, "another model"), (("a", "old"), 3, "no logit_sum"), (("a", "nowhere"), 3, "not exist"),
    ):  # fmt: skip
        refused = add(*files)
        assert refused.code == code and said in refused.json["error"]["message"], (files, refused)
    assert cli("calibrate", path, tmp_path / "sum", "--merge", "x", "--data", paths[0]).code == 2
    assert (tmp_path / "total").read_bytes() == kept


KILLED = """
import os, signal, sys, torch
from moeconv.calibrate import run, state
torch.set_num_threads(1)
keep = state.SavedProgress.save
def save(self, stream, passed, fields):
    if passed == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    keep(self, stream, passed, fields)
state.SavedProgress.save = save
run.calibrate(sys.argv[1], sys.argv[2], data=sys.argv[4:], seq_len=16, batch_size=4, save_every=0)
"""


@pytest.mark.slow
def test_killed_at_a_random_layer_and_run_again_the_file_is_the_same(tmp_path: Path) -> None:
    layers = 5
    path = make(tmp_path / "model", "qwen3_moe", layers=layers, mlp_only_layers=[1])
    paths, out, state = texts(tmp_path), tmp_path / "stats", tmp_path / ".stats.moeconv-state"
    killed_at = int(np.random.default_rng().integers(2, layers))  # layers passed; what was saved is one less
    done = subprocess.run([sys.executable, "-c", KILLED, path, out, str(killed_at), *paths], check=False)
    assert done.returncode == -9 and not out.exists()
    assert (state / f"hidden-{killed_at - 1}.0").exists()

    class Notes(SilentMeter):
        def note(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    shutil.copytree(state, tmp_path / "copy")
    parameters: dict[str, Any] = {"data": paths, "seq_len": SEQ_LEN, "batch_size": 4, "meter": Notes()}
    again = calibrate(path, out, **parameters)
    assert f"resuming after layer {killed_at - 2}" in said and not state.exists()
    calibrate(path, tmp_path / "whole", **parameters)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes(), killed_at
    assert [row["layer"] for row in again["layers"]] == [0, 2, 3, 4]

    for changed in ({"seed": 1}, {"batch_size": 3}, {"sample_tokens": 5}, {"data": paths[:1]}):  # anew
        shutil.copytree(tmp_path / "copy", state)
        said.clear()
        calibrate(path, out, overwrite=True, **(parameters | changed))
        assert not any("resuming" in text for text in said) and not state.exists(), changed
    shutil.copytree(tmp_path / "copy", state)
    os.truncate(state / f"hidden-{killed_at - 1}.0", 100)
    calibrate(path, out, overwrite=True, **parameters)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_disk_that_keeps_no_resume_point_does_not_end_the_work(tmp_path: Path, monkeypatch) -> None:
    path = make(tmp_path / "model")
    monkeypatch.setattr("moeconv.calibrate.state.os.fsync", lambda _fd: (_ for _ in ()).throw(OSError(28, "No space")))
    parameters: dict[str, Any] = {"data": texts(tmp_path), "seq_len": SEQ_LEN}
    monkeypatch.setattr("moeconv.calibrate.run.write_statistics", lambda *_a, **_k: None)
    assert calibrate(path, tmp_path / "stats", save_every=0, **parameters)["tokens"] == 15 * SEQ_LEN
    assert not (tmp_path / ".stats.moeconv-state").exists()


def test_watching_the_experts_changes_nothing(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "qwen3_moe")
    ids = np.random.default_rng(0).integers(0, 64, (3, SEQ_LEN))
    plain = LayerStream(open_model(path), ids).run()
    watched = LayerStream(open_model(path), ids)
    routed = 0
    for layer in watched.layers():
        seen: list[int] = []
        with each_expert(layer.experts, lambda _expert, token, _slot, _output, seen=seen: seen.append(len(token))):
            for _ in layer.batches():
                pass
        routed += sum(seen)
    assert routed == 2 * TOP_K * ids.size
    assert torch.equal(watched.hidden, plain.hidden)


def test_identical_experts_have_cosine_one(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    tensors = tiny.read_tensors(path)
    for name in tensors:
        if ".experts.3." in name:
            tensors[name] = tensors[name.replace(".experts.3.", ".experts.1.")]
    tiny.write_shards(path, tensors)
    calibrate(path, tmp_path / "stats", data=texts(tmp_path), seq_len=SEQ_LEN)
    cosine = load_statistics(tmp_path / "stats").layer(1, "output_cosine")
    assert cosine[1, 3] == pytest.approx(1.0, abs=1e-5)
    assert np.abs(cosine[1, [0, 2, 4, 5]]).max() < 0.9


def test_a_quantized_model_can_be_calibrated(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    source = open_model(path)
    plan = plan_quantize(source, format="compressed-tensors", scheme="int8", group_size="auto")
    execute(plan, source=source.checkpoint, out=tmp_path / "packed")
    add_tokenizer(tmp_path / "packed")
    for name in ("model", "packed"):
        calibrate(tmp_path / name, tmp_path / f"{name}.stats", data=texts(tmp_path), seq_len=SEQ_LEN)
    plain, packed = (load_statistics(tmp_path / f"{name}.stats") for name in ("model", "packed"))
    a, b = plain.layer(0, "gate_norm_sum"), packed.layer(0, "gate_norm_sum")
    assert not np.array_equal(a, b)
    assert np.allclose(a, b, rtol=0.02)


def test_statistics_belong_to_one_model(tmp_path: Path) -> None:
    path, other = make(tmp_path / "model"), make(tmp_path / "other", seed=7)
    calibrate(path, tmp_path / "stats", data=texts(tmp_path), seq_len=SEQ_LEN)
    statistics = load_statistics(tmp_path / "stats")
    statistics.check_belongs(open_model(path))
    with pytest.raises(InputError, match="statistics of another model"):
        statistics.check_belongs(open_model(other))
    with pytest.raises(InputError, match="no no_such_field for layer 0"):
        statistics.layer(0, "no_such_field")
    metadata = statistics.metadata
    assert metadata["identity"] == open_model(path).identity
    assert [s["name"] for s in metadata["sources"]] == ["common.txt", "rare.txt"]  # no paths: files are handed around
    assert str(tmp_path) not in (tmp_path / "stats").read_bytes()[:4000].decode(errors="replace")


def test_reading_statistics_imports_no_torch(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    calibrate(path, tmp_path / "stats", data=texts(tmp_path), seq_len=SEQ_LEN)
    code = (
        "import sys; from moeconv.calibrate.artifact import load_statistics;"
        f"s = load_statistics({str(tmp_path / 'stats')!r}); print(int(s.layer(0, 'count').sum()));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(15 * SEQ_LEN * TOP_K)), done.stderr


def test_targets_are_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "model")
    out = tmp_path / "stats"
    out.write_text("old")
    (tmp_path / "folder").mkdir()

    def run(target: Path, **more: Any) -> None:
        calibrate(path, target, data=texts(tmp_path), seq_len=SEQ_LEN, **more)

    with monkeypatch.context() as patch:
        patch.setattr("moeconv.calibrate.run.load_tokens", lambda *_a, **_k: pytest.fail("it began to work"))
        with pytest.raises(OutputError, match="exists already"):
            run(out)
        with pytest.raises(OutputError, match="is a directory"):
            run(tmp_path / "folder", overwrite=True)
        with pytest.raises(OutputError, match="not a statistics file"):
            run(out, overwrite=True)
        with pytest.raises(OutputError, match="does not exist"):
            run(tmp_path / "nowhere" / "stats")
        with pytest.raises(UsageError, match="--seq-len 129 is more than the model's 128"):
            calibrate(path, tmp_path / "new", data=texts(tmp_path), seq_len=129)
        with pytest.raises(UsageError, match="sample-tokens"):
            run(tmp_path / "new", sample_tokens=0)
    assert out.read_text() == "old"
    out.unlink()
    for _ in range(2):
        run(out, overwrite=True)
    assert load_statistics(out).layers == (0, 1)
    assert sorted(os.listdir(tmp_path)) == ["common.txt", "folder", "model", "rare.txt", "stats"]


def test_the_default_length_is_at_most_the_models(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    (tmp_path / "long.txt").write_text(text(300))
    assert calibrate(path, tmp_path / "stats", data=[str(tmp_path / "long.txt")])["tokens"] == 256
    assert load_statistics(tmp_path / "stats").metadata["seq_len"] == 128


def test_refusals(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    tensors = tiny.read_tensors(path)
    name = next(n for n in tensors if n.endswith("layers.1.block_sparse_moe.gate.weight"))
    dtype, shape, _ = tensors[name]
    tensors[name] = (dtype, shape, tiny.encode(np.full(shape, np.nan), dtype))
    tiny.write_shards(path, tensors)
    with pytest.raises(InputError, match="layer 1 computes NaN"):
        calibrate(path, tmp_path / "stats", data=texts(tmp_path), seq_len=SEQ_LEN)
    assert not (tmp_path / "stats").exists()
    with pytest.raises(InputError, match="does not exist"):
        load_statistics(tmp_path / "stats")
    (tmp_path / "stats").write_bytes(tiny.safetensors_bytes({}))
    with pytest.raises(InputError, match="not a moeconv statistics file"):
        load_statistics(tmp_path / "stats")
    (tmp_path / "stats").write_bytes(tiny.safetensors_bytes({}, moeconv='{"kind": "statistics", "version": 99}'))
    with pytest.raises(InputError, match="format 99"):
        load_statistics(tmp_path / "stats")
