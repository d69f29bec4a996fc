"""A default that a help text states in words is the one that the code takes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import make_dense, make_moe
from words import add_tokenizer

from moeconv import options
from moeconv.families.model import open_model
from moeconv.options import DataOptions, MeasureOptions, PruneOptions, flag_of

FIELDS = {
    (name.removesuffix("Options").lower(), f.name): f
    for name, group in vars(options).items()
    if name.endswith("Options") and dataclasses.is_dataclass(group)
    for f in dataclasses.fields(group)
}
STATED = {key: m[1] for key, f in FIELDS.items() if (m := re.search(r"default: (.*?)\)", f.metadata["help"]))}


def stated(group: str, name: str) -> list[int]:
    """The numbers in what a help text says of a default."""
    return [int(n) for n in re.findall(r"\d+", STATED[group, name])]


class Asked(Exception):
    """What a command was about to draw from its data."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model and a Mixture-of-Experts that take sequences longer than every default."""
    room = tmp_path_factory.mktemp("models")
    moe = make_moe(room / "moe", "olmoe", experts=8, hidden=64, max_position_embeddings=4096)
    return make_dense(room / "dense", hidden=64, max_position_embeddings=4096), add_tokenizer(moe)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], dict[str, Any]]]:
    def stop(*_: Any, tokens: int | None, seq_len: int, **__: Any) -> None:
        raise Asked({"tokens": tokens, "seq_len": seq_len})

    for module in ("calibrate.run", "evaluate.run", "tune.run", "quantize.gptq.run", "upcycle.router", "data.windows"):
        monkeypatch.setattr(import_module(f"moeconv.{module}"), "load_tokens", stop)

    def ask(run: Callable[[], Any]) -> dict[str, Any]:
        with pytest.raises(Asked) as caught:
            run()
        return dict(caught.value.args[0])

    yield ask


def test_what_is_drawn_of_the_data(models, asked, tmp_path):
    from moeconv.calibrate.run import calibrate
    from moeconv.evaluate.run import evaluate
    from moeconv.prune.windows import read_windows
    from moeconv.quantize.gptq.run import choose_codes
    from moeconv.recipe.read import asked as asks
    from moeconv.tune.run import tune
    from moeconv.upcycle.router import measure_router

    dense, moe = models
    (drawn,), (length, evaluated) = stated("measure", "tokens"), stated("measure", "seq_len")
    usual = {"tokens": drawn, "seq_len": length}
    model = open_model(moe)
    assert asked(lambda: calibrate(moe, tmp_path / "s", data=["x"])) == usual
    assert asked(lambda: calibrate(dense, tmp_path / "s", data=["x"])) == usual
    assert asked(lambda: read_windows(model, asks("prune", {"data": ("x",)}, "", ""))) == usual
    assert (
        asked(
            lambda: choose_codes(
                model, [], tmp_path / "c", data=DataOptions(("x",)), measure=MeasureOptions(), damping=0.01, seed=0
            )
        )
        == usual
    )
    assert asked(lambda: measure_router(open_model(dense), tmp_path / "r", kind="hidden", names={}, experts=4, seed=0,
                                        data=("a", "b", "c", "d"))) == usual  # fmt: skip
    assert asked(lambda: evaluate(moe, data=["x"])) == {"tokens": None, "seq_len": evaluated}
    assert asked(lambda: tune(moe, tmp_path / "t", data=("x",), teacher=str(moe))) == usual
    said = STATED["measure", "tokens"]
    assert "evaluate: all" in said and "tune by distill or lm: as many as its steps take" in said
    few = asked(lambda: tune(moe, tmp_path / "t", data=("x",), objective="lm", steps=2, batch_size=2))
    many = asked(lambda: tune(moe, tmp_path / "t", data=("x",), objective="lm", steps=20, batch_size=2))
    assert 4 * length <= few["tokens"] < many["tokens"] < drawn and many["seq_len"] == length


def test_a_short_model_shortens_it(tmp_path, asked):
    from moeconv.evaluate.run import evaluate

    assert "at most the model's" in STATED["measure", "seq_len"]
    assert asked(lambda: evaluate(make_moe(tmp_path / "m"), data=["x"]))["seq_len"] == 128


def test_how_many_experts_an_upcycle_makes(models, cli, tmp_path):
    dense, moe = models
    (experts,), (top_k,) = stated("upcycle", "experts"), stated("upcycle", "top_k")
    assert "one per sibling; of an MoE source twice its own" in STATED["upcycle", "experts"]
    assert "all pieces of one copy of the FFN; of an MoE source its own, times the copies" in STATED["upcycle", "top_k"]
    once, twice = re.fullmatch(r"(\d); granular and shuffle: (\d)", STATED["upcycle", "granularity"]).groups()
    for source, words, found in (
        (dense, [], (experts, top_k, int(once))),
        (dense, ["--method", "noise"], (experts, top_k, int(once))),
        (dense, ["--method", "split"], (experts, top_k, None)),
        (dense, ["--granularity", 4, "--to", "qwen2_moe"], (experts, 4, 4)),
        (dense, ["--method", "granular", "--to", "qwen2_moe"], (experts, top_k, int(twice))),
        (dense, ["--method", "shuffle", "--to", "qwen2_moe"], (experts, top_k, int(twice))),
        (dense, ["--experts-from", dense, "--experts-from", dense, "--experts-from", dense], (3, top_k, int(once))),
        (moe, [], (16, 4, None)),
    ):
        done = cli("upcycle", source, tmp_path / "out", *words, "--dry-run", "--json")
        assert done.code == 0, done.out
        block = done.json["upcycle"]
        assert (block["num_experts"], block["top_k"]) == found[:2], words
        assert found[2] is None or block["granularity"] == found[2], words
    assert "most runtimes serve" in STATED["upcycle", "to"] and STATED["upcycle", "shared_experts"] == "none"


