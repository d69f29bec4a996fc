"""Two processes measure what one measures; one that fails ends both with its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from distributed.launch import launch, torchrun
from words import add_tokenizer, text

from moeconv.calibrate.artifact import FIELDS, load_statistics
from moeconv.calibrate.run import calibrate

SETTINGS = ("--seq-len", 16, "--batch-size", 3, "--sample-tokens", 100)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Dense in the first layer; decided routers."""
    path = tiny.make_moe(
        tmp_path / "model", "qwen3_moe", experts=6, dtype="F32", layers=3, norm_topk_prob=True, mlp_only_layers=[0]
    )
    tensors = tiny.read_tensors(path)
    for name, (dtype, shape, data) in tensors.items():
        if shape == (6, 32):
            tensors[name] = (dtype, shape, tiny.encode(tiny.decode(data, dtype, shape) * 8, dtype))
    tiny.write_shards(path, tensors)
    (tmp_path / "a.txt").write_text(text(420, seed=1))
    (tmp_path / "b.txt").write_text(" ".join(reversed(text(200, seed=2).split())))
    return add_tokenizer(path)


@pytest.mark.slow
def test_two_processes_give_the_statistics_of_one(model, tmp_path):
    data = [str(tmp_path / "a.txt"), f"{tmp_path / 'b.txt'}=2"]
    calibrate(model, tmp_path / "one", data=data, seq_len=16, batch_size=3, sample_tokens=100)
    done = torchrun("calibrate", model, tmp_path / "two", "--data", data[0], "--data", data[1], *SETTINGS, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["tokens"] == 38 * 16  # once: the first process alone speaks
    one, two = load_statistics(tmp_path / "one"), load_statistics(tmp_path / "two")
    assert one.metadata == two.metadata and one.layers == (1, 2)
    assert [s["weight"] for s in one.metadata["sources"]] == [1.0, 2.0]
    for layer in one.layers:
        for name in FIELDS:
            a, b = one.layer(layer, name), two.layer(layer, name)
            np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(a).max()), err_msg=name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt", "model", "one", "two"]


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_its_code(model, tmp_path):
    """NaN is noticed by all; data that is missing by the first process alone, while the other waits for it."""
    arguments = ("-m", "moeconv", "calibrate", model, tmp_path / "out", "--json", *SETTINGS, "--data")
    done = launch(*arguments, tmp_path / "nowhere.txt")
    assert [d.code for d in done] == [3, 3], done
    assert done[0].json["error"]["code"] == 3 and "does not exist" in done[0].json["error"]["message"]
    assert (done[1].out, done[1].err) == ("", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_other_commands_refuse_a_launcher(model, tmp_path):
    done = launch("-m", "moeconv", "inspect", model)
    assert [d.code for d in done] == [2, 2] and "one process" in done[0].err and not done[1].err


# the second process dies in the last layer, while the first waits for its sums
DIES = """
import os, signal, sys
from moeconv.calibrate import run
keep = run.layer_statistics
def die(layer, **given):
    if layer.index == 2 and os.environ["RANK"] == "1":
        {how}
    return keep(layer, **given)
run.layer_statistics = die
from moeconv.cli.app import run as main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_error_or_death_of_the_second_process_ends_the_first(model, tmp_path):
    arguments = ("calibrate", model, tmp_path / "out", *SETTINGS, "--data", tmp_path / "a.txt")
    error = "from moeconv.errors import OutputError; raise OutputError('no room', hint='Buy some.')"
    done = launch("-c", DIES.format(how=error), *arguments)
    assert [d.code for d in done] == [4, 4] and done[0].err.splitlines()[-2:] == ["moeconv: no room", "  Buy some."]
    assert not done[1].err
    done = launch("-c", DIES.format(how="os.kill(os.getpid(), signal.SIGKILL)"), *arguments)
    assert [d.code for d in done] == [1, -9] and "another process of this command has died" in done[0].err
    assert "Traceback" not in done[0].err and not (tmp_path / "out").exists()
