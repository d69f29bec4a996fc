"""Fixtures that all tests share: the command line in this process or in its own, and a look at what was left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
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
        return Outcome(code, captured.out, captured.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(*arguments: object, input: str | None = None, **environment: str) -> Outcome:
    """Run `python -m moeconv` as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "moeconv", *map(str, arguments)],
        capture_output=True, text=True, input=input, env=os.environ | environment, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(name="command")
def command_fixture() -> Callable[..., Outcome]:
    return command


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
