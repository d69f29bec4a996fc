"""Disks that refuse: full, over quota, read-only, no permission. Exit 4; what is finished is kept for a resume."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash.faults import Faults
from tiny import hashes, make_dense

from moeconv.checkpoint.output import OutputDirectory

FLAGS = ("--no-check", "-q", "--experts", 3, "--shard-size", "24KB", "--jobs", 1)
NOBODY = 65534
LATE = ("rich.console", "rich.table", "rich.color", "moeconv.verify.run")  # what commands import when they need it


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may enter, and only its owner may write to."""
    with tempfile.TemporaryDirectory(prefix="moeconv-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def source(place) -> Path:
    return make_dense(place / "source", shards=3)


@pytest.fixture
def expected(cli, source, place) -> dict[str, str]:
    """What a disk without faults gets; also imports whatever a run needs."""
    assert cli("upcycle", source, place / "expected", *FLAGS).code == 0
    return hashes(place / "expected")


def kept(out: Path) -> int:
    return len(list((out.parent / f".{out.name}.moeconv").glob("*/done/*.json")))


def refused(outcome, says: str) -> None:
    assert outcome.code == 4 and says in outcome.err and outcome.out == "", outcome
    assert "Traceback" not in outcome.err and "bug of moeconv" not in outcome.err


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(source, expected, place):
    """The kernel's own refusal (EFBIG), in a process of its own: the small shards are kept, the large one is named."""
    out = place / "out"
    words = ["upcycle", source, out, *FLAGS[:-4], "--shard-size", "60KB", "--jobs", 1]
    run = shlex.join(map(str, [sys.executable, "-m", "moeconv", *words]))
    done = subprocess.run(["bash", "-c", f"ulimit -f 40; exec {run}"], capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "File too large" in done.stderr and "again" in done.stderr, done
    assert "Traceback" not in done.stderr and not out.exists()
    assert subprocess.run(["bash", "-c", run], check=False, capture_output=True).returncode == 0
    assert out.exists() and not kept(out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
def test_whatever_the_disk_says_at_any_operation(cli, source, expected, place, number):
    with Faults() as counted:
        assert cli("upcycle", source, place / "count", *FLAGS).code == 0
    last = counted.count - counted.names[::-1].index("fsync")
    for at in range(number % 5, last, 9):
        out = place / str(at) / "out"
        out.parent.mkdir()
        with Faults(at=at, mode="full", error=number) as faults:
            outcome = cli("upcycle", source, out, *FLAGS)
        if outcome.code == 0:
            assert faults.names[at] == "unlink"
        else:
            refused(outcome, os.strerror(number))
            assert "again" in outcome.err
        if not out.exists():
            assert cli("upcycle", source, out, *FLAGS).code == 0
        assert hashes(out) == expected
        shutil.rmtree(out.parent)


# -- real mounts -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(cli, source, expected, place, monkeypatch):
    """Seen before the first byte; and when others fill it after that look, met at a write and resumed from there."""
    with mounted(place / "disk", "size=88k") as disk:
        outcome = cli("upcycle", source, disk / "out", *FLAGS)
        refused(outcome, "bytes are needed")
        assert kept(disk / "out") == 0 and not (disk / "out").exists()
        with monkeypatch.context() as patch:
            patch.setattr(OutputDirectory, "free_bytes", lambda _self: 1 << 40)
            refused(cli("upcycle", source, disk / "out", *FLAGS), "No space left")
        finished = kept(disk / "out")
        assert finished >= 2 and not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        before = {p.name: p.stat().st_mtime_ns for p in (disk / ".out.moeconv").glob("*/out/*.safetensors")}
        assert cli("upcycle", source, disk / "out", *FLAGS).code == 0
        assert hashes(disk / "out") == expected
        after = {p.name: p.stat().st_mtime_ns for p in (disk / "out").glob("*.safetensors")}
        assert len(before.items() & after.items()) >= finished, "finished shards are not written again"


def test_a_disk_that_is_read_only(cli, source, expected, place):
    with mounted(place / "disk", "size=2m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(cli("upcycle", source, disk / "out", *FLAGS), "Read-only file system")
        assert os.listdir(disk) == []
    with mounted(place / "source-disk", "size=2m") as disk:  # the source may well be
        shutil.copytree(source, disk / "source")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert cli("upcycle", disk / "source", place / "out", *FLAGS).code == 0
        refused(cli("upcycle", disk / "source", disk / "out", *FLAGS), "Read-only file system")


# -- permission ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_privilege() -> Iterator[None]:
    """Root may write everywhere; the tests run as nobody where they run as root."""
    root = os.geteuid() == 0
    if root:
        for module in LATE:  # where Python itself lies, nobody may not be let in
            importlib.import_module(module)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_may_not_be_written_to(cli, source, expected, place):
    closed = place / "closed"
    closed.mkdir(mode=0o555)
    with without_privilege():
        refused(cli("upcycle", source, closed / "out", *FLAGS), "Permission denied")
    assert os.listdir(closed) == []


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_a_source_that_may_not_be_read(cli, source, expected, place, name):
    (source / name).chmod(0)
    opened = place / "open"
    opened.mkdir()
    opened.chmod(0o777)
    with without_privilege():
        outcome = cli("upcycle", source, opened / "out", *FLAGS)
    assert outcome.code == 3 and name in outcome.err and "Permission denied" in outcome.err, outcome
    assert "Traceback" not in outcome.err and os.listdir(opened) == []


def test_the_source_may_be_wholly_read_only_and_stays_as_it_was(cli, source, expected, place):
    """Neither bytes nor names nor times of the source change, whatever is done with it."""

    def state() -> dict[str, tuple[int, ...]]:
        paths = [source, *source.iterdir()]
        return {str(p): (s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino) for p in paths for s in [p.stat()]}

    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    before, content, opened = state(), hashes(source), place / "open"
    opened.mkdir()
    opened.chmod(0o777)
    try:
        with without_privilege():
            for words in (("--overwrite",), ("--overwrite", "--jobs", 3), ("--overwrite", "--shard-by", "expert")):
                assert cli("upcycle", source, opened / "out", *FLAGS[:-2], *words).code == 0
            assert cli("verify", opened / "out", "--source", source).code == 0
            assert cli("inspect", source).code == 0
        assert state() == before and hashes(source) == content
    finally:
        source.chmod(0o755)
