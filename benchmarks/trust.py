"""What was done to moeconv, and what came of it: kills, crashes at every disk operation, full disks, hostile inputs.

    python benchmarks/trust.py [--kills 60] [--fuzz PYTHON] [--executions 1000000] [--results FILE.json]

Prints one table. A run that left a damaged OUT, other bytes than an undisturbed run, or a changed source is a failure;
the same is tried on a writer that copies file by file, to show that the test can see one. PYTHON is an interpreter
with atheris (see fuzz.py); without it the row of inputs is left out.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from crash.forkserver import ForkServer  # noqa: E402
from tiny import hashes, make_dense, make_moe  # noqa: E402

from moeconv.errors import MoeconvError  # noqa: E402
from moeconv.verify.run import verify  # noqa: E402

SIZE = "24KB"
COMMANDS = {
    "upcycle": ("--no-check", "-q", "--experts", 3, "--shard-size", SIZE),
    "upcycle by expert": ("--no-check", "-q", "--experts", 3, "--shard-by", "expert"),
    "prune": ("--keep", 2, "-q", "--shard-size", SIZE),
}


@dataclass
class Row:
    """One line of the table."""

    what: str
    tried: int = 0
    left_whole: int = 0  # OUT was complete
    left_none: int = 0  # OUT was absent, and the same command made it
    failures: int = 0

    def line(self) -> str:
        return f"| {self.what} | {self.tried:,} | {self.left_none:,} | {self.left_whole:,} | {self.failures:,} |"


def whole(out: Path, expected: dict[str, str] | None) -> bool:
    """Whether OUT is a checkpoint whose every byte fits its manifest and, if given, the undisturbed run's."""
    try:
        report = verify(str(out))
    except MoeconvError:
        return False
    return bool(report["ok"] and report["manifest"] and (expected is None or hashes(out) == expected))


class Sweep:
    """A command on a tiny checkpoint, disturbed again and again."""

    def __init__(self, server: ForkServer, folder: Path, name: str) -> None:
        self.server, self.folder, self.name = server, folder / name.replace(" ", "-"), name
        self.folder.mkdir()
        verb = name.split()[0]
        made = make_moe if verb == "prune" else make_dense
        self.source = made(self.folder / "source", shards=3)
        self.before = hashes(self.source)
        self.words = lambda out: (verb, self.source, out, *COMMANDS[name])
        self.log = self.folder / "log"
        seconds = []
        for i in range(3):
            began = time.monotonic()
            assert server.run(*self.words(self.folder / f"calm{i}"), log=self.log) == 0, self.log.read_text()
            seconds.append(time.monotonic() - began)
        self.seconds = min(seconds)
        self.expected = hashes(self.folder / "calm0")
        self.operations = 0

    def judge(self, row: Row, out: Path, *more: object) -> None:
        """Look at what was left, then give the same command again."""
        row.tried += 1
        there = out.exists()
        fine = whole(out, self.expected) if there else True
        if not there:
            fine = self.server.run(*self.words(out), *more, log=self.log) == 0 and whole(out, self.expected)
            row.left_none += fine
        else:
            row.left_whole += fine
        row.failures += not fine
        shutil.rmtree(out.parent)

    def kills(self, row: Row, *, jobs: int, runs: int) -> None:
        """SIGKILL at random moments of a run; a run that ended before it does not count."""
        rng = random.Random(f"{self.name}{jobs}")
        goal = row.tried + runs
        while row.tried < goal:
            out = self.folder / "run" / "out"
            out.parent.mkdir()
            pid = self.server.start(*self.words(out), "--jobs", jobs, log=self.log)
            self.server.signal(pid, signal.SIGKILL, after=rng.uniform(0.0, self.seconds))
            if self.server.wait(pid) == -signal.SIGKILL:
                self.judge(row, out, "--jobs", rng.choice([1, 4]))
            else:
                self.seconds *= 0.97
                shutil.rmtree(out.parent)

    def crashes(self, row: Row, *, mode: str) -> None:
        """The process ends at each disk operation in turn, or that operation fails with ENOSPC."""
        count = self.folder / "count"
        count.mkdir()
        assert self.server.run(*self.words(count / "out"), "--jobs", 1, log=count / "log") == 0
        total = self.operations = int((count / "log.operations").read_text())
        shutil.rmtree(count)
        for at in range(total):
            out = self.folder / "run" / "out"
            out.parent.mkdir()
            log = out.parent / "log"
            code = self.server.run(*self.words(out), "--jobs", 1, log=log, at=at, mode=mode)
            right = code in ((0, 4) if mode == "full" else (-signal.SIGKILL,))
            row.failures += not right
            self.judge(row, out)