def test_how_much_copies_compete(tmp_path):
    from moeconv.upcycle.planner import plan_upcycle

    half, one = re.fullmatch(r"([\d.]+); (\d) for top-1", STATED["upcycle", "copy_scale"]).groups()
    for top_k, scale in ((2, float(half)), (1, float(one))):
        model = open_model(make_moe(tmp_path / str(top_k), top_k=top_k))
        assert plan_upcycle(model, keep_top_k=True).block["copy_scale"] == scale


def test_what_a_prune_and_a_quantize_decide_alone(models, cli, tmp_path):
    from moeconv.prune.choice import resolve_criterion
    from moeconv.quantize.formats import FORMATS, choose_scheme

    model = open_model(models[1])
    with_data, without = re.fullmatch(r"(\w+) with data, (\w+) without", STATED["prune", "criterion"]).groups()
    assert resolve_criterion(None, has_data=True, model=model) == with_data
    assert resolve_criterion(None, has_data=False, model=model) == without
    assert STATED["quantize", "scheme"] == "the format's first 4-bit scheme"
    for format in FORMATS.values():
        four = [s for s in format.schemes if s.bits == 4]
        assert choose_scheme(format, scheme=None, bits=None) == [*four, *format.schemes][0]
    assert STATED["plan", "dtype"] == "the source's"
    done = cli("prune", models[1], tmp_path / "out", "--keep", 4, "--json")
    assert done.code == 0 and open_model(tmp_path / "out").dtype == model.dtype


def test_how_a_tune_is_run(models):
    from moeconv.options import TuneOptions
    from moeconv.tune.job import make_job
    from moeconv.tune.optimise import Schedule

    (looks,) = stated("tune", "look_every")
    assert len(Schedule(100, {}, "cosine", 0.1).evaluations()) == looks
    assert "unless experts train too" in STATED["tune", "straight_through"]
    for train in ("router", "router,experts"):
        job = make_job(models[1], TuneOptions(objective="lm", train=train), seed=0, batch_size=2)
        assert job.straight_through == (train == "router")


def test_how_many_tokens_are_compared(models, monkeypatch, tmp_path):
    from moeconv.calibrate import run

    words = r"default: (\d+), with many experts fewer, at least (\d+).*default: (\d+)"
    most, least, neurons = map(int, re.search(words, FIELDS["calibrate", "sample_tokens"].metadata["help"]).groups())
    seen: list[int] = []

    def note(*_: Any, sample_tokens: int, **__: Any) -> None:
        seen.append(sample_tokens)
        raise Asked

    monkeypatch.setattr(run, "measure_neurons", note)
    monkeypatch.setattr(run, "run_key", note)
    monkeypatch.setattr(run, "LayerStream", lambda *_, **__: None)
    monkeypatch.setattr(run, "start_meter", lambda *_, **__: None)
    for path, tokens in ((models[1], 10**6), (models[1], 32), (models[0], 32)):
        read = SimpleNamespace(windows=np.zeros((8, 4)), tokens=tokens)
        monkeypatch.setattr(run, "load_tokens", lambda *_, read=read, **__: read)
        with pytest.raises(Asked):
            run.calibrate(path, tmp_path / "s", data=["x"])
    assert seen == [most, least, neurons]


def test_how_many_workers(monkeypatch):
    from moeconv.plan.execute import default_jobs

    for processors in (1, 3, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=processors: set(range(n)))
        assert default_jobs() == processors


def test_which_prompts_a_report_takes():
    from moeconv.evaluate.samples import read_prompts

    assert STATED["report", "prompts"] == "four short ones" and len(read_prompts(None)) == 4


def test_no_stated_default_is_left_out():
    """A new one needs a test above, or stands here because it says "off" or "no limit", as None does."""
    covered = {
        ("measure", "tokens"), ("measure", "seq_len"), ("upcycle", "experts"), ("upcycle", "top_k"), ("upcycle", "to"),
        ("upcycle", "granularity"), ("upcycle", "shared_experts"), ("upcycle", "copy_scale"), ("prune", "criterion"),
        ("quantize", "scheme"),
        ("plan", "dtype"), ("tune", "look_every"), ("tune", "straight_through"), ("calibrate", "sample_tokens"),
        ("write", "jobs"), ("report", "prompts"),
    }  # fmt: skip
    elsewhere = {  # stated in words that other tests measure
        ("prune", "rescale"), ("tune", "learning_rate"), ("report", "title"), ("measure", "text_field"),
        ("measure", "max_memory"), ("measure", "max_device_memory"),
        ("quantize", "scope"), ("quantize", "among"), ("prune", "multiple"), ("run", "out"),
        ("collapse", "width"), ("collapse", "to"), ("collapse", "neurons"),
    }  # fmt: skip
    nothing = {key for key, said in STATED.items() if said in ("no limit", "off", "all steps")}
    assert STATED.keys() == covered | elsewhere | nothing
    assert PruneOptions().rescale is None and flag_of("rescale") == "--rescale"
    for key in nothing:
        assert FIELDS[key].default in (None, 0.0), key
