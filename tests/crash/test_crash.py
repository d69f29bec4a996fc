"""Whatever ends a run, OUT is absent or complete, and the same command brings the same bytes in the end.

MOECONV_CRASH_RUNS=N makes N random kills, at every disk operation in every way that there is, instead of the few of
the default suite.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from crash.faults import MODES, Faults
from crash.forkserver import ForkServer
from tiny import hashes, make_dense, make_moe, read_tensors
from words import add_tokenizer, text

from moeconv.checkpoint.output import OutputDirectory
from moeconv.errors import MoeconvError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.plan.plan import pack_shards
from moeconv.upcycle.planner import plan_upcycle
from moeconv.verify.run import verify

RUNS = int(os.environ.get("MOECONV_CRASH_RUNS", "0"))
EVERY = 1 if RUNS else 4
SIZE = "24KB"
UPCYCLE = ("--no-check", "-q", "--experts", 3, "--shard-size", SIZE)
PRUNE = ("--keep", 2, "-q", "--shard-size", SIZE)


@dataclass(frozen=True)
class Work:
    """A command on a tiny checkpoint, and the bytes that it must come to."""

    verb: str
    source: Path
    flags: tuple[object, ...]
    expected: dict[str, str]
    seconds: float  # that a run takes

    def words(self, out: Path, *more: object) -> tuple[object, ...]:
        return (self.verb, self.source, out, *self.flags, *more)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as running:
        yield running


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a place: thousands of fsyncs wait for nothing, and Faults plays the disk."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="moeconv-test-", dir=place) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def works(tmp_path_factory, server) -> dict[str, Work]:
    folder = tmp_path_factory.mktemp("works")
    dense = make_dense(folder / "dense", shards=3)
    (dense / "tokenizer.json").write_text("{}")
    moe = make_moe(folder / "moe", shards=3)
    made = {}
    for verb, source, flags in (("upcycle", dense, UPCYCLE), ("prune", moe, PRUNE)):
        seconds = []
        for i in range(3):
            began = time.monotonic()
            assert server.run(verb, source, folder / f"{verb}{i}", *flags, log=folder / "log") == 0
            seconds.append(time.monotonic() - began)
        expected = hashes(folder / f"{verb}0")
        assert expected == hashes(folder / f"{verb}2") and sum(n.endswith(".safetensors") for n in expected) >= 4
        made[verb] = Work(verb, source, flags, expected, min(seconds))
    return made


def complete(out: Path) -> bool:
    """Whether OUT is there; fails when it is there and not whole."""
    if not out.exists():
        return False
    try:
        report = verify(str(out))
    except MoeconvError as error:
        pytest.fail(f"OUT is damaged: {error.message}")
    assert report["ok"] and report["manifest"], report["problems"]
    return True


def staging(out: Path) -> Path:
    return out.parent / f".{out.name}.moeconv"


def finishes(server: ForkServer, work: Work, out: Path, *more: object) -> None:
    """The same command once more ends well, unless it had ended already; then only the expected bytes are there."""
    log = out.parent / "log"
    if complete(out):
        assert hashes(out) == work.expected
        assert server.run(*work.words(out, *more), log=log) == 4
    else:
        assert server.run(*work.words(out, *more), log=log) == 0, log.read_text()
        assert not staging(out).exists()
    assert hashes(out) == work.expected and complete(out)


# -- killed at a random moment -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["upcycle", "prune"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_at_random_moments(server, works, tmp_path, verb, jobs):
    rng = random.Random(f"{verb}{jobs}")
    work, seconds = works[verb], works[verb].seconds
    killed = 0
    for run in range(RUNS // 4 or 7):
        out = tmp_path / str(run) / "out"
        out.parent.mkdir()
        for _ in range(rng.choice([1, 1, 3])):  # some are killed over and over
            pid = server.start(*work.words(out, "--jobs", jobs), log=out.parent / "log")
            server.signal(pid, signal.SIGKILL, after=rng.uniform(0.0, seconds))
            killed += server.wait(pid) == -signal.SIGKILL
            complete(out)
        began = time.monotonic()
        finishes(server, work, out, "--jobs", rng.choice([1, 2]))
        seconds = min(seconds, time.monotonic() - began)  # a machine that is busy by turns
    assert killed, "every run was over before it was killed"


@pytest.mark.slow
def test_killed_while_neurons_are_chosen(tmp_path):
    """A run that is killed keeps the statistics that were complete; the same command gives the same bytes."""
    source = add_tokenizer(make_moe(tmp_path / "moe", "qwen3_moe", hidden=64, intermediate=64, layers=3, shards=2))
    (tmp_path / "a.txt").write_text(text(800))
    flags = ("--keep", 3, "--width", 16, "--refit", "--data", tmp_path / "a.txt", "--seq-len", 16, "--no-check")
    flags = (*flags, "--jobs", 1, "--json", "--shard-size", SIZE)
    rng, killed, kept = random.Random("width"), 0, 0
    with ForkServer(measures=True) as server:
        assert server.run("prune", source, tmp_path / "whole", *flags, log=tmp_path / "log") == 0
        work = Work("prune", source, flags, hashes(tmp_path / "whole"), 0.0)
        said = (tmp_path / "log").read_text().count("\n")  # of layers, shards and steps
        for run, lines in enumerate(sorted(rng.sample(range(1, said), RUNS or 3))):
            out = tmp_path / str(run) / "out"
            log = out.parent / "log"
            out.parent.mkdir()
            log.touch()
            pid, began = server.start(*work.words(out), log=log), time.monotonic()
            while log.read_text().count("\n") < lines and not out.exists() and time.monotonic() < began + 60:
                time.sleep(0.005)
            server.signal(pid, signal.SIGKILL, after=rng.uniform(0.0, 0.05))
            killed += server.wait(pid) == -signal.SIGKILL
            whole, statistics = out.exists(), list(staging(out).glob("measured-*/statistics/figures.json"))
            decided = list(staging(out).glob("measured-*/decision/figures.json"))
            assert server.run(*work.words(out), log=log) == (4 if whole else 0)
            assert hashes(out) == work.expected and complete(out)
            if not whole:
                phases = json.loads(log.read_text().splitlines()[-1])["phases"]
                assert ("calibrate" in phases) == (not statistics), "what was complete is not measured again"
                assert ("repair" in phases) == (not decided)
                kept += len(statistics)
    assert killed and kept, "every run was over before it was killed, or killed before it had measured something"


# -- killed at a chosen operation ----------------------------------------------------------------------------------


def crash_at_operations(
    server: ForkServer, tmp_path: Path, make: Callable[[Path], tuple[object, ...]], target: str = "cli", *,
    every: int = 1, modes: tuple[str, ...] = MODES[:3],
) -> Iterator[tuple[Path, str]]:  # fmt: skip
    """Run `make(out)` once for every disk operation that it does, each time crashing there. Yields (OUT, where)."""
    (tmp_path / "count").mkdir()
    out = tmp_path / "count" / "out"
    assert server.run(*make(out), log=out.parent / "log", target=target) == 0, (out.parent / "log").read_text()
    total = int((out.parent / "log.operations").read_text())
    assert total > 20 or target != "cli"
    for at in range(0, total, every):
        for mode in modes if RUNS else (modes[at // every % len(modes)],):
            out = tmp_path / f"{at}-{mode}" / "out"
            out.parent.mkdir()
            code = server.run(*make(out), log=out.parent / "log", target=target, at=at, mode=mode)
            assert code == -signal.SIGKILL, (out.parent / "log").read_text()
            yield out, f"operation {at} of {total}, {mode}"


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "every"), [("upcycle", EVERY // 2 or 1), ("prune", EVERY)])
def test_crashed_at_any_disk_operation(server, works, tmp_path, verb, every):
    work = works[verb]
    seen = set()
    for out, _ in crash_at_operations(server, tmp_path, lambda out: work.words(out, "--jobs", 1), every=every):
        seen.add(out.exists())
        finishes(server, work, out)
        shutil.rmtree(out.parent)
    assert seen == {False, True}, "some crashes came before the commit, some after it"


def violations(server: ForkServer, source: Path, tmp_path: Path, target: str) -> list[str]:
    """What the test above would say of another writer."""
    found = []
    for out, where in crash_at_operations(server, tmp_path, lambda out: (source, out), target):
        try:
            if complete(out) and hashes(out) != hashes(source):
                found.append(f"{where}: other bytes")
        except (AssertionError, pytest.fail.Exception) as error:
            found.append(f"{where}: {error}")
    return found


@pytest.mark.parametrize(("target", "modes"), [("naive", {"kill", "torn", "power"}), ("hasty", {"power"})])
def test_the_test_catches_a_writer_that_takes_no_care(server, works, tmp_path, target, modes):
    """A copy file by file into OUT, and one that is staged and renamed but never synchronised."""
    source = tmp_path / "source"
    plan_source = open_model(works["upcycle"].source)
    execute(plan_upcycle(plan_source, experts=2), source=plan_source.checkpoint, out=source)
    (tmp_path / "runs").mkdir()
    found = violations(server, source, tmp_path / "runs", target)
    assert {f.split(", ")[1].partition(":")[0] for f in found} == modes, found


@pytest.mark.slow
def test_overwrite_keeps_the_old_directory_until_the_new_one_is_complete(server, works, tmp_path):
    work = works["upcycle"]
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")

    def old(out: Path) -> tuple[object, ...]:
        """OUT as it was: a model of another plan, with links in it."""
        shutil.copytree(tmp_path / "old", out, symlinks=True)
        for name in ("config.json", *sorted(n for n in os.listdir(out) if n.endswith(".safetensors"))[:2]):
            (out / name).unlink()
            (out / name).symlink_to(precious)
        os.link(precious, out / "README.md")
        return work.words(out, "--overwrite", "--jobs", 1)

    model = open_model(work.source)
    execute(plan_upcycle(model, experts=2, shard_size=SIZE), source=model.checkpoint, out=tmp_path / "old")
    (tmp_path / "before").mkdir()
    old(tmp_path / "before" / "out")
    before = hashes(tmp_path / "before" / "out")
    seen = set()
    for out, where in crash_at_operations(server, tmp_path, old, every=EVERY):
        now = hashes(out)
        assert now in (before, work.expected), where
        seen.add(now == before)
        assert server.run(*work.words(out, "--overwrite"), log=out.parent / "log") == 0, (
            out.parent / "log"
        ).read_text()
        assert hashes(out) == work.expected and precious.read_bytes() == b"precious" and not staging(out).exists()
        assert not [n for n in os.listdir(out) if (out / n).is_symlink()]
        shutil.rmtree(out.parent)
    assert seen == {True, False}


# -- a full disk ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "jobs", "every"), [("upcycle", 1, EVERY // 2 or 1), ("prune", 2, EVERY)])
def test_a_disk_that_is_full_at_any_operation(cli, works, tmp_path, verb, jobs, every):
    work = works[verb]
    with Faults() as counted:
        assert cli(*work.words(tmp_path / "count", "--jobs", jobs)).code == 0
    last = counted.count - counted.names[::-1].index("fsync")  # what follows is cleaning up, which may fail silently
    # the rename after which what was measured is whole: before it nothing is worth keeping
    first = counted.names.index("rename") if "rename" in counted.names else 0
    for at in range(0, last, every):
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        with Faults(at=at, mode="full") as faults:
            outcome = cli(*work.words(out, "--jobs", jobs))
        where = f"operation {at}, {faults.names[at]}"
        if outcome.code == 0:  # only what need not succeed
            assert faults.names[at] == "unlink", where
        else:
            assert outcome.code == 4 and "No space left" in outcome.err and "Traceback" not in outcome.err, (
                where,
                outcome,
            )
            assert "again" in outcome.err and (out.exists() or staging(out).exists() or at <= first), where
        if not complete(out):
            assert cli(*work.words(out, "--jobs", jobs)).code == 0, where
            assert not staging(out).exists()
        assert hashes(out) == work.expected, where
        shutil.rmtree(out.parent)


# -- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("json_too", [False, True])
def test_signals_end_a_run_in_good_order(tmp_path, number, code, json_too):
    source = make_dense(tmp_path / "source", layers=3)
    out = tmp_path / "out"
    words = [
        sys.executable,
        "-m",
        "moeconv",
        "upcycle",
        source,
        out,
        "--no-check",
        "--shard-size",
        "1",
        *["--json"] * json_too,
    ]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(kept := list(staging(out).glob("*/done/*.json"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    said, err = process.communicate()
    assert process.returncode == code, err
    message = json.loads(said)["error"] if json_too else {"message": err, "hint": err, "code": code}
    name = signal.Signals(number).name
    assert f"stopped by {name}" in message["message"] and message["code"] == code and "Traceback" not in err
    count, total = map(
        int, re.search(r"(\d+) of (\d+) shards are kept. Run the same command again", message["hint"]).groups()
    )
    assert 3 <= count < total and not out.exists()
    kept = {p.name.removesuffix(".json") for p in staging(out).glob("*/done/*.json")}
    assert len(kept) == count
    times = {p.name: p.stat().st_mtime_ns for p in staging(out).glob("*/out/*") if p.name in kept}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and complete(out)
    assert {n: (out / n).stat().st_mtime_ns for n in kept} == times, "finished shards are not written again"
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.slow
def test_signals_at_random_moments(server, works, tmp_path):
    rng = random.Random(5)
    work = works["upcycle"]
    for run in range(RUNS or 12):
        out = tmp_path / str(run) / "out"
        out.parent.mkdir()
        number = rng.choice([signal.SIGINT, signal.SIGTERM])
        (out.parent / "log").touch()  # a signal may come before the process opens it
        pid = server.start(*work.words(out, "--jobs", 2), log=out.parent / "log")
        server.signal(pid, number, after=rng.uniform(0.01, work.seconds))
        code, said = server.wait(pid), (out.parent / "log").read_text()
        assert "Traceback" not in said and "bug of moeconv" not in said, said
        if complete(out):
            assert code in (0, 128 + number)
        else:
            # the very first moments belong to Python, before moeconv has taken over the signal
            early = code in (-number, 1) and not staging(out).exists()
            assert code == 128 + number or early, (code, said)
        finishes(server, work, out)


def test_a_signal_before_moeconv_has_taken_over(monkeypatch):
    from moeconv.__main__ import main

    monkeypatch.setattr("moeconv.cli.app.run", lambda _words: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


# -- what is used again and what is not ----------------------------------------------------------------------------


@pytest.fixture
def interrupted(cli, monkeypatch):
    """A run whose shards are all finished and journalled, but that could not write the small files after them."""

    def run(*words: object) -> None:
        def full(path, data):
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr("moeconv.plan.execute.write_file", full)
            assert cli(*words).code == 1

    return run


@pytest.fixture
def large(tmp_path) -> Path:
    """A dense checkpoint of 1.3 MB in one file, most bytes of which no fingerprint samples."""
    return make_dense(tmp_path / "source", hidden=128, intermediate=512, vocab=512)


def shard_times(folder: Path) -> dict[str, int]:
    """When each shard was written: a shard that is used again keeps its time."""
    return {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob("*.safetensors"))}


def model_of(out: Path) -> dict[str, str]:
    """The hashes of OUT's files, less the card: the command line writes one for people, the library does not."""
    return {name: digest for name, digest in hashes(out).items() if name != "README.md"}


