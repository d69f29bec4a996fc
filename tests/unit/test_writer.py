"""ShardWriter and the small files: any order of writes gives one file, every failure is an OutputError."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import time
from concurrent.futures import thread

import pytest
from tiny import read_file

from moeconv.checkpoint import writer as module
from moeconv.checkpoint.writer import ShardWriter, replace_file, write_file, writing_artifact
from moeconv.errors import OutputError

LAYOUT = [("wide", "F64", (5,)), ("matrix", "BF16", (7, 3)), ("empty", "F32", (0, 4)), ("bytes", "U8", (11,))]
SIZES = {"wide": 40, "matrix": 42, "empty": 0, "bytes": 11}


def content(seed: int = 0) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {name: rng.randbytes(size) for name, size in SIZES.items()}


def pieces(data: dict[str, bytes], *, size: int) -> list[tuple[str, int, bytes]]:
    return [(n, i, d[i : i + size]) for n, d in data.items() for i in range(0, len(d), size)]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_any_order_gives_the_same_file_and_hash(tmp_path, order, size):
    data = content()
    work = pieces(data, size=size)
    if order == "backward":
        work.reverse()
    elif order == "shuffled":
        random.Random(size).shuffle(work)
    writer = ShardWriter(tmp_path / "f", LAYOUT)
    for name, start, piece in work:
        writer.write(name, piece, start=start)
    sha256, nbytes = writer.finish()
    file = (tmp_path / "f").read_bytes()
    assert (sha256, nbytes) == (hashlib.sha256(file).hexdigest(), len(file))
    assert {n: (d, s) for n, (d, s, _) in read_file(tmp_path / "f").items()} == {n: (d, s) for n, d, s in LAYOUT}
    assert {n: raw for n, (_, _, raw) in read_file(tmp_path / "f").items()} == data


def test_a_file_without_tensors(tmp_path):
    sha256, size = ShardWriter(tmp_path / "f", []).finish()
    assert read_file(tmp_path / "f") == {}
    assert (hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest(), os.path.getsize(tmp_path / "f")) == (
        sha256,
        size,
    )


def test_bytes_beyond_a_tensor_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "f", LAYOUT)
    with pytest.raises(ValueError, match="do not fit"):
        writer.write("bytes", bytes(12))
    with pytest.raises(ValueError, match="do not fit"):
        writer.write("bytes", bytes(2), start=10)
    writer.close()


@pytest.mark.parametrize("lacks", ["wide", "matrix", "bytes"])
def test_a_tensor_not_written_whole_is_noticed(tmp_path, lacks):
    writer = ShardWriter(tmp_path / "f", LAYOUT)
    for name, data in content().items():
        writer.write(name, data[:-1] if name == lacks else data)
    with pytest.raises(ValueError, match=f"'{lacks}' was not written whole"):
        writer.finish()
    writer.close()


def test_a_tensor_written_twice_is_noticed(tmp_path):
    writer = ShardWriter(tmp_path / "f", LAYOUT)
    for name, data in content().items():
        writer.write(name, data)
    writer.write("bytes", content()["bytes"])
    with pytest.raises(ValueError, match="not written whole"):
        writer.finish()
    writer.close()


def test_the_kernel_may_take_fewer_bytes_than_offered(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, bytes(data)[: max(1, len(data) // 3)], at))
    partly = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: partly(fd, bytes(data)[: max(1, len(data) // 3)]))
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read(fd, [buffers[0][:7]], at))
    writer = ShardWriter(tmp_path / "f", LAYOUT)
    for name, data in reversed(content().items()):
        writer.write(name, data)
    sha256, _ = writer.finish()
    write_file(tmp_path / "small", b"0123456789")
    monkeypatch.undo()
    assert sha256 == hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()
    assert {n: raw for n, (_, _, raw) in read_file(tmp_path / "f").items()} == content()
    assert (tmp_path / "small").read_bytes() == b"0123456789"


@pytest.mark.parametrize("name", ["open", "pwrite", "fsync"])
def test_failures_are_output_errors_that_name_the_file(tmp_path, monkeypatch, name):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(OutputError, match=r"cannot write shard\.x: No space left") as caught:
            writer = ShardWriter(tmp_path / "shard.x", [])
            try:
                writer.finish()
            finally:
                writer.close()
    assert "run the same command again" in caught.value.hint
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
@pytest.mark.parametrize("write", ["shard", "small"])
def test_nothing_is_written_through_a_link(tmp_path, kind, write):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    file = tmp_path / "f"
    (file.symlink_to if kind == "symbolic" else file.hardlink_to)(precious)
    if write == "small":
        write_file(file, b"new")
    else:
        ShardWriter(file, []).finish()
    assert precious.read_bytes() == b"precious" and not file.is_symlink()


def test_modes_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        ShardWriter(tmp_path / "f", []).finish()
        write_file(tmp_path / "g", b"")
    finally:
        os.umask(old)
    assert {(tmp_path / n).stat().st_mode & 0o777 for n in "fg"} == {0o640}


def test_replace_file_leaves_the_old_one_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "f"
    replace_file(file, b"old")
    for name in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(module.os, name, lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
            with pytest.raises(OutputError, match="I/O error"):
                replace_file(file, b"new")
        assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]
    replace_file(file, b"new")
    assert file.read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]


def test_an_artifact_appears_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="not written whole"):
        with writing_artifact(file, LAYOUT, metadata={}) as writer:
            writer.write("wide", content()["wide"])
    with pytest.raises(RuntimeError):
        with writing_artifact(file, LAYOUT, metadata={}):
            raise RuntimeError
    assert os.listdir(tmp_path) == []
    for overwrite in (False, True):
        with writing_artifact(file, LAYOUT, metadata={"k": "v"}, overwrite=overwrite) as writer:
            assert file.exists() == overwrite
            for name, data in content(overwrite).items():
                writer.write(name, data)
        assert {n: raw for n, (_, _, raw) in read_file(file).items()} == content(overwrite)
    with pytest.raises(OutputError, match="exists already"):
        with writing_artifact(file, LAYOUT, metadata={}):
            pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_hashing_thread_that_is_slow_to_let_go(tmp_path, monkeypatch):
    """Its result is there a moment before its arguments are gone; the buffer that they view is closed in between."""
    run = thread._WorkItem.run

    def slow(self):
        run(self)
        time.sleep(0.02)

    monkeypatch.setattr(thread._WorkItem, "run", slow)
    writer = ShardWriter(tmp_path / "f", [("a", "U8", (5000,))])
    writer.write("a", bytes(5000))
    sha256, _ = writer.finish()
    assert sha256 == hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()
