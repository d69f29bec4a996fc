"""A process that has moeconv imported and forks a child for every run, so that a run costs no start of Python.

Requests and answers are JSON lines. start -> {"pid"}, signal (after a delay), wait -> {"code"} as subprocess gives it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class ForkServer:
    """The test's end. Use as a context manager. With `measures`, the runs measure on data."""

    def __init__(self, *, measures: bool = False) -> None:
        single = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *["measures"] * measures],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | single,
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *words: object, log: Path, target: str = "cli", at: int | None = None, mode: str = "kill") -> int:
        """Start a run; its output goes to `log`, faults as in Faults, the folder of the log being the disk."""
        return int(self.ask(do="start", words=[str(w) for w in words], log=log, target=target, at=at, mode=mode)["pid"])

    def signal(self, pid: int, number: int, *, after: float = 0.0) -> None:
        self.ask(do="signal", pid=pid, number=int(number), after=after)

    def wait(self, pid: int) -> int:
        """The exit code, negative for a signal."""
        return int(self.ask(do="wait", pid=pid)["code"])

    def run(self, *words: object, **how: Any) -> int:
        return self.wait(self.start(*words, **how))


def _child(request: dict[str, Any]) -> None:
    """Run one request in a forked process and leave it."""
    from faults import Faults

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 99
    try:
        with Faults(at=request["at"], mode=request["mode"], folder=Path(request["log"]).parent) as faults:
            code = TARGETS[request["target"]](request["words"])
        Path(request["log"] + ".operations").write_text(str(faults.count))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _cli(words: list[str]) -> int:
    from moeconv.cli.app import run

    return run(words)


def _naive(words: list[str]) -> int:
    """How one would copy a checkpoint without a thought: file by file into place."""
    source, out = words
    os.mkdir(out)
    for name in sorted(os.listdir(source)):
        _write(os.path.join(out, name), (Path(source) / name).read_bytes(), sync=False)
    return 0


def _hasty(words: list[str]) -> int:
    """Staged and renamed, but never synchronised."""
    source, out = words
    staged = out + ".staged"
    if os.path.exists(staged):
        subprocess.run(["rm", "-r", staged], check=True)
    os.mkdir(staged)
    for name in sorted(os.listdir(source)):
        _write(os.path.join(staged, name), (Path(source) / name).read_bytes(), sync=False)
    os.rename(staged, out)
    os.mkdir(out + ".after")  # a moment to lose power in
    return 0


def _write(path: str, data: bytes, *, sync: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for start in range(0, len(data), 1 << 16):
        os.write(fd, data[start : start + (1 << 16)])
    if sync:
        os.fsync(fd)
    os.close(fd)


TARGETS = {"cli": _cli, "naive": _naive, "hasty": _hasty}


def _warm() -> None:
    """Import and build what a run needs, so that its children do not each do it again."""
    from moeconv.cli.app import run

    with contextlib.redirect_stderr(io.StringIO()):
        run(["upcycle", "/nowhere", "/nowhere/out"])
    if "measures" in sys.argv:
        for name in ("calibrate.run", "prune.repair.run", "prune.scores"):
            importlib.import_module(f"moeconv.{name}")
    gc.freeze()


def _serve() -> None:
    _warm()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "start":
            answer["pid"] = os.fork()
            if answer["pid"] == 0:
                _child(request)
        elif request["do"] == "signal":
            time.sleep(request["after"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(request["pid"], request["number"])
        else:
            answer["code"] = os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
