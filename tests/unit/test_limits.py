"""Headers and indices of real sizes open in our own parser, and a plan never makes one that does not."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from moeconv.checkpoint.header import (
    LIBRARY_HEADER_BYTES,
    file_cost,
    header_limits,
    most_cost,
    parse_header,
    serialise_header,
    tensor_nbytes,
)
from moeconv.checkpoint.overlay import Overlay, writing_overlay
from moeconv.checkpoint.reader import INDEX_NAME, Checkpoint
from moeconv.checkpoint.strictjson import MAX_VALUES, Limits, index_limits, parse_items, parse_json
from moeconv.checkpoint.writer import ShardWriter
from moeconv.errors import InputError, LimitError, OutputError
from moeconv.families.model import open_model
from moeconv.plan import execute as loop
from moeconv.plan.limits import check_limits
from moeconv.plan.plan import Item, Plan, TensorSpec, pack_shards
from moeconv.quantize.planner import plan_quantize


def holes(path: Path, layout: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """A safetensors file of zeros that takes no disk."""
    header, infos = serialise_header(layout)
    path.write_bytes(header)
    os.truncate(path, max(info.end for info in infos.values()))


def peak(code: str, *arguments: object) -> int:
    """Bytes that a process of its own holds at most."""
    script = code + "\nfrom moeconv.plan.execute import peak_rss_bytes\nprint(peak_rss_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_header_of_many_tensors_opens(tmp_path):
    """600,000 values, as Trinity-Nano in NF4 has, in a file of the size that goes with them."""
    layout = [(f"model.layers.{i // 999}.mlp.experts.{i % 999}.up_proj.weight", "U8", (1024, 1)) for i in range(75_000)]
    holes(tmp_path / "a.safetensors", layout)
    assert file_cost(layout)[1] > 600_000
    code = "import sys; from pathlib import Path; from moeconv.checkpoint.safetensors_file import SafetensorsFile as F"
    assert peak(code + "; assert len(F(Path(sys.argv[1])).tensors) == 75_000", tmp_path / "a.safetensors") < 120 << 20


@pytest.mark.slow
def test_an_index_of_many_tensors_opens(tmp_path):
    """70 MiB, as no published model needs yet; of long names, so that it is made quickly."""
    name = "model." + "x" * 500 + ".layers.{}.mlp.experts.{}.down_proj.weight.quant_state.bitsandbytes__nf4"
    map_of: dict[str, str] = {}
    for part in range(9):
        file = f"model-{part + 1:05d}-of-00009.safetensors"
        layout = [(name.format(f"{part}000", i), "U8", (128, 8)) for i in range(14_000)]
        holes(tmp_path / file, layout)
        map_of |= dict.fromkeys((n for n, _, _ in layout), file)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": map_of}, indent=2))
    size = (tmp_path / INDEX_NAME).stat().st_size
    assert size > 70 << 20
    code = "import sys; from moeconv.checkpoint.reader import Checkpoint; assert len(Checkpoint(sys.argv[1]).tensors)"
    assert peak(code, tmp_path) < 400 << 20


def test_limits_grow_with_what_is_behind_them():
    assert header_limits(0).values == MAX_VALUES and header_limits(5 << 30).values > 10_000_000
    assert header_limits(1 << 50).bytes == LIBRARY_HEADER_BYTES, "what the library takes"
    assert index_limits(600 << 30).bytes > 1 << 30
    with pytest.raises(LimitError, match="too large"):
        parse_json(b"[" + b"1," * MAX_VALUES + b"1]", what="x", limits=Limits(1 << 30))


OBJECTS = ["{}", ' { "a" : 1 } ', '{"a":[1,{"b":2.5}],"c":"\\u00e9"}', '{"a":{"b":null},"\\ud83d\\ude00":true}']
BROKEN = ["", "[]", "1", "{", '{"a"', '{"a":', '{"a":1', '{"a":1,}', "{,}", '{"a":1 "b":2}', "{a:1}", '{"a":1}x',
          '{"a":NaN}', '{"a":1e999}', '{"a":{"b":1,"b":2}}', '{"a":"\\ud800"}', '{"\\ud800":1}', '{"a\n":1}',
          '{"a":' + "[" * 100_000]  # fmt: skip


@pytest.mark.parametrize("text", OBJECTS)
def test_members_one_by_one_are_those_of_the_whole(text):
    assert dict(parse_items(text.encode(), what="x", limits=Limits(1 << 20))) == parse_json(text.encode(), what="x")


@pytest.mark.parametrize("text", BROKEN)
def test_members_are_refused_as_the_whole_is(text):
    with pytest.raises(InputError):
        list(parse_items(text.encode(), what="x", limits=Limits(1 << 20)))


# -- planning ------------------------------------------------------------------------------------------------------


def test_entries_take_what_is_counted_for_them():
    for name in ("a", "é,{[" * 9, "x" * 300):
        for shape in ((), (1,), (2**40, 3, 5)):
            header, values, _ = file_cost([(name, "F8_E4M3FNUZ", shape)])
            empty = file_cost([])
            cost = most_cost([(name, "F8_E4M3FNUZ", shape)])
            assert header - empty[0] <= cost[0] + 8 and values - empty[1] <= cost[1]
            layout = [(f"{i}{name}", "F8_E4M3FNUZ", shape) for i in range(12)]
            text = serialise_header(layout)[0]
            size = len(text) + sum(tensor_nbytes(dtype, shape) for _, dtype, shape in layout)
            marks = sum(text[8:].count(mark) for mark in (b",", b"{", b"["))
            assert file_cost(layout) == (len(text) - 8, marks, size)


@pytest.mark.slow
def test_small_tensors_spread_over_files():
    items = [Item((TensorSpec(f"layer.{i}.weight", "U8", (1,), "x", 1),)) for i in range(75_000)]
    shards = pack_shards(items)
    assert len(shards) == 2 and sum(len(shard.items) for shard in shards) == 75_000
    for shard in shards:
        header, infos = serialise_header((s.name, s.dtype, s.shape) for s in shard.layout())
        parse_header(header[8:], file_size=max(i.end for i in infos.values()), file="f")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Kimi-K2's layers and experts, whose names and counts decide the headers."""
    return make_large(tmp_path / "large", layers=61, experts=384, dense=1)


