"""evaluate against the stock model's own losses and plain formulas; gates; equivalence and strict loading."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from words import WORDS, add_tokenizer, text

from moeconv.data.windows import load_tokens
from moeconv.errors import InputError, UsageError
from moeconv.evaluate.gates import judge
from moeconv.evaluate.run import evaluate
from moeconv.evaluate.score import score_window
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.quantize.planner import plan_quantize
from moeconv.upcycle.check import compare as equivalence_module
from moeconv.upcycle.check.compare import equivalence
from moeconv.upcycle.planner import plan_upcycle
from moeconv.verify.load import load_strict, strict_problems

SEQ_LEN = 16


pytestmark = pytest.mark.usefixtures("one_thread")


def make(path: Path, family: str = "qwen3_moe", **config: Any) -> Path:
    build = tiny.make_moe if family in tiny.MOE else tiny.make_dense
    return add_tokenizer(build(path, family, **({"dtype": "F32"} | config)))


def sharpened(path: Path, factor: float = 20.0) -> Path:
    """The same model with larger output embeddings, so that its predictions differ from uniform."""
    return scaled(path, "lm_head.weight", factor)


def scaled(path: Path, name: str, factor: float) -> Path:
    tensors = tiny.read_tensors(path)
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, tiny.encode(tiny.decode(data, dtype, shape) * np.float32(factor), dtype))
    tiny.write_shards(path, tensors)
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    (tmp_path / "one.txt").write_text(text(100, seed=1))
    (tmp_path / "two.txt").write_text(text(70, seed=2))
    return [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]


def stock_logits(path: Path, windows: np.ndarray, *, routed: list[Any] | None = None) -> torch.Tensor:
    """float64 log-probabilities [n, S, V] of the whole stock model; `routed` gets the experts chosen per layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    if routed is not None:
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _m, _a, o: routed.append((o[0], o[2])))
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(windows)).logits, -1)