def naive(server: ForkServer, folder: Path, row: Row) -> None:
    """The same crashes for a copy file by file into OUT."""
    source = folder / "upcycle" / "calm0"
    count = folder / "naive"
    count.mkdir()
    assert server.run(source, count / "out", log=count / "log", target="naive") == 0
    for at in range(int((count / "log.operations").read_text())):
        for mode in ("kill", "torn", "power"):
            out = folder / "naive-run" / "out"
            out.parent.mkdir()
            server.run(source, out, log=out.parent / "log", target="naive", at=at, mode=mode)
            row.tried += 1
            if not out.exists():
                row.left_none += 1
            elif whole(out, hashes(source)):
                row.left_whole += 1
            else:
                row.failures += 1
            shutil.rmtree(out.parent)


def fuzzed(python: str, executions: int, say: Callable[[str], None]) -> tuple[dict[str, int], int]:
    """(executions by target, crashes) of benchmarks/fuzz.py, starting from the corpus that the tests replay."""
    share = {"header": 0.6, "index": 0.25, "config": 0.15}
    done, crashes = {}, 0
    for target, part in share.items():
        with tempfile.TemporaryDirectory() as corpus:
            shutil.copytree(ROOT / "tests" / "attacks" / "corpus" / target, corpus, dirs_exist_ok=True)
            words = [python, ROOT / "benchmarks" / "fuzz.py", target, corpus, "--executions", int(executions * part)]
            run = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=corpus)
        found = re.search(r"stat::number_of_executed_units: (\d+)", run.stderr + run.stdout)
        done[target] = int(found[1]) if found else 0
        crashes += run.returncode != 0
        say(f"{target}: {done[target]:,} inputs, exit {run.returncode}")
    return done, crashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="random kills for each command and number of workers")
    parser.add_argument("--fuzz", help="python of an environment that has atheris")
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path)
    a = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    rows: list[Row] = []
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="moeconv-trust-", dir=place) as scratch, ForkServer() as server:
        sweeps = [Sweep(server, Path(scratch), name) for name in COMMANDS]
        for jobs in (1, 4):
            rows.append(Row(f"SIGKILL at a random moment, {jobs} worker{'s' * (jobs > 1)}"))
            for sweep in sweeps:
                sweep.kills(rows[-1], jobs=jobs, runs=a.kills)
            say(rows[-1].line())
        for mode, what in (
            ("kill", "process ends at every disk operation"),
            ("torn", "process ends in the middle of every write"),
            ("power", "power fails at every disk operation: what was not synchronised is cut"),
            ("full", "ENOSPC at every disk operation"),
        ):
            rows.append(Row(what))
            for sweep in sweeps:
                sweep.crashes(rows[-1], mode=mode)
            say(rows[-1].line())
        lost = sum(hashes(s.source) != s.before for s in sweeps)
        control = Row("control: the first three done to a copy file by file")
        naive(server, Path(scratch), control)
        operations = {s.name: s.operations for s in sweeps}
    assert control.failures, "the sweep does not see a writer that takes no care"
    lines = [
        "| what was done | times | no OUT; the same command completed it | OUT whole | damaged |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [row.line() for row in rows] + [control.line()]
    if a.fuzz:
        done, crashes = fuzzed(a.fuzz, a.executions, say)
        text = ", ".join(f"{n:,} {target}" for target, n in done.items())
        lines.append(f"| hostile inputs ({text}) | {sum(done.values()):,} | | | {crashes} untyped errors |")
    counts = ", ".join(f"{name} {count}" for name, count in operations.items())
    lines += ["", f"Sources changed: {lost}. Disk operations of one run: {counts}."]
    print("\n".join(lines))
    if a.results:
        a.results.write_text(json.dumps([vars(row) for row in [*rows, control]], indent=1) + "\n")
    raise SystemExit(1 if lost or any(row.failures for row in rows) else 0)


if __name__ == "__main__":
    main()