def fresh(source: Path, out: Path, **parameters) -> dict[str, str]:
    """What the library makes of the same parameters at once."""
    model = open_model(source)
    execute(plan_upcycle(model, **parameters), source=model.checkpoint, out=out)
    return hashes(out)


def test_a_source_byte_that_changed_unseen_is_noticed(cli, interrupted, large, tmp_path):
    """Same size, same mtime, outside of every sampled block: only reading the ranges again can tell."""
    shard = large / "model.safetensors"
    words = ("upcycle", large, tmp_path / "out", "--no-check", "--experts", 2, "--shard-size", "200KB")
    before = open_model(large)
    ref = before.checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    interrupted(*words)
    times = shard_times(next(staging(tmp_path / "out").glob("*/out")))
    samples = [(os.path.getsize(shard) - 4096) * i // 15 for i in range(16)]
    at = next(p for p in range(ref.start, ref.start + ref.nbytes) if all(not s <= p < s + 4096 for s in samples))
    status = shard.stat()
    with open(shard, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = open_model(large)
    assert after.identity == before.identity and after.checkpoint.resume_state() == before.checkpoint.resume_state()
    assert cli(*words).code == 0
    expected = fresh(large, tmp_path / "fresh", experts=2, shard_size="200KB")
    assert model_of(tmp_path / "out") == expected
    touched = {s for s, at in shard_times(tmp_path / "out").items() if at != times[s]}
    holding = {
        r.shard for n, r in open_model(tmp_path / "out").checkpoint.tensors.items() if "layers.1" in n and "w3" in n
    }
    assert touched == holding, "shards that the byte is behind are written again, the others are kept"


def test_a_staged_byte_that_changed_is_noticed(cli, interrupted, large, tmp_path):
    out = tmp_path / "out"
    words = ("upcycle", large, out, "--no-check", "--experts", 2, "--shard-size", "200KB")
    interrupted(*words)
    staged = next(staging(out).glob("*/out"))
    times = shard_times(staged)
    victims = sorted(times)[1::2]
    for name in victims:
        data = bytearray((staged / name).read_bytes())
        data[-1] ^= 1
        (staged / name).write_bytes(data)
    assert cli(*words).code == 0
    assert model_of(out) == fresh(large, tmp_path / "fresh", experts=2, shard_size="200KB")
    assert {s for s, at in shard_times(out).items() if at != times[s]} == set(victims)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"experts": 3}, {"method": "drop"}, {"dtype": "float32"}, {"top_k": 1}, {"router_std": 0.5}]
)
def test_another_parameter_starts_anew(cli, interrupted, tmp_path, change):
    source, out = make_dense(tmp_path / "source"), tmp_path / "out"
    words = ("upcycle", source, out, "--no-check", "--shard-size", "12KB")
    interrupted(*words, "--experts", 2)
    asked = {"experts": 2} | change
    flags = [w for k, v in asked.items() for w in ("--" + k.replace("_", "-"), v)]
    times = set(shard_times(next(staging(out).glob("*/out"))).values())
    assert cli(*words, *flags).code == 0
    assert model_of(out) == fresh(source, tmp_path / "fresh", shard_size="12KB", **asked)
    assert not times & set(shard_times(out).values())


