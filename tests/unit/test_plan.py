"""Plans: packing into shards, sizes, ids, counts of parameters, the builders, and the promises that execute keeps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os

import pytest
from tiny import decode, edit_json, encode, hashes, make_dense, make_moe, read_tensors, write_shards

from moeconv.checkpoint.header import DTYPE_BITS
from moeconv.checkpoint.reader import INDEX_NAME, MANIFEST_NAME, Checkpoint
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.checkpoint.strictjson import canonical_json, parse_json
from moeconv.errors import CheckError, InputError, OutputError, UsageError
from moeconv.families.model import open_model
from moeconv.plan import execute as execute_module
from moeconv.plan import flow
from moeconv.plan.build import carry, count_params, pick_rows, rows, whole
from moeconv.plan.execute import execute
from moeconv.plan.plan import Input, Item, Plan, Shard, TensorSpec, pack_shards
from moeconv.plan.planned import planned_model
from moeconv.prune.planner import plan_prune
from moeconv.upcycle.planner import plan_upcycle


def item(name: str, nbytes: int, **keywords) -> Item:
    return Item((TensorSpec(name, "U8", (nbytes,), "ffn.up", nbytes),), **keywords)


def sizes(shards) -> list[list[int]]:
    return [[i.nbytes for i in shard.items] for shard in shards]


@pytest.fixture
def model(tmp_path):
    return open_model(make_dense(tmp_path / "source", shards=2))


# -- shards ------------------------------------------------------------------------------------------------------


def test_shards_are_filled_in_order_and_hold_what_fits():
    items = [item(f"t{i}", n) for i, n in enumerate([4, 4, 2, 9, 30, 1, 1])]
    assert sizes(pack_shards(items, shard_size=10)) == [[4, 4, 2], [9], [30], [1, 1]]
    assert sizes(pack_shards(items, shard_size=1)) == [[4], [4], [2], [9], [30], [1], [1]]
    assert sizes(pack_shards(items, shard_size=51)) == [[4, 4, 2, 9, 30, 1, 1]]


def test_shard_names_are_those_that_loaders_look_for():
    items = [item(f"t{i}", 1) for i in range(12)]
    assert [s.name for s in pack_shards(items)] == ["model.safetensors"]
    names = [s.name for s in pack_shards(items, shard_size=1)]
    assert names[0] == "model-00001-of-00012.safetensors" and names[-1] == "model-00012-of-00012.safetensors"
    assert names == sorted(names)


@pytest.mark.parametrize("size", [0, -5])
def test_a_shard_size_that_holds_nothing(size):
    with pytest.raises(UsageError, match="--shard-size"):
        pack_shards([item("a", 1)], shard_size=size)


def test_tensors_are_aligned_to_their_elements(tmp_path):
    dtypes = ["U8", "F64", "BF16", "F32", "I64", "U8", "F16"]
    specs = [TensorSpec(f"t{i}", d, (3,), "r.x", 3) for i, d in enumerate(dtypes)]
    shard = Shard("model.safetensors", tuple(Item((s,)) for s in specs))
    from moeconv.checkpoint.header import serialise_header

    header, infos = serialise_header((s.name, s.dtype, s.shape) for s in shard.layout())
    for info in infos.values():
        assert info.start % (DTYPE_BITS[info.dtype] // 8) == 0
    assert shard.nbytes == len(header) + sum(i.nbytes for i in shard.items)


# -- the plan's own numbers --------------------------------------------------------------------------------------


def test_the_id_depends_on_the_work_and_on_nothing_else(model, tmp_path):
    plan = plan_upcycle(model)
    assert plan_upcycle(open_model(model.checkpoint.path)).plan_id == plan.plan_id
    for change in (
        {"seed": 1},
        {"experts": 4},
        {"top_k": 1},
        {"shard_size": "1MB"},
        {"dtype": "float32"},
        {"to": "qwen2_moe"},
    ):
        assert plan_upcycle(model, **change).plan_id != plan.plan_id, change
    assert dataclasses.replace(plan, warnings=("x",), block={}).plan_id == plan.plan_id
    edit_json(model.checkpoint.path / "config.json", eos_token_id=3)
    assert plan_upcycle(open_model(model.checkpoint.path)).plan_id != plan.plan_id
    text = b"".join(plan.canonical())
    assert canonical_json(parse_json(text, what="plan")) == text


def test_largest_item_counts_what_a_kernel_holds():
    source = Input("x", "U8", (7,), 0, 7)
    items = (
        item("a", 100, inputs=(source,)),
        item("b", 5, kernel="cast", inputs=(source,)),
        item("c", 9, kernel="fill"),
    )
    plan = Plan("c", {}, "i", {}, (Shard("model.safetensors", items),), 0, 0)
    assert plan.largest_item == 12
    assert plan.tensors == 3


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_parameters_total_and_active(tmp_path, family):
    model = open_model(make_moe(tmp_path / "m", family, experts=4, top_k=1))
    count = {n: len(d) // 2 for n, (_, _, d) in read_tensors(model.checkpoint.path).items()}
    experts = sum(c for n, c in count.items() if ".experts." in n)
    total = sum(count.values())
    assert count_params(model) == (total, total - experts + experts // 4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_is_all_active(tmp_path, tied):
    model = open_model(make_dense(tmp_path / "m", tied=tied))
    total = sum(len(d) // 2 for _, _, d in read_tensors(model.checkpoint.path).values())
    assert count_params(model) == (total, total)


# -- builders ----------------------------------------------------------------------------------------------------

REF = TensorRef("w", "F32", (6, 5), "s", 100, 120)


def test_rows_are_byte_ranges():
    assert whole(REF) == Input("w", "F32", (6, 5), 0, 120)
    assert rows(REF, 2, 3) == Input("w", "F32", (3, 5), 40, 60)
    vector = TensorRef("b", "BF16", (6,), "s", 0, 12)
    assert rows(vector, 1, 2) == Input("b", "BF16", (2,), 2, 4)


@pytest.mark.parametrize("chosen", [[0], [5], [0, 1, 2, 3, 4, 5], [1, 3, 5], [0, 1, 4, 5], [3, 2, 1], [2, 2], []])
def test_picked_rows_join_neighbours_and_keep_the_order(chosen):
    ranges = pick_rows(REF, chosen)
    listed = [r for n in ranges for r in range(n.start // 20, (n.start + n.nbytes) // 20)]
    assert listed == chosen
    assert all(n.shape == (n.nbytes // 20, 5) for n in ranges)
    joints = itertools.pairwise(ranges)
    assert all(a.start + a.nbytes != b.start for a, b in joints)


def test_carry_casts_only_floats_that_have_another_dtype():
    assert carry(REF, role="ffn.up").kernel == "copy"
    assert carry(REF, role="ffn.up", dtype="F32").kernel == "copy"
    cast = carry(REF, role="ffn.up", dtype="BF16", name="v")
    assert (cast.kernel, cast.outputs[0].dtype, cast.outputs[0].name, cast.nbytes) == ("cast", "BF16", "v", 60)
    codes = TensorRef("c", "U8", (4,), "s", 0, 4)
    assert carry(codes, role="ffn.up", dtype="BF16").kernel == "copy"


# -- a plan as a model -------------------------------------------------------------------------------------------


def test_dtypes_that_differ_are_written_in_the_order_of_the_file(tmp_path, monkeypatch):
    """A file is hashed while it is written in order; what is not must be read back. Float32 tensors lie first in it,
    and in the midst of the source's layers."""
    source = make_moe(tmp_path / "moe", shards=2)
    tensors = read_tensors(source)
    for name in [name for name in tensors if ".gate." in name or "layernorm" in name]:
        dtype, shape, data = tensors[name]
        tensors[name] = ("F32", shape, encode(decode(data, dtype, shape), "F32"))
    write_shards(source, tensors, shards=2)
    read_back = []

    class Watched:
        def __getattr__(self, name):
            return getattr(os, name)

        def preadv(self, fd, buffers, at):
            read_back.append(at)
            return os.preadv(fd, buffers, at)

    monkeypatch.setattr("moeconv.checkpoint.blocks.os", Watched())
    monkeypatch.setattr("moeconv.checkpoint.blocks.BUFFER", 8192)  # far below a shard, as in real files
    model = open_model(source)
    plan = plan_prune(model, keep=2, keep_experts={0: [1, 3], 1: [0, 2]}, shard_size="50KB")
    assert len(plan.shards) > 1 and {s.dtype for shard in plan.shards for s in shard.layout()} == {"F32", "BF16"}
    execute(plan, source=model.checkpoint, out=tmp_path / "out")
    assert read_back == []
    name = "model.layers.1.input_layernorm.weight"
    assert read_tensors(tmp_path / "out")[name] == tensors[name]


