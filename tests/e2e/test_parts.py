"""--part i/n of the steps that measure before they plan: one OUT, the single run's bytes, measured once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from words import add_tokenizer, text

from moeconv.checkpoint.output import Finished, OutputDirectory
from moeconv.checkpoint.staging import Measured, StagingLock
from moeconv.errors import CheckError, Interrupted, OutputError

pytestmark = pytest.mark.usefixtures("one_thread")

RUN = ("--data", "{data}", "--seq-len", 16, "--batch-size", 4)
# command line -> what is measured on the way, in its order
STEPS: dict[str, tuple[tuple[object, ...], list[str]]] = {
    "prune --refit": (("prune", "{moe}", "{out}", "--keep", 3, "--refit", *RUN), ["statistics", "decision"]),
    "prune --width": (("prune", "{moe}", "{out}", "--width", 16, *RUN), ["decision"]),
    "prune --width by weights": (("prune", "{moe}", "{out}", "--width", 16), ["decision"]),
    "prune --mix": (
        ("prune", "{moe}", "{out}", "--ratio", 0.5, "--mix", "auto", "--refit", *RUN), ["statistics", "decision"],
    ),
    "prune --merge": (("prune", "{moe}", "{out}", "--keep", 3, "--merge", *RUN), ["statistics", "decision"]),
    "prune --distill": (("prune", "{moe}", "{out}", "--keep", 3, "--distill", 2, *RUN), ["statistics", "decision"]),
    "prune --data": (("prune", "{moe}", "{out}", "--keep", 3, *RUN), ["statistics"]),
    "prune by weights": (("prune", "{moe}", "{out}", "--keep", 3, "--criterion", "aimer"), ["weights.aimer"]),
    "tune": (("tune", "{moe}", "{out}", "--objective", "lm", "--steps", 3, *RUN), ["overlay"]),
    "quantize --method gptq": (("quantize", "{moe}", "{out}", "--method", "gptq", *RUN), ["codes"]),
    "quantize --method awq": (("quantize", "{moe}", "{out}", "--method", "awq", *RUN), ["codes"]),
    "quantize --method auto": (("quantize", "{moe}", "{out}", "--method", "auto", *RUN), ["codes"]),
    "upcycle --router": (
        ("upcycle", "{dense}", "{out}", "--experts", 3, "--router", "centroid", "--no-check", *RUN), ["router"],
    ),
    "upcycle --method split": (
        ("upcycle", "{dense}", "{out}", "--method", "split", "--experts", 4, "--no-check", *RUN),
        ["neurons", "partition"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "data.txt").write_text(text(400))
    shape = {"hidden": 64, "intermediate": 64, "shards": 2}
    return {
        "moe": add_tokenizer(tiny.make_moe(folder / "moe", "qwen3_moe", experts=4, **shape)),
        "dense": add_tokenizer(tiny.make_dense(folder / "dense", **shape)),
        "data": folder / "data.txt",
    }


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was measured, as often as it was."""
    names: list[str] = []
    once = Measured.once

    def counting(self: Measured, name: str, make: Callable[[Path], object], **keywords: bool):
        def noted(folder: Path) -> object:
            names.append(name)
            return make(folder)

        return once(self, name, noted, **keywords)

    monkeypatch.setattr(Measured, "once", counting)
    return names


def words(step: str, out: Path, places: dict[str, Path], *more: object) -> list[str]:
    filled = [str(word).format(out=out, **places) for word in STEPS[step][0]]
    return [*filled, "--shard-size", "20KB", "--json", *map(str, more)]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_parts_in_any_order_are_the_single_run(cli, tmp_path, places, made, monkeypatch, left_over, step):
    """Of three parts, the second one first; it is stopped in its first shard, and run again in the end."""
    assert cli(*words(step, tmp_path / "single", places)).code == 0
    assert made == STEPS[step][1]
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(OutputDirectory, "mark_finished", _stopped)
        assert cli(*words(step, tmp_path / "out", places, "--part", "1/3")).code == 130
    complete = []
    for part in ("2/3", "0/3", "1/3"):
        done = cli(*words(step, tmp_path / "out", places, "--part", part))
        assert done.code == 0, done.out
        complete.append(done.json["complete"])
    assert complete == [False, False, True] and made == STEPS[step][1]
    assert tiny.hashes(tmp_path / "out") == tiny.hashes(tmp_path / "single")
    assert left_over(tmp_path) == ["out"]


MARK = OutputDirectory.mark_finished


