"""Progress and time: what a meter hears, how it is shown, and where the seconds of a command go."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console
from tiny import make_dense, make_moe
from words import add_tokenizer
from words import text as words_of

from moeconv.cli.progress import BarMeter, LineMeter, rates
from moeconv.plan.meter import CallbackMeter, Progress, SilentMeter
from moeconv.plan.phases import REST, phase, timing
from moeconv.steps import timed


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words_of(4000))
    return path


def test_phases_inside_phases_count_for_themselves_and_add_up():
    with timing() as clock:
        with phase("outer"):
            time.sleep(0.02)
            with phase("inner"):
                time.sleep(0.02)
        with timing() as other, phase("inner"):
            time.sleep(0.01)
        whole = clock.total()
    assert set(clock.seconds) == {REST, "outer", "inner"} and set(other.seconds) == {REST, "inner"}
    assert sum(clock.seconds.values()) == pytest.approx(whole)
    assert 0.02 <= clock.seconds["inner"] < clock.seconds["outer"] + clock.seconds["inner"] <= whole


def test_what_runs_outside_of_a_command_is_not_timed():
    with phase("alone"):
        pass
    assert "seconds" not in timed(object(), lambda: {"a": 1})


def test_rates_are_in_tokens_steps_or_bytes():
    ago = time.monotonic() - 10
    assert rates(Progress(done=5, total=10, tokens=4000, began=ago)) == ["200 tokens/s"]
    assert rates(Progress(unit="step", done=5, total=10, began=ago, figures={"training loss": 2.0})) == [
        "0.5 steps/s", "training loss 2.0000",
    ]  # fmt: skip
    assert rates(Progress(done=20_000_000, total=10, began=ago)) == ["2.0 MB/s"]
    assert Progress(done=5, total=10, began=ago).eta == pytest.approx(10, rel=0.1)
    assert Progress(total=10).eta is None


def test_a_line_meter_prints_layers_and_not_sequences(capsys):
    meter = LineMeter()
    for unit, parts in (("layer", 2), ("sequence", 50)):
        meter.start(total_bytes=parts, parts=parts, unit=unit, tokens=100)
        for _ in range(parts):
            meter.advance(1)
            meter.part_done()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["layer 1/2", "50%"], ["layer 2/2", "100%"]]
    assert all("tokens/s" in line for line in lines)


def test_a_bar_shows_position_and_rate(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=shown, force_terminal=True, width=100))
    meter = BarMeter()
    meter.note("reading the data")
    meter.start(total_bytes=4, parts=2, unit="layer", tokens=100)
    meter.advance(2)
    meter.part_done()
    meter.note("a line beside the bar")
    meter.close()
    assert "layer 1/2" in shown.getvalue() and "tokens/s" in shown.getvalue()
    assert "a line beside the bar" in shown.getvalue()


def test_the_layers_of_a_measurement_are_told_batch_by_batch(tmp_path, text):
    from moeconv.evaluate.run import evaluate

    heard: list[tuple[str, int, float]] = []
    meter = CallbackMeter(lambda p: heard.append((p.unit, p.part, p.share)))
    model = add_tokenizer(make_moe(tmp_path / "moe"))
    evaluate(model, data=[str(text)], seq_len=16, tokens=512, batch_size=4, meter=meter)
    layers = [share for unit, _, share in heard if unit == "layer"]
    assert len(layers) > 10 and layers == sorted(layers) and layers[-1] == 1
    assert heard[-1] == ("sequence", heard[-1][1], 1.0) and heard[-1][1] == 32


@pytest.mark.slow
def test_the_seconds_are_those_of_the_whole_command(cli, tmp_path, text):
    dense, moe = add_tokenizer(make_dense(tmp_path / "dense")), tmp_path / "moe"
    began = time.monotonic()
    made = cli("upcycle", dense, moe, "--experts", "4", "--json").json
    assert {"write", "check"} <= set(made["phases"]) and made["phases"]["check"] > 0
    assert sum(made["phases"].values()) == pytest.approx(made["seconds"], abs=0.05)
    pruned = cli("prune", moe, tmp_path / "p", "--keep", "2", "--refit", "--data", text, "--seq-len", "16", "--tokens",
                 "512", "--json", "-v")  # fmt: skip
    assert {"calibrate", "repair", "write", "read data"} <= set(pruned.json["phases"])
    assert pruned.json["seconds"] > pruned.json["phases"]["repair"] > pruned.json["phases"]["write"]
    assert "  repair: " in pruned.err
    assert made["seconds"] + pruned.json["seconds"] < time.monotonic() - began
    planned = cli("prune", moe, tmp_path / "q", "--keep", "2", "--dry-run", "--json").json
    assert planned["seconds"] == 0 and "phases" not in planned


def test_training_tells_its_loss_and_the_time_left(cli, tmp_path, text):
    moe = add_tokenizer(make_moe(tmp_path / "moe"))
    words = ["--data", text, "--seq-len", "16", "--tokens", "2048", "--steps", "4"]
    tuned = cli("tune", moe, tmp_path / "t", "--objective", "lm", *words, "--json")
    (line,) = [line for line in tuned.err.splitlines() if line.startswith("step 4/4")]
    assert "training loss " in line and "eta " in line and "held-out loss " in line
    assert {"train", "write"} <= set(tuned.json["phases"]) and tuned.json["seconds"] > tuned.json["tune"]["seconds"]


def test_a_silent_meter_takes_every_call():
    meter = SilentMeter()
    meter.start(total_bytes=1, parts=1)
    meter.figure("loss", 1.0)
    meter.part_done()