def test_another_time_or_config_of_the_source_starts_anew(cli, interrupted, tmp_path):
    source, out = make_dense(tmp_path / "source"), tmp_path / "out"
    words = ("upcycle", source, out, "--no-check", "--experts", 2, "--shard-size", "12KB")
    for change in (lambda: os.utime(source / "model.safetensors"), lambda: os.utime(source / "config.json")):
        interrupted(*words)
        keys = set(os.listdir(staging(out)))
        change()
        interrupted(*words)
        assert len(set(os.listdir(staging(out))) - keys) == 1
    assert cli(*words).code == 0
    assert not staging(out).exists(), "work that was given up goes with the commit"


def test_another_version_of_moeconv_starts_anew(cli, interrupted, tmp_path, monkeypatch):
    source, out = make_dense(tmp_path / "source"), tmp_path / "out"
    words = ("upcycle", source, out, "--no-check", "--experts", 2, "--shard-size", "12KB")
    interrupted(*words)
    times = set(shard_times(next(staging(out).glob("*/out"))).values())
    for module in ("execute", "manifest"):
        monkeypatch.setattr(f"moeconv.plan.{module}.__version__", "9.9.9")
    assert cli(*words).code == 0
    assert times and not times & set(shard_times(out).values())
    assert json.loads((out / "moeconv_manifest.json").read_text())["steps"][-1]["moeconv"] == "9.9.9"


