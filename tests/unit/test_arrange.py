"""--shard-by: which tensors share a file, every source byte read once, and stock transformers loads the result."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter

import pytest
from tiny import hashes, make_dense, make_moe, read_tensors

from moeconv.checkpoint.output import OutputDirectory
from moeconv.checkpoint.reader import INDEX_NAME
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.errors import UsageError
from moeconv.families.model import open_model
from moeconv.plan import execute as execute_module
from moeconv.plan.execute import execute
from moeconv.prune.planner import plan_prune
from moeconv.quantize.planner import plan_quantize
from moeconv.upcycle.planner import plan_upcycle


@pytest.fixture
def dense(tmp_path):
    return open_model(make_dense(tmp_path / "dense", shards=2))


@pytest.fixture
def moe(tmp_path):
    return open_model(make_moe(tmp_path / "moe", "qwen2_moe", shards=2, hidden=64, intermediate=128))


def plans(dense, moe, **asked):
    return [
        (dense, plan_upcycle(dense, experts=3, **asked)),
        (dense, plan_upcycle(dense, experts=3, to="qwen2_moe", method="drop", **asked)),
        (moe, plan_prune(moe, keep=3, keep_experts={0: [0, 1, 3], 1: [1, 2, 3]}, **asked)),
        (moe, plan_quantize(moe, group_size="32", **asked)),
        (moe, plan_quantize(moe, format="bitsandbytes", **asked)),
    ]


@pytest.mark.parametrize("by", ["layer", "expert"])
@pytest.mark.parametrize("size", ["5GB", "9KB"])
def test_what_lies_together(dense, moe, tmp_path, by, size):
    for number, (model, plan) in enumerate(plans(dense, moe, shard_by=by, shard_size=size)):
        out = tmp_path / f"out{number}"
        execute(plan, source=model.checkpoint, out=out, jobs=2)
        written = open_model(out)
        groups: dict[str, set[int | None]] = {}
        for name, role in written.roles.items():
            groups.setdefault(written.checkpoint.tensors[name].shard, set()).add(getattr(role, by))
        assert all(len(numbers) == 1 for numbers in groups.values()), groups
        found = {number for numbers in groups.values() for number in numbers}
        assert found == {None, *range({"layer": 2, "expert": written.num_experts}[by])}
        if size == "5GB":
            assert len(groups) == len(found)
        assert sorted(groups) == [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        order = [min(-1 if n is None else n for n in groups[name]) for name in sorted(groups)]
        assert order == sorted(order)


@pytest.mark.slow
def test_the_tensors_are_those_of_shards_by_size(dense, moe, tmp_path):
    expected = [p.plan_id for _, p in plans(dense, moe)]
    for by in ("layer", "expert"):
        for number, (model, plan) in enumerate(plans(dense, moe, shard_by=by)):
            assert plan.plan_id != expected[number]
            execute(plan, source=model.checkpoint, out=tmp_path / f"{by}{number}")
    for number, (model, plan) in enumerate(plans(dense, moe)):
        execute(plan, source=model.checkpoint, out=tmp_path / f"size{number}")
        tensors = read_tensors(tmp_path / f"size{number}")
        assert read_tensors(tmp_path / f"layer{number}") == tensors == read_tensors(tmp_path / f"expert{number}")


def test_a_family_that_keeps_all_experts_in_one_tensor(dense):
    from moeconv.families.registry import tables

    packed = [
        name for name, family in tables().moe.items() if not any("{E}" in t for t in family.tensors.names.values())
    ]
    assert packed
    from moeconv.options import PlanOptions
    from moeconv.plan.arrange import arrange

    items = list(plan_upcycle(dense).items())
    with pytest.raises(UsageError, match="all experts of a layer in one tensor"):
        arrange(items, PlanOptions(shard_by="expert"), tables().moe[packed[0]])


@pytest.mark.parametrize("by", ["layer", "expert"])
def test_stock_transformers_loads_it(dense, tmp_path, by):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    logits = []
    for shard_by in ("size", by):
        out = tmp_path / shard_by
        execute(plan_upcycle(dense, experts=3, shard_by=shard_by), source=dense.checkpoint, out=out)
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        with torch.no_grad():
            logits.append(model(torch.arange(1, 20)[None]).logits)
    assert torch.equal(*logits)


def test_an_expert_parallel_rank_opens_its_own_shards_only(dense, tmp_path):
    """By the index alone: the files that hold expert 1 hold no other expert."""
    out = tmp_path / "out"
    execute(plan_upcycle(dense, experts=4, shard_by="expert"), source=dense.checkpoint, out=out)
    weight_map = json.loads((out / INDEX_NAME).read_text())["weight_map"]
    holding = {file for name, file in weight_map.items() if ".experts.1." in name}
    assert len(holding) == 1
    assert {n.split(".experts.")[1][0] for n, f in weight_map.items() if f in holding} == {"1"}


# -- one read ------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """How often each byte range of a source was read, while a test counts."""
    counted: Counter[tuple[str, int, int]] = Counter()
    lock, real = threading.Lock(), SafetensorsFile.read_into

    def read_into(self, name, view, *, start=0):
        with lock:
            counted[name, start, len(view)] += 1
        real(self, name, view, start=start)

    monkeypatch.setattr(SafetensorsFile, "read_into", read_into)
    return counted


@pytest.mark.parametrize("by", ["size", "layer", "expert"])
@pytest.mark.parametrize("jobs", [1, 3])
def test_every_source_byte_is_read_once(dense, tmp_path, reads, by, jobs):
    plan = plan_upcycle(dense, experts=6, shard_by=by)
    reads.clear()
    execute(plan, source=dense.checkpoint, out=tmp_path / "out", jobs=jobs)
    assert max(reads.values()) == 1 and sum(n for _, _, n in reads) == dense.checkpoint.nbytes


@pytest.mark.parametrize(("hold", "chunk"), [(0, 1000), (1 << 25, 1000), (5000, 700)])
@pytest.mark.parametrize("by", ["size", "expert"])
def test_bytes_do_not_depend_on_how_copies_are_made(dense, tmp_path, monkeypatch, hold, chunk, by):
    """Also where a tensor is too large to be held for its further copies."""
    from moeconv.plan import flow

    plan = plan_upcycle(dense, experts=11, shard_by=by)  # more experts than files of a fan
    execute(plan, source=dense.checkpoint, out=tmp_path / "expected")
    monkeypatch.setattr(execute_module, "HOLD", hold)
    monkeypatch.setattr(flow, "CHUNK", chunk)
    execute(plan, source=dense.checkpoint, out=tmp_path / "out", jobs=3)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


def test_a_shard_of_a_fan_that_another_part_is_writing(dense, tmp_path):
    plan = plan_upcycle(dense, experts=4, shard_by="expert")
    out, taken = tmp_path / "out", plan.shards[2].name
    execute(plan, source=dense.checkpoint, out=tmp_path / "expected")
    key = execute_module._resume_key(plan, dense.checkpoint, {})
    with OutputDirectory(out, key=key, shared=True) as other, other.shard_lock(taken) as mine:
        assert mine
        result = execute(plan, source=dense.checkpoint, out=out, part=(0, 1))
        assert not result.complete and set(result.files) == {s.name for s in plan.shards} - {taken}
        before = {p.name: p.stat().st_mtime_ns for p in other.staged.iterdir()}
    result = execute(plan, source=dense.checkpoint, out=out, part=(0, 1))
    assert result.complete and hashes(out) == hashes(tmp_path / "expected")
    assert before.items() <= {p.name: os.stat(p).st_mtime_ns for p in out.iterdir()}.items()
