"""Fixtures that all tests share: the command line in this process or in its own, and a look at what was left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command does, before torch is imported


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """`cli("inspect", path)` runs the command line in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Outcome:
        from moeconv.cli import app

        capsys.readouterr()
        code = app.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return checked(arguments, Outcome(code, captured.out, captured.err))

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(*arguments: object, input: str | None = None, **environment: str) -> Outcome:
    """Run `python -m moeconv` as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "moeconv", *map(str, arguments)],
        capture_output=True, text=True, input=input, env=os.environ | environment, check=False,
    )  # fmt: skip
    return checked(arguments, Outcome(done.returncode, done.stdout, done.stderr))


def checked(arguments: Sequence[object], outcome: Outcome) -> Outcome:
    """The outcome, after its JSON was held against the published schema."""
    if "--json" in arguments and outcome.out.startswith("{"):
        from schema import check_json

        check_json(str(arguments[0]), outcome.json)
    return outcome


@pytest.fixture(name="command")
def command_fixture() -> Callable[..., Outcome]:
    return command


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make a package importable with one entry point, as pip leaves it in site-packages:
    `install("novel-pack", "THING = 5", group="moeconv.families")`."""
    from moeconv import plugins

    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def make(package: str, code: str, *, group: str, value: str = "THING", name: str = "thing") -> None:
        module = package.replace("-", "_")
        (folder / f"{module}.py").write_text(code)
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{value}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)  # of a test before, by the same name
        plugins._registered.cache_clear()

    yield make
    plugins._registered.cache_clear()


@pytest.fixture
def left_over() -> Callable[[Path], list[str]]:
    """`left_over(folder)` names what moeconv left in a folder: outputs, staging directories, temporary files."""

    def look(folder: Path) -> list[str]:
        return sorted(e.name for e in os.scandir(folder) if e.name.startswith("out") or "moeconv" in e.name)

    return look


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes in one thread, as the command does: with more, small matrices are slower and sums vary."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- the device ------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests that are marked gpu, on CUDA, and no others")


def pytest_configure(config: pytest.Config) -> None:
    """The suite runs on the CPU, where the same seed gives the same bytes, also on a machine with a GPU and in the
    processes that tests start."""
    if not config.getoption("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Any:
    """The device on which a test computes: CUDA in the tests that are marked gpu, and the CPU in all others."""
    import torch

    if request.node.get_closest_marker("gpu") is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; `python -m pytest --gpu` runs this test where there is one")
    return torch.device("cuda", torch.cuda.current_device())


# -- tests that `-m "not slow"` leaves out ----------------------------------------------------------------------------

_LEFT_OUT = pytest.StashKey[int]()  # how many: counted here, or by the workers of pytest-xdist, which select


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the mark from the cases that `slow(keep=n)` keeps: n of a parametrized test, evenly spread."""
    if config.getoption("gpu"):
        items[:] = [item for item in items if item.get_closest_marker("gpu")]
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        mark = item.get_closest_marker("slow")
        if mark is not None and mark.kwargs.get("keep"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        mark = found[0].get_closest_marker("slow")
        assert mark is not None
        count = min(mark.kwargs["keep"], len(found))
        for at in {i * (len(found) - 1) // max(1, count - 1) for i in range(count)}:
            found[at].own_markers = [own for own in found[at].own_markers if own.name != "slow"]


def pytest_deselected(items: list[pytest.Item]) -> None:
    if not items or items[0].config.option.keyword:  # then it is -k that chose
        return
    count = sum(item.get_closest_marker("slow") is not None for item in items)
    if count:
        config = items[0].config
        config.stash[_LEFT_OUT] = config.stash.get(_LEFT_OUT, 0) + count


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow_left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    count = getattr(node, "workeroutput", {}).get("slow_left_out", 0)
    node.config.stash[_LEFT_OUT] = max(node.config.stash.get(_LEFT_OUT, 0), count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} slow tests left out: `python -m pytest`, without -m, runs them all")