def test_another_origin_beside_the_source_starts_anew(tmp_path, monkeypatch):
    """What a plan reads beside its source (a sibling model, an overlay) is part of what names the work."""
    model, sibling = open_model(make_dense(tmp_path / "a")), make_dense(tmp_path / "b", seed=1)
    plan = plan_upcycle(model, experts=2, shard_size=SIZE)
    name = "model.layers.0.mlp.up_proj.weight"
    items = [
        dataclasses.replace(i, inputs=tuple(n._replace(origin="source:1") for n in i.inputs))
        if any(n.tensor == name for n in i.inputs) else i
        for s in plan.shards for i in s.items
    ]  # fmt: skip
    plan = dataclasses.replace(plan, shards=pack_shards(items, shard_size=24_000), promise={})

    def run(folder: Path) -> None:
        origins = {"source:1": open_model(sibling).checkpoint}
        execute(plan, source=model.checkpoint, out=folder, origins=origins, jobs=1)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("moeconv.plan.execute.write_file", lambda *_: (_ for _ in ()).throw(MemoryError))
        run(tmp_path / "out")
    times = set(shard_times(next(staging(tmp_path / "out").glob("*/out"))).values())
    make_dense(sibling, seed=2)
    run(tmp_path / "out")
    assert not times & set(shard_times(tmp_path / "out").values())
    written = read_tensors(tmp_path / "out")["model.layers.0.block_sparse_moe.experts.1.w3.weight"][2]
    assert written == read_tensors(sibling)[name][2] != read_tensors(tmp_path / "a")[name][2]


