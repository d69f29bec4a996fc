"""What a stranger's bytes are given to: a shard's header, an index, a config. Only typed errors may come out.

benchmarks/fuzz.py drives these three with coverage, test_corpus.py replays what it found worth keeping.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from tiny import make_dense, make_moe

from moeconv.checkpoint.header import header_length, parse_header
from moeconv.checkpoint.reader import INDEX_NAME, Checkpoint
from moeconv.checkpoint.strictjson import parse_json
from moeconv.errors import InputError, MoeconvError
from moeconv.families.model import open_model
from moeconv.inspect.run import inspect
from moeconv.prune.planner import plan_prune
from moeconv.quantize.planner import plan_quantize
from moeconv.upcycle.planner import plan_upcycle

Target = Callable[[bytes], None]


def _typed(error: MoeconvError, *codes: int) -> None:
    assert error.exit_code in codes and error.message and error.message.isprintable() and len(error.message) < 2000


def header(data: bytes) -> None:
    """`data` is a whole safetensors file, as SafetensorsFile takes it apart."""
    try:
        length = header_length(data[:8], file_size=len(data), file="f")
        tensors, _ = parse_header(data[8 : 8 + length], file_size=len(data), file="f")
    except InputError as error:
        _typed(error, 3)
        return
    assert sum(t.nbytes for t in tensors.values()) + 8 + length == len(data)


class Folder:
    """A good checkpoint in memory, one of whose files is replaced by the bytes of each call."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="moeconv-fuzz-", dir=_memory())
        root = Path(self._folder.name)
        self.sharded = make_dense(root / "sharded", shards=2, layers=1, hidden=8, intermediate=8, vocab=8)
        self.models = [
            make_dense(root / "llama", layers=2), make_moe(root / "mixtral", experts=3, top_k=1),
            make_moe(root / "qwen3_moe", "qwen3_moe", experts=3, top_k=1),
        ]  # fmt: skip

    def index(self, data: bytes) -> None:
        """`data` is the index of a checkpoint of two shards."""
        (self.sharded / INDEX_NAME).write_bytes(data)
        try:
            checkpoint = Checkpoint(self.sharded)
        except InputError as error:
            _typed(error, 3)
            return
        assert set(checkpoint.tensors) == set(json.loads(data)["weight_map"])

    def config(self, data: bytes) -> None:
        """The first byte of `data` chooses a model, the rest is its config.json; everything that plans looks at it."""
        path = self.models[data[0] % len(self.models) if data else 0]
        (path / "config.json").write_bytes(data[1:])
        try:
            model = open_model(path)
            json.dumps(inspect(model), allow_nan=False)
        except InputError as error:
            _typed(error, 3)
            return
        for plan in (
            lambda: plan_upcycle(model, experts=2, top_k=1), lambda: plan_prune(model, keep=2),
            lambda: plan_quantize(model, group_size="32"),
        ):  # fmt: skip
            try:
                parse_json(b"".join(plan().canonical()), what="plan")
            except MoeconvError as error:
                _typed(error, 2, 3)

    def seeds(self) -> dict[str, list[bytes]]:
        """Good inputs of each target, before anything was replaced."""
        shards = [path.read_bytes() for path in sorted(self.sharded.glob("*.safetensors"))]
        configs = [bytes([i]) + (path / "config.json").read_bytes() for i, path in enumerate(self.models)]
        return {"header": shards, "index": [(self.sharded / INDEX_NAME).read_bytes()], "config": configs}


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def targets(folder: Folder) -> dict[str, Target]:
    return {"header": header, "index": folder.index, "config": folder.config}
