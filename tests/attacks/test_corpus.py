"""What the fuzzer found worth keeping, replayed; and what the worst of a few bytes may cost.

The corpus was made by benchmarks/fuzz.py (atheris); a new finding goes into corpus/TARGET as a file of its own.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attacks.targets import Folder, targets
from tiny import make_dense, with_header

from moeconv.checkpoint.header import LIBRARY_HEADER_BYTES, MAX_HEADER_BYTES
from moeconv.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from moeconv.checkpoint.strictjson import MAX_JSON_BYTES

CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture(scope="module")
def folder() -> Iterator[Folder]:
    yield Folder()


@pytest.mark.parametrize("target", ["header", "index", "config"])
def test_the_corpus_raises_typed_errors_only(folder, target):
    files = sorted((CORPUS / target).iterdir())
    assert len(files) >= 10
    for file in files:
        try:
            targets(folder)[target](file.read_bytes())
        except BaseException as error:
            error.add_note(f"input: {file}") if hasattr(error, "add_note") else None
            raise


@pytest.mark.parametrize("target", ["header", "index", "config"])
def test_the_replay_notices_an_untyped_error(folder, target, monkeypatch):
    """With a parser that lets a KeyError out, as one without checks would."""
    import moeconv.checkpoint.header as header
    import moeconv.checkpoint.reader as reader

    def careless(data, **_):
        return json.loads(data)["no such key"]

    monkeypatch.setattr(header, "parse_items", careless)
    monkeypatch.setattr(reader, "read_json_object", lambda path, **_: careless(path.read_bytes()))
    with pytest.raises((KeyError, TypeError, ValueError)):
        test_the_corpus_raises_typed_errors_only(folder, target)


# -- cost ----------------------------------------------------------------------------------------------------------


def _to(size: int, unit: bytes, *, start: bytes = b'{"a":[', end: bytes = b"0]}") -> bytes:
    return start + unit * ((size - len(start) - len(end)) // len(unit)) + end


def _keys(count: int, value: str) -> bytes:
    return ("{" + ",".join(f'"{i:x}":{value}' for i in range(count)) + "}").encode()


WORST: dict[str, Callable[[int], bytes]] = {
    "empty lists": lambda size: _to(size, b"[],"),
    "empty lists, as many as are taken": lambda _size: _to(740_000, b"[],"),
    "numbers": lambda size: _to(size, b"1.5,"),
    "keys": lambda _size: _keys(2_000_000, "0"),
    "keys, as many as are taken": lambda _size: _keys(490_000, "0"),
    "objects, as many as are taken": lambda _size: _keys(240_000, "{}"),
    "tensors, as many as are taken": lambda _size: _keys(70_000, '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'),
    "one string": lambda size: _to(size, b"x", start=b'{"a":"', end=b'"}'),
    "one string with a wide character": lambda size: _to(size // 4, b"x", start='{"a":"😀'.encode(), end=b'"}'),
    "one string of escapes": lambda size: _to(size, b"\\u0041", start=b'{"a":"', end=b'"}'),
    "nesting": lambda _size: b"[" * 400_000,
    "a number of many digits": lambda size: _to(size, b"9", start=b'{"a":', end=b"}"),
    "white space": lambda size: _to(size, b" ", start=b"{", end=b"}"),
}
LIMITS = {"header": MAX_HEADER_BYTES, "index": MAX_JSON_BYTES}
CHILD = """
import sys, resource
from moeconv.cli.app import run
from moeconv.plan.execute import peak_rss_bytes
code = run(["inspect", sys.argv[1]])
used = resource.getrusage(resource.RUSAGE_SELF)
print(code, peak_rss_bytes(), used.ru_utime + used.ru_stime)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["header", "index"])  # a config is read as an index is
def test_the_worst_that_a_few_bytes_can_cost(tmp_path, target):
    """A typed error within 2 seconds of processor time and 200 MB, start of Python included."""
    source = make_dense(tmp_path / "source", shards=1 if target == "header" else 2)
    file = source / {"header": SINGLE_NAME, "index": INDEX_NAME}[target]
    for what, make in WORST.items():
        text = make(LIMITS[target])
        file.write_bytes(with_header(text) if target == "header" else text)
        done = subprocess.run(
            [sys.executable, "-c", CHILD, source], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        code, peak, seconds = done.stdout.split()[-3:]
        assert code == "3" and "Traceback" not in done.stderr, (what, done.stderr)
        assert int(peak) < 200_000_000, (what, peak)
        assert float(seconds) < 2, (what, seconds)


@pytest.mark.parametrize(
    ("length", "says"), [(LIBRARY_HEADER_BYTES + 1, "beyond the limit"), (MAX_HEADER_BYTES + 1, "not valid JSON")]
)
def test_a_file_that_claims_more_than_it_holds_is_not_read(tmp_path, length, says):
    """A sparse file of a terabyte: neither its header nor its data is taken into memory."""
    source = make_dense(tmp_path / "source")
    with open(source / SINGLE_NAME, "wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(1 << 40)
    done = subprocess.run([sys.executable, "-c", CHILD, source], capture_output=True, text=True, check=False)
    code, peak, _ = done.stdout.split()[-3:]
    assert code == "3" and says in done.stderr and int(peak) < 150_000_000