def test_companions_that_went_away_do_not_stay_behind(cli, interrupted, tmp_path, monkeypatch):
    source, out = make_dense(tmp_path / "source"), tmp_path / "out"
    (source / "LICENSE").write_text("free")
    words = ("upcycle", source, out, "--no-check", "--experts", 2)
    with monkeypatch.context() as patch:
        patch.setattr("moeconv.plan.execute.check_written", lambda *_: (_ for _ in ()).throw(MemoryError))
        assert cli(*words).code == 1
    assert list(staging(out).glob("*/out/LICENSE"))
    (source / "LICENSE").unlink()
    assert cli(*words).code == 0 and not (out / "LICENSE").exists() and complete(out)


# -- two at once ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_runs_on_one_out_one_wins(server, works, tmp_path):
    work = works["upcycle"]
    for run in range(4):
        out = tmp_path / str(run) / "out"
        out.parent.mkdir()
        pids = [server.start(*work.words(out, "--jobs", 1), log=out.parent / f"log{i}") for i in range(2)]
        assert sorted(map(server.wait, pids)) == [0, 4]
        said = "".join((out.parent / f"log{i}").read_text() for i in range(2))
        assert re.search("another moeconv run is writing|exists already|appeared while this run was writing", said), (
            said
        )
        assert hashes(out) == work.expected and complete(out)