def make_large(path: Path, *, layers: int, experts: int, dense: int) -> Path:
    """A Mixture-of-Experts of that many tensors, as narrow as its formats allow, in holes."""
    small = tiny.make_moe(path / "small", "qwen3_moe", layers=2, experts=2, mlp_only_layers=[0], hidden=64,
                          intermediate=128)  # fmt: skip
    config = json.loads((small / "config.json").read_text())
    config |= {
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_local_experts": experts,
        "mlp_only_layers": list(range(dense)),
    }
    tensors = {n: (d, s) for n, (d, s, _) in tiny.read_tensors(small).items()}
    layout = [(n, *tensors[n]) for n in tensors if ".layers." not in n]
    for layer in range(layers):
        one = f"model.layers.{int(layer >= dense)}."
        for name in (n for n in tensors if n.startswith(one)):
            for expert in range(experts) if ".experts.0." in name else (0,):
                place = name.replace(one, f"model.layers.{layer}.").replace(".experts.0.", f".experts.{expert}.")
                shape = (experts, tensors[name][1][1]) if name.endswith("mlp.gate.weight") else tensors[name][1]
                if ".experts.1." not in name:
                    layout.append((place, tensors[name][0], shape))
    (path / "config.json").write_text(json.dumps(config))
    holes(path / "model.safetensors", layout)
    return path