def _stopped(self: OutputDirectory, name: str, record: Finished) -> None:
    if self.out.name == "out":  # not what is written on the way
        raise Interrupted("stopped")
    MARK(self, name, record)


@pytest.mark.slow
def test_a_run_that_was_stopped_does_not_measure_again(cli, tmp_path, places, made, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(OutputDirectory, "mark_finished", _stopped)
        assert cli(*words("prune by weights", tmp_path / "out", places)).code == 130
    assert cli(*words("prune by weights", tmp_path / "out", places)).code == 0 and made == ["weights.aimer"]


@pytest.mark.slow
def test_other_data_is_measured_anew_and_a_copy_of_it_is_not(cli, tmp_path, places, made):
    step = "prune --data"
    (tmp_path / "copy.txt").write_bytes(places["data"].read_bytes())
    (tmp_path / "other.txt").write_text(text(400, seed=1))
    for name, count in (("data", 1), ("copy.txt", 1), ("other.txt", 2)):
        data = places["data"] if name == "data" else tmp_path / name
        assert cli(*words(step, tmp_path / "out", places | {"data": data}, "--part", "0/2")).code == 0
        assert len(made) == count, name


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("flags", [("--no-check",), ("--part", "0/2"), ("--dry-run",)])
def test_every_table_does_without_what_a_flag_leaves_out(cli, tmp_path, places, step, flags):
    line = [word for word in words(step, tmp_path / "out", places, *flags) if word != "--json"]
    done = cli(*line)
    if "--mix" in line and "--dry-run" in line:  # only a measurement finds the mix
        assert done.code == 2 and "--mix needs measurements" in done.err
        return
    assert done.code == 0 and "size" in done.out, done.err


# -- the place where it lies ---------------------------------------------------------------------------------------


def measured(out: Path, **keywords: object) -> Measured:
    return Measured(out, key=lambda: "k" * 64, **keywords)  # type: ignore[arg-type]


@pytest.fixture
def measuring(tmp_path: Path) -> Iterator[int]:
    """Another process that measures without end."""
    child = os.fork()
    if not child:
        with measured(tmp_path / "out", shared=True) as other:
            other.once("a", lambda folder: ((folder / "begun").write_text("x"), time.sleep(60)))
        os._exit(0)
    while not list(tmp_path.glob(".out.moeconv/measured-*/a.begun/begun")):
        time.sleep(0.01)
    yield child
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        killed(child)


def killed(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_who_was_killed_is_replaced_and_who_waits_says_so(tmp_path, measuring):
    said: list[str] = []

    def note(line: str) -> None:
        said.append(line)
        killed(measuring)

    with measured(tmp_path / "out", shared=True, note=note) as mine:
        folder, figures = mine.once("a", lambda folder: sorted(os.listdir(folder)))
    assert said == ["another part is measuring: waiting for it"]
    assert figures == [] and folder.is_dir(), "what the killed one left is gone"


def test_what_resumes_finds_what_was_left(tmp_path, measuring):
    killed(measuring)
    with measured(tmp_path / "out") as mine:
        assert mine.once("a", lambda folder: sorted(os.listdir(folder)), resumes=True)[1] == ["begun"]


@pytest.mark.parametrize(
    ("error", "left"), [(CheckError("no"), False), (OutputError("full"), True), (Interrupted("stop"), True)]
)
def test_what_an_error_leaves(tmp_path, error, left):
    """A run that can go on finds what is whole; one that cannot leaves nothing."""
    with pytest.raises(type(error)), measured(tmp_path / "out") as mine:
        mine.once("a", lambda _folder: {"x": 0.1})

        def fails(folder: Path) -> None:
            raise error

        mine.once("b", fails)
    found = [p.name for p in tmp_path.glob(".out.moeconv/measured-*/*") if p.is_dir()]
    assert found == (["a"] if left else []) and (tmp_path / ".out.moeconv").exists() == left
    with measured(tmp_path / "out") as mine:
        assert mine.once("a", lambda _folder: {"x": 1})[1] == ({"x": 0.1} if left else {"x": 1})


def test_an_error_with_nothing_measured_leaves_nothing(tmp_path):
    with pytest.raises(Interrupted), measured(tmp_path / "out") as mine:
        mine.once("a", lambda _folder: (_ for _ in ()).throw(Interrupted("stop")))
    assert os.listdir(tmp_path) == []


def test_a_whole_run_and_a_part_exclude_each_other(tmp_path):
    with measured(tmp_path / "out"):
        other = StagingLock(tmp_path / "out", shared=True)
        with pytest.raises(OutputError, match="another moeconv run"):
            other.acquire()