def test_a_run_meets_one_that_is_at_work(cli, works, tmp_path):
    work, out = works["upcycle"], tmp_path / "out"
    for shared, words in ((False, ()), (False, ("--part", "0/2")), (True, ())):
        with OutputDirectory(out, key="another", shared=shared):
            outcome = cli(*work.words(out, *words))
        assert outcome.code == 4 and "another moeconv run is writing" in outcome.err and not out.exists()
    assert cli(*work.words(out)).code == 0 and hashes(out) == work.expected


# -- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1, 1, 0], [0, 1, 2], [2, 0, 1]])
@pytest.mark.parametrize("verb", ["upcycle", "prune"])
def test_parts_in_any_order_are_the_whole(cli, works, tmp_path, verb, order):
    work, out, n = works[verb], tmp_path / "out", max(order) + 1
    for i, part in enumerate(order):
        assert not out.exists()
        outcome = cli(*work.words(out, "--part", f"{part}/{n}", "--json"))
        assert outcome.code == 0, outcome
        last = i == len(order) - 1
        assert (outcome.json["part"], outcome.json["complete"]) == (f"{part}/{n}", last)
    assert hashes(out) == work.expected and complete(out) and os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 12])
def test_parts_at_the_same_time_are_the_whole(server, works, tmp_path, n):
    work, out = works["upcycle"], tmp_path / "out"
    pids = [
        server.start(*work.words(out, "--jobs", 1, "--part", f"{i}/{n}"), log=tmp_path / f"log{i}") for i in range(n)
    ]
    codes = [server.wait(pid) for pid in pids]
    said = "".join((tmp_path / f"log{i}").read_text() for i in range(n))
    # a part that starts when the last one has committed finds OUT
    assert set(codes) <= {0, 4} and 0 in codes and ("exists already" in said) == (4 in codes), said
    assert hashes(out) == work.expected and complete(out) and not staging(out).exists()