@pytest.fixture
def no_cycles() -> Iterator[None]:
    """As the command does: millions of objects and no cycles among them."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("no_cycles")
def test_the_largest_model_is_planned_within_the_limits(large):
    """However narrow: the least data behind the most names."""
    model = open_model(large)
    opens(plan_quantize(model, format="bitsandbytes", double_quant=True))


def opens(plan: Plan) -> None:
    check_limits(plan)
    assert all(shard.cost[0] < LIBRARY_HEADER_BYTES for shard in plan.shards)
    shard = max(plan.shards, key=lambda shard: shard.cost[1])
    header, infos = serialise_header((s.name, s.dtype, s.shape) for s in shard.layout())
    assert (len(header) - 8, shard.nbytes) == (shard.cost[0], max(info.end for info in infos.values()))
    assert len(parse_header(header[8:], file_size=shard.nbytes, file=shard.name)[0]) == len(infos)
    named = {s.name: shard.name for shard in plan.shards for item in shard.items for s in item.outputs}
    index = json.dumps({"metadata": {"total_size": 0}, "weight_map": named}).encode()
    assert len(parse_json(index, what="index", limits=index_limits(plan.nbytes))["weight_map"]) == plan.tensors


@pytest.mark.slow
def test_what_cannot_be_opened_is_said_before_any_work(tmp_path, left_over):
    spec = [TensorSpec(f"a.{i}", "U8", (1,), "x", 1) for i in range(80_000)]
    plan = Plan("x", {}, "i", {}, (loop.Shard("model.safetensors", tuple(Item((s,)) for s in spec)),), 1, 1)
    source = Checkpoint(tiny.make_moe(tmp_path / "source"))
    with pytest.raises(OutputError, match="more than can be opened again") as caught:
        loop.execute(plan, source=source, out=tmp_path / "out")
    assert "--shard-size" in caught.value.hint and left_over(tmp_path) == []
    with pytest.raises(OutputError, match="more than can be opened again"):
        ShardWriter(tmp_path / "f", [(s.name, s.dtype, s.shape) for s in spec])
    assert not (tmp_path / "f").exists()


def test_a_result_is_not_thrown_away_for_a_limit(tmp_path, monkeypatch):
    model = open_model(tiny.make_moe(tmp_path / "source", hidden=64, intermediate=64))

    with monkeypatch.context() as patch:
        patch.setattr("moeconv.plan.promises.Checkpoint", _Limited)
        with pytest.raises(OutputError, match="more than moeconv can open") as caught:
            loop.execute(plan_quantize(model), source=model.checkpoint, out=tmp_path / "out")
    staged = next(tmp_path.glob(".out.moeconv/*/out"))
    assert str(staged) in caught.value.hint
    before = (staged / "model.safetensors").stat().st_mtime_ns
    loop.execute(plan_quantize(model), source=model.checkpoint, out=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


class _Limited(Checkpoint):
    def __init__(self, path: Path) -> None:
        raise LimitError("index: too large")


# -- overlays ------------------------------------------------------------------------------------------------------


def test_an_overlay_is_a_file_per_layer(tmp_path):
    tensors = [(layer, (f"l.{layer}.{i}", "U8", (2,))) for layer in (0, 1) for i in range(3)]
    with writing_overlay(tmp_path / "o", tensors, metadata={"format": "pt"}) as writer:
        for _, (name, _, _) in reversed(tensors):
            writer.write(name, name.encode()[-2:])
    overlay = Overlay(tmp_path / "o")
    assert len(overlay.files) == 2 and overlay.metadata == {"format": "pt"}
    assert {n: bytes(overlay.read(n)) for n in overlay.tensors} == {n: n.encode()[-2:] for _, (n, _, _) in tensors}
    with (
        pytest.raises(ValueError, match="not written"),
        writing_overlay(tmp_path / "o", tensors, metadata={}, overwrite=True) as writer,
    ):
        writer.write("l.0.0", b"xx")
    assert len(Overlay(tmp_path / "o").tensors) == 6 and os.listdir(tmp_path) == ["o"], "the old one is still there"
    with pytest.raises(OutputError, match="exists already"), writing_overlay(tmp_path / "o", tensors, metadata={}):
        pass


def test_without_jobs_every_processor_works_unless_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeconv.plan import execute

    monkeypatch.setattr(execute.os, "sched_getaffinity", lambda _pid: set(range(48)))
    monkeypatch.setattr(execute, "free_memory", lambda: 64 << 30)
    assert execute.checked_jobs(None) == 48 and execute.checked_jobs(None, each=1 << 20) == 48
    assert execute.checked_jobs(None, each=4 << 30) == 8, "half of the free memory, divided by what a worker takes"
    assert execute.checked_jobs(None, each=100 << 30) == 1 and execute.checked_jobs(3, each=100 << 30) == 3