def test_the_planned_model_is_the_one_that_gets_written(model, tmp_path):
    plan = plan_upcycle(model, shard_size="20KB")
    execute(plan, source=model.checkpoint, out=tmp_path / "out", jobs=1)
    planned, written = planned_model(plan), open_model(tmp_path / "out")
    assert {n: (r.dtype, r.shape, r.shard) for n, r in planned.checkpoint.tensors.items()} == {
        n: (r.dtype, r.shape, r.shard) for n, r in written.checkpoint.tensors.items()
    }
    assert planned.config == written.config and planned.roles == written.roles
    assert count_params(planned) == count_params(written) == (plan.params_total, plan.params_active)
    assert planned.checkpoint.shards == written.checkpoint.shards
    assert not hasattr(planned.checkpoint, "read")


# -- execute -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_was_planned(model, tmp_path):
    (model.checkpoint.path / "tokenizer.json").write_text("{}")
    plan = plan_upcycle(model, shard_size="20KB")
    result = execute(plan, source=model.checkpoint, out=tmp_path / "out")
    out = tmp_path / "out"
    assert result.complete and result.output == str(out) and os.listdir(tmp_path) == ["source", "out"]
    found = hashes(out)
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert {n: e["sha256"] for n, e in manifest["files"].items()} == dict(result.files)
    assert {n: h for n, h in found.items() if n != MANIFEST_NAME} == dict(result.files)
    assert {n: e["bytes"] for n, e in manifest["files"].items()} == {n: os.path.getsize(out / n) for n in result.files}
    assert plan.nbytes == sum(os.path.getsize(out / s.name) for s in plan.shards)
    assert len(plan.shards) > 2 and set(found) == {
        *(s.name for s in plan.shards), "config.json", INDEX_NAME, "tokenizer.json", MANIFEST_NAME,
    }  # fmt: skip
    index = json.loads((out / INDEX_NAME).read_text())
    tensors = read_tensors(out)
    assert index["metadata"]["total_size"] == sum(len(d) for _, _, d in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    step = manifest["steps"][-1]
    assert step["plan_id"] == plan.plan_id and step["source"] == model.identity and step["changed"] == plan.changed


def test_manifests_keep_the_history(tmp_path):
    from moeconv.prune.planner import plan_prune

    dense = open_model(make_dense(tmp_path / "dense"))
    execute(plan_upcycle(dense), source=dense.checkpoint, out=tmp_path / "moe")
    moe = open_model(tmp_path / "moe")
    execute(plan_prune(moe, keep=4), source=moe.checkpoint, out=tmp_path / "pruned")
    steps = Checkpoint(tmp_path / "pruned").manifest["steps"]
    assert [s["command"] for s in steps] == ["upcycle", "prune"]
    assert steps[1]["source"] == moe.identity


def test_nothing_in_the_output_tells_when_or_where(tmp_path):
    results = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        model = open_model(make_dense(tmp_path / place / "source"))
        execute(plan_upcycle(model), source=model.checkpoint, out=tmp_path / place / "out")
        results.append(hashes(tmp_path / place / "out"))
    assert results[0] == results[1]


@pytest.mark.parametrize("change", ["promise", "shape", "name"])
def test_a_broken_promise_fails_the_run_and_leaves_nothing(model, tmp_path, monkeypatch, change):
    plan = plan_upcycle(model)
    if change == "promise":
        plan = dataclasses.replace(plan, promise={**plan.promise, "expert": plan.promise["expert"] + 1})
    else:  # a writer that does not do what the plan says
        real = execute_module.ShardWriter

        def wrong(path, tensors, **keywords):
            made = [(n, d, s[::-1]) if change == "shape" else (n, d, s) for n, d, s in tensors]
            writer = real(path, made, **keywords)
            if change == "name":
                finish = writer.finish
                monkeypatch.setattr(writer, "finish", lambda: _rename_tensor(path, finish()))
            return writer

        monkeypatch.setattr(execute_module, "ShardWriter", wrong)
    with pytest.raises(CheckError, match="plan"):
        execute(plan, source=model.checkpoint, out=tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def _rename_tensor(path, finished):
    path.write_bytes(path.read_bytes().replace(b'"lm_head.weight"', b'"LM_head.weight"', 1))
    return finished


def test_a_kernel_that_makes_too_few_bytes_is_caught(model, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "load_kernel", lambda _name: lambda _inputs, _outputs, _params: [b"123"])
    with pytest.raises(CheckError, match="made 3 bytes"):
        execute(plan_upcycle(model), source=model.checkpoint, out=tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_values_that_overflow_the_output_dtype_are_caught(tmp_path):
    model = open_model(make_dense(tmp_path / "source", dtype="F32"))
    plan = plan_upcycle(model, dtype="float16", router_std=1e6)
    with pytest.raises(CheckError, match="NaN or infinite") as caught:
        execute(plan, source=model.checkpoint, out=tmp_path / "out")
    assert "--dtype" in caught.value.hint and os.listdir(tmp_path) == ["source"]


def test_the_check_sees_the_staged_directory_and_can_refuse_it(model, tmp_path):
    def refuse(staged):
        assert open_model(staged).num_experts == 8 and not (tmp_path / "out").exists()
        raise CheckError("no")

    with pytest.raises(CheckError, match="no"):
        execute(plan_upcycle(model), source=model.checkpoint, out=tmp_path / "out", check=refuse)
    assert os.listdir(tmp_path) == ["source"]
    result = execute(plan_upcycle(model), source=model.checkpoint, out=tmp_path / "out", check=lambda _staged: {"a": 1})
    assert result.extra == {"a": 1}


def test_disk_space_is_looked_at_before_writing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(execute_module.OutputDirectory, "free_bytes", lambda _self: 1000)
    with pytest.raises(OutputError, match="1000 are free"):
        execute(plan_upcycle(model), source=model.checkpoint, out=tmp_path / "out")


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs_below_one(model, tmp_path, jobs):
    with pytest.raises(UsageError, match="--jobs"):
        execute(plan_upcycle(model), source=model.checkpoint, out=tmp_path / "out", jobs=jobs)


def test_a_companion_that_cannot_come_along_is_named_before_the_work(model, tmp_path, monkeypatch):
    (model.checkpoint.path / "tokenizer.json").symlink_to("/etc/hostname")
    monkeypatch.setattr(execute_module, "_write_shards", lambda *_a, **_k: pytest.fail("too late"))
    with pytest.raises(InputError, match=r"tokenizer\.json is a link"):
        execute(plan_upcycle(model), source=model.checkpoint, out=tmp_path / "out")


def test_the_meter_hears_of_every_byte(model, tmp_path):
    class Counting:
        total = done = shards = finished = 0

        def start(self, *, total_bytes, parts, unit="shard"):
            self.total, self.shards = total_bytes, parts

        def advance(self, nbytes):
            self.done += nbytes

        def part_done(self):
            self.finished += 1

        def note(self, text):
            pass

    meter = Counting()
    plan = plan_upcycle(model, shard_size="20KB")
    execute(plan, source=model.checkpoint, out=tmp_path / "out", jobs=1, meter=meter)
    assert meter.done == meter.total == sum(i.nbytes for i in plan.items())
    assert meter.finished == meter.shards == len(plan.shards)


def test_a_chain_needs_what_its_kernels_need():
    from moeconv.plan.kernels import needs_torch

    decode, cast = {"kernel": "decode", "params": {}}, {"kernel": "cast", "params": {}}
    assert not needs_torch("cast", {}) and needs_torch("decode", {}) and needs_torch("other:kernel", {})
    assert needs_torch("chain", {"first": decode, "then": cast}) and not needs_torch(
        "chain", {"first": cast, "then": cast}
    )
    assert needs_torch("gather", {"firsts": [{"first": cast}, {"first": decode}], "then": cast})