def test_losses_and_loads_are_the_stock_models(tmp_path: Path, paths: list[str]) -> None:
    path = sharpened(make(tmp_path / "model"))
    result = evaluate(path, data=paths, seq_len=SEQ_LEN, batch_size=3)
    data = load_tokens(paths, path, tokens=None, seq_len=SEQ_LEN, seed=0)
    routed: list[Any] = []
    logs = stock_logits(path, data.windows, routed=routed)
    losses = -logs[:, :-1].gather(2, torch.tensor(data.windows)[:, 1:, None])[..., 0]
    assert losses.mean() != pytest.approx(math.log(64), abs=0.05)
    assert result["tokens"] == losses.numel() == 10 * (SEQ_LEN - 1)
    assert result["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    for i, source in enumerate(result["sources"]):
        mine = losses[torch.tensor(data.source) == i]
        assert (source["name"], source["tokens"]) == (Path(paths[i]).name, mine.numel())
        assert source["loss"] == pytest.approx(float(mine.mean()), abs=1e-5)
    assert [row["layer"] for row in result["layers"]] == [0, 1]
    for row, (logits, index) in zip(result["layers"], routed):
        count = np.bincount(index.flatten(), minlength=4)
        p = torch.softmax(logits, -1)
        assert row["load"] == pytest.approx((count / count.sum()).tolist())
        assert row["entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-6)
        assert row["max_over_mean"] == pytest.approx(count.max() / count.mean())
        assert row["dead"] == (count == 0).sum()
    assert result["tokens_per_second"] > 0
    assert (result["passed"], result["gates"]) == (True, {})
    assert (result["reference"], result["kl"], result["top1_agreement"]) == (None, None, None)
    json.dumps(result, allow_nan=False)


def test_comparison_with_a_reference(tmp_path: Path, paths: list[str]) -> None:
    path = sharpened(make(tmp_path / "model"))
    other = sharpened(make(tmp_path / "other", "llama", seed=3), 15.0)
    result = evaluate(path, data=paths, seq_len=SEQ_LEN, reference=other)
    data = load_tokens(paths, path, tokens=None, seq_len=SEQ_LEN, seed=0)
    mine, theirs = (stock_logits(p, data.windows)[:, :-1] for p in (path, other))
    kl = (theirs.exp() * (theirs - mine)).sum(-1)
    wanted = torch.tensor(data.windows)[:, 1:, None]
    reference = -float(theirs.gather(2, wanted).mean())
    assert result["kl"] == pytest.approx(float(kl.mean()), abs=1e-5)
    assert result["kl"] > 0.1
    assert result["top1_agreement"] == pytest.approx(float((mine.argmax(-1) == theirs.argmax(-1)).double().mean()))
    assert result["reference"]["loss"] == pytest.approx(reference, abs=1e-5)
    assert result["reference"]["perplexity"] == pytest.approx(math.exp(reference), rel=1e-5)
    for i, source in enumerate(result["sources"]):
        rows = torch.tensor(data.source) == i
        assert source["kl"] == pytest.approx(float(kl[rows].mean()), abs=1e-5)
        assert source["reference_loss"] == pytest.approx(-float(theirs.gather(2, wanted)[rows].mean()), abs=1e-5)


def test_a_model_agrees_with_itself(tmp_path: Path, paths: list[str]) -> None:
    path = make(tmp_path / "model", tied=True)
    result = evaluate(
        path, data=paths, seq_len=SEQ_LEN, reference=path, max_kl=0.0, max_loss_increase=0.0, min_agreement=1.0
    )
    assert (result["kl"], result["top1_agreement"]) == (0.0, 1.0)
    assert result["passed"]
    assert result["gates"]["max_kl"] == {"limit": 0.0, "value": 0.0, "passed": True}


def test_gates_fail(tmp_path: Path, paths: list[str]) -> None:
    path, other = sharpened(make(tmp_path / "model")), make(tmp_path / "other", seed=3)
    result = evaluate(
        path, data=paths, seq_len=SEQ_LEN, reference=other, max_loss_increase=100.0, max_kl=1e-6, min_agreement=0.999
    )
    gates = result["gates"]
    assert {name: gate["passed"] for name, gate in gates.items()} == {
        "max_loss_increase": True, "max_kl": False, "min_agreement": False,
    }  # fmt: skip
    assert gates["max_loss_increase"]["value"] == pytest.approx(result["loss"] - result["reference"]["loss"])
    assert not result["passed"]


def test_nan_fails_every_gate(tmp_path: Path, paths: list[str]) -> None:
    path, other = make(tmp_path / "model"), make(tmp_path / "other")
    scaled(path, "lm_head.weight", float("nan"))
    limits = {"max_loss_increase": 100.0, "max_kl": 100.0, "min_agreement": 0.0}
    result = evaluate(path, data=paths, seq_len=SEQ_LEN, reference=other, **limits)
    assert [gate["passed"] for gate in result["gates"].values()] == [False, False, False]
    assert not result["passed"]
    assert result["loss"] is None and result["perplexity"] is None and result["kl"] is None
    json.dumps(result, allow_nan=False)
    nan = dict.fromkeys(("loss_increase", "kl", "top1_agreement"), float("nan"))
    assert [g["passed"] for g in judge(limits, nan).values()] == [False, False, False]
    assert [g["value"] for g in judge(limits, nan).values()] == [None, None, None]


def test_wrong_usage_is_told_before_anything_runs(tmp_path: Path, paths: list[str]) -> None:
    for gate in ({"max_kl": 0.1}, {"max_loss_increase": 0.1}, {"min_agreement": 0.9}):
        with pytest.raises(UsageError, match="needs a reference model"):
            evaluate(tmp_path / "no-model", data=paths, **gate)
    for gate in ({"max_kl": math.nan}, {"max_loss_increase": math.inf}, {"min_agreement": 90.0}):
        with pytest.raises(UsageError, match="expected"):
            evaluate(tmp_path / "no-model", data=paths, reference=tmp_path, **gate)
    with pytest.raises(UsageError, match="--dtype int4"):
        evaluate(tmp_path / "no-model", data=paths, dtype="int4")
    with pytest.raises(InputError, match="does not exist"):
        evaluate(tmp_path / "no-model", data=paths)
    path = make(tmp_path / "model")
    with pytest.raises(UsageError, match="--seq-len 200 is more than the model's 128"):
        evaluate(path, data=paths, seq_len=200)


def test_models_that_cannot_be_compared(tmp_path: Path, paths: list[str]) -> None:
    path, other = make(tmp_path / "model"), make(tmp_path / "other")
    add_tokenizer(other, words=tuple(reversed(WORDS)))
    with pytest.raises(InputError, match="different tokenizers"):
        evaluate(path, data=paths, reference=other, seq_len=SEQ_LEN)
    wider = make(tmp_path / "wider", vocab=80)
    with pytest.raises(InputError, match="a vocabulary of 64 tokens, and its reference one of 80"):
        evaluate(path, data=paths, reference=wider, seq_len=SEQ_LEN)


def test_a_sample_and_bfloat16(tmp_path: Path, paths: list[str]) -> None:
    path = sharpened(make(tmp_path / "model"))
    assert evaluate(path, data=paths, seq_len=SEQ_LEN, tokens=70)["tokens"] == 4 * (SEQ_LEN - 1)
    exact, rounded = (evaluate(path, data=paths, seq_len=SEQ_LEN, dtype=d)["loss"] for d in (None, "bfloat16"))
    assert 0 < abs(exact - rounded) < 0.1


def test_scores_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ids, logits, reference = torch.randint(50, (31,)), torch.randn(31, 50), torch.randn(31, 50)
    whole = score_window(ids, logits, reference)
    monkeypatch.setattr("moeconv.evaluate.score._CHUNK_BYTES", 4 * 50 * 7)
    chunked = score_window(ids, logits, reference)
    for name in ("tokens", "loss", "reference_loss", "kl", "agree"):
        assert getattr(chunked, name) == pytest.approx(getattr(whole, name), rel=1e-6)
    assert whole.tokens == 30
    assert whole.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")))


# -- equivalence and strict loading ------------------------------------------------------------------------------------


def upcycled(tmp_path: Path, **parameters: Any) -> tuple[Path, Path]:
    source = tiny.make_dense(tmp_path / "dense", "llama", dtype="F32")
    plan = plan_upcycle(open_model(source), experts=4, top_k=2, **parameters)
    execute(plan, source=open_model(source).checkpoint, out=tmp_path / "moe")
    return source, tmp_path / "moe"


def test_an_exact_upcycle_is_equivalent(tmp_path: Path) -> None:
    source, staged = upcycled(tmp_path)
    found = equivalence(source, staged)
    assert found["strict_load"] and found["problems"] == []
    assert found["tokens"] == 128
    assert found["spread"] > 0.1
    assert found["relative"] == found["max_abs_logit_diff"] / found["spread"] < 1e-5
    assert equivalence(source, staged, tokens=40, seed=1)["tokens"] == 40
    assert load_strict(staged)["ok"]


def test_a_changed_expert_is_seen(tmp_path: Path) -> None:
    source, staged = upcycled(tmp_path)
    scaled(staged, "model.layers.1.block_sparse_moe.experts.2.w2.weight", 1.5)
    assert equivalence(source, staged)["relative"] > 1e-3


def run(*arguments: object) -> tuple[int, Any]:
    command = [sys.executable, "-m", "moeconv.upcycle.check.compare", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_the_process_prints_one_json_object(tmp_path: Path) -> None:
    source, staged = upcycled(tmp_path)
    code, found = run(source, staged, "--tokens", 16, "--seed", 2, "--threads", 1)
    assert (code, found) == (0, equivalence(source, staged, tokens=16, seed=2))
    code, found = run(source, tmp_path / "nowhere")
    assert code == 3
    assert "does not exist" in found["error"]


def test_any_failure_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, staged = upcycled(tmp_path)
    scaled(staged, "lm_head.weight", float("inf"))
    assert equivalence_module.main([str(source), str(staged)]) == 3
    assert json.loads(capsys.readouterr().out) == {"error": "the logits of moe are NaN or infinite"}

    def broken(*arguments: Any, **keywords: Any) -> None:
        print("noise on standard output")
        raise MemoryError("no room")

    monkeypatch.setattr(equivalence_module, "equivalence", broken)
    assert equivalence_module.main([str(source), str(staged)]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": "MemoryError: no room"}
    assert "noise" in captured.err


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "llama", "mistral", "qwen2", "qwen3"])
def test_every_family_loads_strictly(tmp_path: Path, family: str) -> None:
    for tied in (False, True):
        path = make(tmp_path / f"{family}-{tied}", family, tied=tied)
        assert strict_problems(open_model(path)) == []
        assert load_strict(path) == {"ok": True, "problems": [], "missing": [], "unexpected": [], "mismatched": []}


def test_what_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, staged = upcycled(tmp_path)
    tiny.edit_json(staged / "config.json", num_key_value_heads=4)
    wrong = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(InputError, match=wrong):
        open_model(staged)
    monkeypatch.setattr("moeconv.families.check.check_plain", lambda _model: None)  # what opening misses, loading names
    assert any(p.startswith("mismatched") and wrong in p for p in strict_problems(open_model(staged)))
    found = equivalence(source, staged)
    assert found["strict_load"] is False
    assert found["relative"] is None
    assert not load_strict(staged)["ok"]

    lost = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    broken = shutil.copytree(tmp_path / "moe", tmp_path / "broken")
    tensors = tiny.read_tensors(broken)
    del tensors[lost]
    for file in broken.glob("*.safetensors*"):
        file.unlink()
    tiny.write_shards(broken, tensors)
    tiny.edit_json(broken / "config.json", num_key_value_heads=2)
    report = load_strict(broken)
    assert not report["ok"]
    assert report["problems"]


def test_a_quantized_model_loads_strictly_and_evaluates(tmp_path: Path, paths: list[str]) -> None:
    path = sharpened(make(tmp_path / "model", hidden=64, intermediate=128))
    source = open_model(path)
    plan = plan_quantize(source, format="compressed-tensors", scheme="int8", group_size="auto")
    execute(plan, source=source.checkpoint, out=tmp_path / "packed")
    assert strict_problems(open_model(tmp_path / "packed")) == []
    assert load_strict(tmp_path / "packed")["ok"]
    result = evaluate(tmp_path / "packed", data=paths, seq_len=SEQ_LEN, reference=path, max_kl=0.01)
    assert result["passed"]
    assert 0 < result["kl"] < 0.01


def test_the_commands_seed_draws_the_sample(tmp_path, cli):
    path = sharpened(make(tmp_path / "model"))
    (tmp_path / "a.txt").write_text(text(800))

    def loss(seed: int) -> float:
        asked = ("--data", tmp_path / "a.txt", "--tokens", 64, "--seq-len", SEQ_LEN, "--seed", seed, "--json")
        return cli("evaluate", path, *asked).json["loss"]

    assert loss(0) == loss(0) != loss(1)
