"""Checkpoint: index against headers, byte ranges, links, companions and the two fingerprints."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import edit_json, make_dense, make_moe, read_tensors, safetensors_bytes

from moeconv.checkpoint.artifact import artifact_metadata, read_metadata_json
from moeconv.checkpoint.companions import find_companions
from moeconv.checkpoint.reader import INDEX_NAME, MANIFEST_NAME, SINGLE_NAME, Checkpoint
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.errors import InputError
from moeconv.families.model import open_model


@pytest.fixture
def source(tmp_path):
    return make_dense(tmp_path / "source", shards=3)


def rewrite_index(path, change):
    index = json.loads((path / INDEX_NAME).read_text())
    change(index)
    (path / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_tensors_and_their_bytes(tmp_path, shards):
    path = make_dense(tmp_path / "source", shards=shards)
    checkpoint, expected = Checkpoint(path), read_tensors(path)
    assert len(checkpoint.shards) == shards and set(checkpoint.tensors) == set(expected)
    for name, (dtype, shape, data) in expected.items():
        ref = checkpoint.tensors[name]
        assert (ref.dtype, ref.shape, ref.nbytes) == (dtype, shape, len(data))
        assert checkpoint.read(name) == data
        assert checkpoint.read(name, start=3, length=5) == data[3:8]
        assert checkpoint.read(name, start=len(data)) == b""
    assert checkpoint.nbytes == sum(len(data) for _, _, data in expected.values())


def test_a_range_outside_the_tensor_is_a_bug_of_the_caller(source):
    checkpoint = Checkpoint(source)
    name = next(iter(checkpoint.tensors))
    size = checkpoint.tensors[name].nbytes
    for start, length in ((0, size + 1), (size, 1), (-1, 1)):
        with pytest.raises(ValueError, match="outside tensor"):
            checkpoint.read(name, start=start, length=length)


def test_reads_from_many_threads(source):
    checkpoint, expected = Checkpoint(source), read_tensors(source)
    with ThreadPoolExecutor(8) as pool:
        names = list(expected) * 5
        for name, data in zip(names, pool.map(checkpoint.read, names), strict=True):
            assert data == expected[name][2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.pop("weight_map"), "must map tensor names"),
        (lambda index: index.update(weight_map=[]), "must map tensor names"),
        (lambda index: index.update(weight_map={}), "is empty"),
        (lambda index: index["weight_map"].update({"lm_head.weight": 3}), "must map tensor names"),
        (lambda index: index["weight_map"].pop("lm_head.weight"), "does not name it"),
        (lambda index: index["weight_map"].update({"ghost": "model-00001-of-00003.safetensors"}), "does not hold it"),
        (
            lambda index: index["weight_map"].update({"lm_head.weight": "model-00002-of-00003.safetensors"}),
            "places it in",
        ),
        (lambda index: index["weight_map"].update({"ghost": "gone.safetensors"}), r"gone\.safetensors is missing"),
        (lambda index: index["weight_map"].update({"ghost": "weights.bin"}), "not a .safetensors file"),
    ],
)
def test_an_index_that_contradicts_the_shards(source, change, says):
    rewrite_index(source, change)
    with pytest.raises(InputError, match=says):
        Checkpoint(source)


def test_a_tensor_in_two_shards(source):
    shards = Checkpoint(source).shards
    shutil.copy(source / shards[0], source / shards[1])
    with pytest.raises(InputError, match="places it in"):
        Checkpoint(source)


def test_shards_that_the_index_does_not_name_are_left_out_with_a_warning(source):
    (source / "extra.safetensors").write_bytes(safetensors_bytes({"x": ("F32", (1,), bytes(4))}))
    checkpoint = Checkpoint(source)
    assert "x" not in checkpoint.tensors
    assert any("extra.safetensors" in text for text in checkpoint.warnings)


def test_a_file_that_changes_after_opening(source):
    checkpoint = Checkpoint(source)
    name = next(iter(checkpoint.tensors))
    shard = source / checkpoint.tensors[name].shard
    shard.write_bytes(shard.read_bytes())
    os.utime(shard, ns=(0, 0))
    with pytest.raises(InputError, match="changed while it was being read"):
        checkpoint.read(name)


def test_what_is_no_checkpoint(tmp_path):
    for path, says in (("gone", "does not exist"), ("x" * 5000, "does not exist"), ("file", "not a directory")):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=says):
            Checkpoint(tmp_path / path)
    with pytest.raises(InputError, match=r"config\.json is missing"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has neither"):
        Checkpoint(tmp_path)
    (tmp_path / "m.gguf").write_text("")
    with pytest.raises(InputError, match="GGUF"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(InputError, match="pickled") as caught:
        Checkpoint(tmp_path)
    assert "safe_serialization" in caught.value.hint


# -- links -------------------------------------------------------------------------------------------------------


def move_out(file, folder):
    folder.mkdir(exist_ok=True)
    shutil.move(file, folder / file.name)
    file.symlink_to(folder / file.name)


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "model-00002-of-00003.safetensors", "tokenizer.json"])
def test_links_that_leave_the_directory(source, tmp_path, name):
    (source / "tokenizer.json").write_text("{}")
    move_out(source / name, tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leaves the checkpoint's directory"):
        find_companions(Checkpoint(source))


def test_links_within_the_directory_and_to_the_directory_are_followed(source, tmp_path):
    shard = Checkpoint(source).shards[0]
    move_out(source / shard, source / "blobs")
    (tmp_path / "link").symlink_to(source)
    for path in (source, tmp_path / "link"):
        checkpoint = Checkpoint(path)
        assert checkpoint.read("model.embed_tokens.weight")


def test_a_hub_cache_may_link_to_its_own_blobs_only(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = make_dense(repository / "snapshots" / "abc")
    move_out(snapshot / SINGLE_NAME, repository / "blobs")
    assert Checkpoint(snapshot).tensors
    move_out(snapshot / "config.json", tmp_path / "models--c--d")
    with pytest.raises(InputError, match="leaves"):
        Checkpoint(snapshot)


def test_what_is_not_a_regular_file(source):
    shard = source / Checkpoint(source).shards[1]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(InputError, match="not a regular file"):
        Checkpoint(source)


# -- fingerprints ------------------------------------------------------------------------------------------------


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_identity_belongs_to_the_content_not_to_the_place(source, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(source, copied)
    os.utime(copied / "config.json", ns=(0, 0))
    first = open_model(source).identity
    assert open_model(copied).identity == first
    assert Checkpoint(copied).resume_state() != Checkpoint(source).resume_state()
    flip(copied / Checkpoint(copied).shards[1], -1 + os.path.getsize(copied / Checkpoint(copied).shards[1]))
    assert open_model(copied).identity != first


def test_identity_sees_config_and_header_and_every_router_byte(tmp_path):
    path = make_moe(tmp_path / "moe", hidden=256, intermediate=512, vocab=256, layers=1)
    before = open_model(path).identity
    edit_json(path / "config.json", rope_theta=5.0)
    changed = open_model(path).identity
    assert changed != before
    model = open_model(path)
    ref = model.checkpoint.tensors[model.router_name(0)]
    for offset in range(0, ref.nbytes, 97):  # samples of 4 KiB could miss it
        flip(path / ref.shard, ref.start + offset)
        assert open_model(path).identity != changed
        flip(path / ref.shard, ref.start + offset)
    assert open_model(path).identity == changed


def test_identity_is_the_manifest_while_its_sizes_fit(source):
    plain = Checkpoint(source).identity()
    shards = Checkpoint(source).shards
    files = {s: {"bytes": os.path.getsize(source / s), "sha256": "0"} for s in shards}
    (source / MANIFEST_NAME).write_text(json.dumps({"files": files}))
    with_manifest = Checkpoint(source).identity()
    assert with_manifest != plain
    files[shards[0]]["bytes"] += 1
    (source / MANIFEST_NAME).write_text(json.dumps({"files": files}))
    assert Checkpoint(source).identity() == plain
    for wrong in ({}, {"files": []}, {"files": {shards[0]: 1}}):
        (source / MANIFEST_NAME).write_text(json.dumps(wrong))
        assert Checkpoint(source).identity() == plain


# -- artifacts ---------------------------------------------------------------------------------------------------


def test_artifact_metadata_round_trip(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(safetensors_bytes({}, **artifact_metadata("statistics", tokens=5, name="é")))
    assert read_metadata_json(SafetensorsFile(file), kind="statistics") == {
        "kind": "statistics", "tokens": 5, "name": "é",
    }  # fmt: skip
    with pytest.raises(InputError, match="not a moeconv overlay"):
        read_metadata_json(SafetensorsFile(file), kind="overlay")
    file.write_bytes(safetensors_bytes({}, moeconv="[]"))
    with pytest.raises(InputError, match="not a moeconv statistics"):
        read_metadata_json(SafetensorsFile(file), kind="statistics")