def test_a_part_that_comes_when_the_others_have_committed(cli, works, tmp_path, monkeypatch):
    """It looked at OUT before the commit, and locks the staging directory after it."""
    work, out = works["upcycle"], tmp_path / "out"
    shards = sum(name.endswith(".safetensors") for name in work.expected)
    for part in range(shards):
        assert cli(*work.words(out, "--part", f"{part}/{shards + 1}")).code == 0
    assert complete(out)
    monkeypatch.setattr("moeconv.plan.execute.check_target", lambda *_, **__: None)
    outcome = cli(*work.words(out, "--part", f"{shards}/{shards + 1}", "--json"))
    assert outcome.code == 0 and outcome.json["complete"] is True
    assert os.listdir(tmp_path) == ["out"] and hashes(out) == work.expected


def test_a_part_that_was_killed_is_run_again(server, works, tmp_path):
    work, out, log = works["prune"], tmp_path / "out", tmp_path / "log"
    for part in (1, 0):
        code = server.run(*work.words(out, "--part", f"{part}/2", "--jobs", 1), log=log, at=30 + part)
        assert code == -signal.SIGKILL and not out.exists()
    for part in (0, 1):
        assert not out.exists()
        assert server.run(*work.words(out, "--part", f"{part}/2"), log=log) == 0
    assert hashes(out) == work.expected


def test_parts_of_different_plans_do_not_mix(cli, works, tmp_path):
    work, out = works["upcycle"], tmp_path / "out"
    assert cli(*work.words(out, "--part", "0/2")).code == 0
    outcome = cli(*work.words(out, "--part", "1/2", "--seed", 5, "--json"))
    assert outcome.code == 0 and outcome.json["complete"] is False and not out.exists()
    assert cli(*work.words(out, "--part", "1/2", "--json")).json["complete"] is True
    assert hashes(out) == work.expected


def test_a_whole_run_takes_over_from_parts(cli, works, tmp_path):
    work, out = works["upcycle"], tmp_path / "out"
    assert cli(*work.words(out, "--part", "0/2")).code == 0
    times = shard_times(next(staging(out).glob("*/out")))
    assert cli(*work.words(out)).code == 0 and hashes(out) == work.expected
    assert times.items() <= shard_times(out).items()


def test_the_reference_is_what_the_library_writes(works, tmp_path):
    """One plan, one result: through the command line in another process, and through the library here."""
    expected = {name: digest for name, digest in works["upcycle"].expected.items() if name != "README.md"}
    assert fresh(works["upcycle"].source, tmp_path / "out", experts=3, shard_size=SIZE) == expected
