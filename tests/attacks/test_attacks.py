"""Bad input through the command line: the right exit code, a sentence that helps, nothing left on disk."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import (
    Tensors,
    edit_json,
    encode,
    hashes,
    make_dense,
    make_moe,
    read_tensors,
    safetensors_bytes,
    with_header,
    write_shards,
)

from moeconv.checkpoint.reader import INDEX_NAME, MANIFEST_NAME, SINGLE_NAME
from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.upcycle.planner import plan_upcycle

Ruin = Callable[[Path], None]


@pytest.fixture
def refused(cli, tmp_path, left_over):
    """`refused(3, "says", "upcycle", source, out)`: the command fails so, and the disk is as it was before."""

    def check(code: int, says: str, *words: object):
        before = (left_over(tmp_path), hashes(tmp_path))
        outcome = cli(*words)
        assert outcome.code == code, outcome
        lines = outcome.err.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("moeconv: "))
        assert says in lines[at], outcome.err
        assert len(lines) <= at + 2 and all(line.isprintable() for line in lines), outcome.err
        assert "Traceback" not in outcome.err and "bug of moeconv" not in outcome.err and outcome.out == ""
        assert (left_over(tmp_path), hashes(tmp_path)) == before
        return outcome

    return check


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def index_entry(file: str, tensor: str = "ghost") -> Ruin:
    """The index says that `tensor` lies in `file`."""

    def ruin(path: Path) -> None:
        index = json.loads((path / INDEX_NAME).read_text())
        index["weight_map"][tensor] = file
        (path / INDEX_NAME).write_text(json.dumps(index))

    return ruin


def text(name: str, old: str, new: str) -> Ruin:
    def ruin(path: Path) -> None:
        content = (path / name).read_text()
        assert old in content
        (path / name).write_text(content.replace(old, new, 1))

    return ruin


def config(*, drop: tuple[str, ...] = (), **changes: Any) -> Ruin:
    return lambda path: edit_json(path / "config.json", drop=drop, **changes)


def tensors(change: Callable[[Tensors], Any]) -> Ruin:
    """The first shard's tensors changed, and written again."""

    def ruin(path: Path) -> None:
        everything = read_tensors(path)
        change(everything)
        for name in os.listdir(path):
            if "safetensors" in name:
                (path / name).unlink()
        write_shards(path, everything)

    return ruin


def header(change: Callable[[bytes], bytes]) -> Ruin:
    """The JSON of the first shard's header changed, with its length made to fit."""

    def ruin(path: Path) -> None:
        shard = min(path.glob("*.safetensors"))
        data = shard.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        shard.write_bytes(with_header(change(data[8 : 8 + length]), data[8 + length :]))

    return ruin


def linked(name: str, target: str) -> Ruin:
    """A file of the checkpoint moved to `target` and replaced by a link to it."""

    def ruin(path: Path) -> None:
        place = Path(os.path.normpath(path / target))
        place.parent.mkdir(exist_ok=True)
        shutil.move(path / name, place)
        (path / name).symlink_to(target)

    return ruin


def pickled(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR.")


def gone(name: str) -> Ruin:
    return lambda path: (path / name).unlink()


def written(name: str, content: str | bytes) -> Ruin:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 12345\n"
UP, ONE = "model.layers.0.mlp.up_proj.weight", ("F32", (1,), bytes(4))
NESTED = '{"a":' * 100_000
OFFSETS = b'"data_offsets": [0, 4096]'

# what is wrong -> (what was done to a good checkpoint of three shards, words of the message)
BAD: dict[str, tuple[Ruin, str]] = {
    "a shard is missing": (gone(SECOND), f"{SECOND} is missing"),
    "config is missing": (gone("config.json"), "config.json is missing"),
    "the index is missing": (gone(INDEX_NAME), "without an index"),
    "a shard is empty": (written(SECOND, b""), "too short"),
    "a shard is a Git LFS pointer": (written(SECOND, LFS), "the header claims"),
    "a shard is a web page": (written(SECOND, "<!DOCTYPE html><html><body>404</body></html>"), "the header claims"),
    "a shard is another's copy": (lambda p: shutil.copy(p / FIRST, p / SECOND), "the index places it in"),
    "config is no JSON": (written("config.json", "{'a': 1}"), "not valid JSON"),
    "config is no object": (written("config.json", "[]"), "expected a JSON object"),
    "config is no UTF-8": (written("config.json", b'{"a": "\xff"}'), "not valid JSON"),
    "config is nested without end": (written("config.json", NESTED), "nested too deeply"),
    "config says a key twice": (text("config.json", "{", '{"hidden_size": 64,'), "duplicate key 'hidden_size'"),
    "config holds NaN": (text("config.json", "1e-06", "NaN"), "rms_norm_eps must be a number, found nan"),
    "config holds infinity": (text("config.json", "1e-06", "1e999"), "rms_norm_eps must be a number, found inf"),
    "config holds half a character": (text("config.json", '"silu"', '"\\ud83d"'), "surrogates not allowed"),
    "index says a key twice": (text(INDEX_NAME, '_map": {', '_map": {"x": "", "x": "",'), "duplicate key"),
    "index names a parent's file": (index_entry("../x.safetensors"), "not a plain file name"),
    "index names an absolute path": (index_entry("/etc/passwd"), "not a plain file name"),
    "index names a file in a folder": (index_entry("a/x.safetensors"), "not a plain file name"),
    "index names a Windows path": (index_entry("..\\x.safetensors"), "not a plain file name"),
    "index names NUL": (index_entry("x\0.safetensors"), "not a plain file name"),
    "index names the directory": (index_entry(".."), "not a plain file name"),
    "index names nothing": (index_entry(""), "not a plain file name"),
    "index names terminal codes": (index_entry("\x1b[2J.safetensors"), "not a plain file name"),
    "index names a very long file": (index_entry("x" * 300 + ".safetensors"), "File name too long"),
    "index names a pickle": (index_entry("x.bin"), "not a .safetensors file"),
    "index names config": (index_entry("config.json"), "not a .safetensors file"),
    "index names no string": (text(INDEX_NAME, f'"{FIRST}"', "5"), "must map tensor names"),
    "index forgets a tensor": (lambda p: _forget(p), "does not name it"),
    "index invents a tensor": (index_entry(FIRST, "model.extra"), "does not hold it"),
    "a shard links out": (linked(SECOND, "../other/x.safetensors"), "leaves the checkpoint's directory"),
    "config links out": (linked("config.json", "../other/config.json"), "leaves the checkpoint's directory"),
    "the index links out": (linked(INDEX_NAME, "../other/index.json"), "leaves the checkpoint's directory"),
    "only pickles": (pickled, "pickled weights"),
    "offsets overlap": (header(lambda h: h.replace(OFFSETS, b'"data_offsets": [0, 4097]')), "takes 4096 bytes"),
    "offsets leave a gap": (header(lambda h: h.replace(OFFSETS, b'"data_offsets": [1, 4097]')), "leaves a gap"),
    "offsets run backwards": (header(lambda h: h.replace(OFFSETS, b'"data_offsets": [4096, 0]')), "takes 4096 bytes"),
    "a tensor twice": (header(lambda h: h.replace(b"{", b'{"__metadata__": {},', 1)), "duplicate key"),
    "an unknown dtype": (header(lambda h: h.replace(b'"BF16"', b'"BF17"', 1)), "unknown dtype"),
    "a negative shape": (header(lambda h: h.replace(b"[64, 32]", b"[-64, -32]", 1)), "shape must be"),
    "a shape beyond all disks": (header(lambda h: h.replace(b"[64", b"[" + b"9" * 4000, 1)), "shape must be"),
    "the header is no JSON": (header(lambda h: h[:-1]), "not valid JSON"),
    "a header of a terabyte": (written(FIRST, struct.pack("<Q", 1 << 40) + bytes(100)), "the header claims"),
    "a header of 2^64": (written(FIRST, b"\xff" * 8 + bytes(100)), "the header claims"),
    "trailing bytes": (lambda p: (p / FIRST).write_bytes((p / FIRST).read_bytes() + b"x"), "the file has"),
    "too few layers": (config(num_hidden_layers=1), "is not part of a llama model"),
    "too many layers": (config(num_hidden_layers=3), "is missing from the checkpoint"),
    "a billion layers": (config(num_hidden_layers=10**9), "from 1 to 4096"),
    "four thousand layers": (config(num_hidden_layers=4000), "4000 layers"),
    "layers in words": (config(num_hidden_layers="two"), "must be a whole number"),
    "no hidden size": (config(drop=("hidden_size",)), "hidden_size must be a whole number"),
    "another hidden size": (config(hidden_size=64), "config.json requires [64, 64]"),
    "another width": (config(intermediate_size=65), "config.json requires [65, 32]"),
    "a width of zero": (config(intermediate_size=0), "intermediate_size must be a whole number"),
    "a width that is true": (config(intermediate_size=True), "intermediate_size must be a whole number"),
    "another family": (config(model_type="mixtral"), "num_local_experts or num_experts must be"),
    "another dense family": (config(model_type="qwen2"), "q_proj.bias' is missing"),
    "a tensor too many": (tensors(lambda t: t.update({"\x1b[2Jx": ONE})), "'\\\\x1b[2Jx' is not part of"),
    "a tensor too few": (tensors(lambda t: t.pop("model.norm.weight")), "'model.norm.weight' is missing"),
    "no head": (tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    "a matrix of another rank": (tensors(lambda t: t.update({UP: ("BF16", (2048,), bytes(4096))})), "has shape [2048]"),
}  # fmt: skip


def _forget(path: Path) -> None:
    index = json.loads((path / INDEX_NAME).read_text())
    del index["weight_map"]["model.norm.weight"]
    (path / INDEX_NAME).write_text(json.dumps(index))


UNKNOWN: dict[str, tuple[Ruin, str]] = {
    "an unknown architecture": (config(model_type="gpt\x1b[31m"), "unknown architecture: model_type 'gpt\\\\x1b[31m'"),
    "no architecture": (config(drop=("model_type",)), "unknown architecture"),
    "an architecture that is a list": (config(model_type=["llama"]), "unknown architecture"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_architectures_are_looked_at_and_not_taken(cli, refused, tmp_path, out, what):
    ruin, says = UNKNOWN[what]
    source = make_dense(tmp_path / "source", shards=3)
    ruin(source)
    refused(3, says, "upcycle", source, out, "--no-check")
    for command in ("inspect", "verify"):
        outcome = cli(command, source)
        assert outcome.code == 0 and says in outcome.err, outcome
        assert all(line.isprintable() for line in (outcome.out + outcome.err).splitlines()), outcome


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoints(refused, tmp_path, out, what):
    ruin, says = BAD[what]
    source = make_dense(tmp_path / "source", shards=3)
    ruin(source)
    refused(3, says, "inspect", source)
    outcome = refused(3, says, "upcycle", source, out, "--no-check")
    assert outcome.err.splitlines()[-1].startswith("  "), "a hint"
    assert not (tmp_path / "pwned").exists() and not Path("pwned").exists()


@pytest.mark.parametrize("what", ["a shard is missing", "index names a parent's file", "only pickles", "another width"])
def test_bad_checkpoints_through_a_process_of_its_own(command, left_over, tmp_path, out, what):
    ruin, says = BAD[what]
    source = make_dense(tmp_path / "source", shards=3)
    ruin(source)
    outcome = command("upcycle", source, out, "--no-check")
    assert (outcome.code, outcome.out) == (3, "") and says in outcome.err and "Traceback" not in outcome.err
    assert left_over(tmp_path) == []


def test_the_bad_checkpoints_were_good_before(cli, tmp_path, out):
    source = make_dense(tmp_path / "source", shards=3)
    assert cli("inspect", source).code == 0
    assert cli("upcycle", source, out, "--no-check").code == 0
    assert cli("verify", out, "--source", source).code == 0


MOE_BAD: dict[str, tuple[str, Ruin, str]] = {
    "counts that contradict each other": ("mixtral", config(num_experts=5), "contradicts itself"),
    "more experts than there are": (
        "mixtral",
        config(num_experts=5, num_local_experts=5),
        "experts.4.w1.weight' is missing",
    ),
    "fewer experts than there are": ("mixtral", config(num_experts=3, num_local_experts=3), "is not part of a mixtral"),
    "a million experts": ("mixtral", config(num_experts=10**6, num_local_experts=10**6), "from 1 to 65536"),
    "65536 experts": ("mixtral", config(num_experts=65536, num_local_experts=65536), "of 65536 experts"),
    "no top-k": ("qwen3_moe", config(num_experts_per_tok=0), "num_experts_per_tok must be"),
    "a layer both ways": ("qwen3_moe", config(mlp_only_layers=[1]), "although config.json makes layer 1 dense"),
    "dense layers in words": ("qwen3_moe", config(mlp_only_layers="none"), "must be a list, found none"),
    "dense layers in lists": ("qwen3_moe", config(mlp_only_layers=[[0]]), "must be a list of layer numbers"),
    "a step of zero": ("qwen3_moe", config(decoder_sparse_step=0), "must be a positive whole number"),
    "another expert width": ("qwen2_moe", config(moe_intermediate_size=33), "config.json requires [33, 32]"),
    "another shared width": ("qwen2_moe", config(shared_expert_intermediate_size=1), "config.json requires [1, 32]"),
}


@pytest.mark.parametrize("what", MOE_BAD)
def test_bad_mixtures(refused, tmp_path, out, what):
    family, ruin, says = MOE_BAD[what]
    source = make_moe(tmp_path / "source", family)
    ruin(source)
    if what == "no top-k":  # only what needs it asks for it
        refused(3, says, "inspect", source)
    refused(3, says, "prune", source, out, "--keep", 2)
    refused(3, says, "quantize", source, out, "--group-size", 32, "--dry-run")


def test_a_shard_cut_at_any_byte(refused, tmp_path, out):
    source = make_dense(tmp_path / "source", layers=1)
    whole = (source / SINGLE_NAME).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    cuts = {
        0,
        1,
        7,
        8,
        9,
        8 + length // 2,
        7 + length,
        8 + length,
        9 + length,
        len(whole) - 1,
        *range(0, len(whole), 1999),
    }
    for cut in sorted(cuts):
        (source / SINGLE_NAME).write_bytes(whole[:cut])
        refused(3, "model.safetensors", "inspect", source)
    assert "truncated" in refused(3, "tensors end at byte", "upcycle", source, out, "--no-check").err


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_shard_cut_while_it_is_read(tmp_path, out, left_over, jobs):
    source = make_dense(tmp_path / "source", shards=3)
    model = open_model(source)
    plan = plan_upcycle(model, shard_size="4KB")
    os.truncate(source / SECOND, os.path.getsize(source / SECOND) - 1)
    with pytest.raises(InputError, match="changed while it was being read"):
        execute(plan, source=model.checkpoint, out=out, jobs=jobs)
    assert left_over(tmp_path) == []


def test_what_is_no_checkpoint_at_all(refused, tmp_path, out):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for source, says in (
        ("gone", "does not exist"),
        ("file", "not a directory"),
        ("folder", "config.json is missing"),
        ("x" * 5000, "does not exist"),
    ):
        refused(3, says, "upcycle", tmp_path / source, out)
    refused(2, "is not hf://", "inspect", "hf://nobody")


# -- the output ----------------------------------------------------------------------------------------------------


def test_an_output_that_exists(refused, tmp_path, out):
    source = make_dense(tmp_path / "source")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    out.mkdir()
    (out / "precious").write_text("precious")
    for words in ([], ["--dry-run"]):
        refused(4, "exists already", "upcycle", source, out, "--no-check", *words)
        for name, says in (("file", "not a directory"), ("link", "symbolic link"), ("dangling", "symbolic link")):
            refused(4, says, "upcycle", source, tmp_path / name, "--no-check", *words)
            refused(4, says, "upcycle", source, tmp_path / name, "--no-check", "--overwrite", *words)
        refused(4, "does not exist", "upcycle", source, tmp_path / "gone" / "out", "--no-check", *words)
    refused(4, "cannot write", "upcycle", source, "/proc/out", "--no-check")
    refused(4, "File name too long", "upcycle", source, tmp_path / ("o" * 250), "--no-check")
    refused(4, "File name too long", "upcycle", source, tmp_path / ("o" * 300), "--no-check")


def test_an_output_that_shares_a_directory_with_the_source(refused, tmp_path):
    (tmp_path / "deep").mkdir()
    source = make_dense(tmp_path / "deep" / "source")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "deep-link").symlink_to(tmp_path / "deep")
    for where in (
        source, source / "out", tmp_path / "deep", tmp_path, tmp_path / "link", tmp_path / "link" / "out",
        tmp_path / "deep-link" / "source", f"{source}/../source", f"{source}/.", "/",
    ):  # fmt: skip
        for given in (source, tmp_path / "link"):
            refused(4, "SOURCE", "upcycle", given, where, "--no-check", "--overwrite")
            refused(4, "SOURCE", "upcycle", given, where, "--dry-run")


# -- values --------------------------------------------------------------------------------------------------------

VALUES = {"NaN": np.nan, "infinity": np.inf, "minus infinity": -np.inf}
PLACES = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"]


def poison(path: Path, name: str, value: float, *, dtype: str = "BF16") -> None:
    everything = read_tensors(path)
    array = np.full(everything[name][1], 0.5, np.float32)
    array.flat[-1] = value
    everything[name] = (dtype, everything[name][1], encode(array, dtype))
    write_shards(path, everything)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("words", [[], ["--dtype", "float32"], ["--method", "drop"]])
def test_a_weight_that_is_no_number(cli, refused, tmp_path, out, value, place, words):
    source = make_dense(tmp_path / "source")
    poison(source, place, VALUES[value])
    refused(3, f"tensor '{place}' holds NaN or infinite", "upcycle", source, out, "--no-check", "--strict", *words)
    outcome = cli("upcycle", source, out, "--no-check", "--json", *words)
    assert outcome.code == 0
    assert [w for w in outcome.json["warnings"] if f"'{place}' holds NaN" in w] and "warning: tensor" in outcome.err
    assert cli("verify", out).code == 0


@pytest.mark.slow
def test_a_resumed_run_is_as_strict_as_one_that_was_not(cli, refused, tmp_path, out, monkeypatch):
    source = make_dense(tmp_path / "source")
    poison(source, PLACES[0], np.nan)
    words = ("upcycle", source, out, "--no-check", "--shard-size", "4KB", "--jobs", 1)
    with monkeypatch.context() as patch:  # all shards are finished, then the disk is full
        patch.setattr("moeconv.plan.execute.write_file", _full_disk)
        assert cli(*words).code == 4
    assert not out.exists()
    outcome = cli(*words, "--strict")
    assert outcome.code == 3 and "holds NaN" in outcome.err
    with monkeypatch.context() as patch:
        patch.setattr("moeconv.plan.execute.write_file", _full_disk)
        assert cli(*words).code == 4
    outcome = cli(*words, "--json")
    assert outcome.code == 0 and [w for w in outcome.json["warnings"] if "holds NaN" in w]


def _full_disk(path, data):
    from moeconv.checkpoint.writer import output_errors

    with output_errors(path):
        raise OSError(28, "No space left on device")


def test_pruning_by_weights_that_are_no_numbers(refused, tmp_path, out):
    source = make_moe(tmp_path / "source")
    poison(source, "model.layers.0.block_sparse_moe.experts.2.w2.weight", np.nan)
    refused(3, "expert 2 of layer 0 has NaN", "prune", source, out, "--keep", 2)


# -- usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--experts", "2", "--top-k", "3"], "--top-k 3 must be from 1 to"), (["--experts", "0"], "--experts 0"),
        (["--experts", "many"], "'--experts'"), (["--method", "cpoy"], "--method cpoy"),
        (["--layers", "5"], "outside layers 0 to 1"), (["--shard-size", "0"], "--shard-size"),
        (["--shard-size", "9" * 400], "too large"), (["--jobs", "0"], "--jobs 0"),
        (["--jobs", "-1"], "--jobs -1"), (["--part", "2/2"], "--part 2/2"), (["--part", "\x1b[2J"], "--part \\x1b[2J"),
        (["--dtype", "int3"], "--dtype int3"), (["--router-std", "nan"], "--router-std"), (["--topk", "2"], "--topk"),
        (["--to", "\x1b[31mred"], "\\x1b[31mred"), (["--jobs", "0", "--dry-run"], "--jobs 0"),
        (["--drop-ratio", "0.2"], "--method copy does not use --drop-ratio"),
        (["--method", "drop", "--noise-scale", "0.2"], "--method drop does not use --noise-scale"),
        (["--stats", "nofile"], "does not use --stats"), (["--data", "nofile"], "does not use --data"),
    ],
)  # fmt: skip
def test_wrong_words(refused, cli, tmp_path, out, words, says):
    source = make_dense(tmp_path / "source")
    code = 3 if "--to" in words else 2
    refused(code, says, "upcycle", source, out, "--no-check", *words)
    outcome = cli("upcycle", source, out, "--no-check", "--json", *words)
    assert outcome.code == code and outcome.json["error"]["code"] == code and says in outcome.json["error"]["message"]


def test_commands_nobody_knows(refused, cli, tmp_path):
    source = make_dense(tmp_path / "source")
    refused(2, "No such command", "upcyle", source)
    refused(2, "Missing argument", "upcycle", source)
    refused(2, "unexpected extra argument", "inspect", source, source)
    refused(2, "exactly one of --keep", "prune", make_moe(tmp_path / "moe"), tmp_path / "out")
    refused(2, "needs statistics", "prune", tmp_path / "moe", tmp_path / "out", "--keep", 2, "--criterion", "reap")
    refused(2, "2, 3 or more times", "upcycle", tmp_path / "moe", tmp_path / "out", "--experts", 5)
    refused(3, "no experts to prune", "prune", source, tmp_path / "out", "--keep", 2)
    refused(3, "no experts to quantize", "quantize", source, tmp_path / "out")
    assert json.loads(cli("upcyle", "--json").out)["error"]["code"] == 2


def test_statistics_that_are_none(refused, tmp_path, out):
    moe = make_moe(tmp_path / "moe")
    stats = tmp_path / "stats.safetensors"
    words = ("prune", moe, out, "--keep", 2, "--stats", stats)
    refused(3, "does not exist", *words)
    stats.write_bytes(b"garbage")
    refused(3, "too short", *words)
    stats.write_bytes(safetensors_bytes({"x": ("F32", (1,), bytes(4))}))
    refused(3, "not a moeconv statistics file", *words)
    fields = {"kind": "statistics", "version": 1, "identity": "0", "model_type": "mixtral", "layers": [0],
              "num_experts": 4, "top_k": 2, "tokens": 1, "sources": []}  # fmt: skip
    stats.write_bytes(safetensors_bytes({}, moeconv=json.dumps(fields)))
    refused(3, "statistics of another model", *words)
    stats.write_bytes(safetensors_bytes({}, moeconv=json.dumps(fields | {"identity": open_model(moe).identity})))
    refused(3, "has no count for layer 0", *words)


# -- standard streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ("", 3, "standard input is empty"), ("\n \n", 3, "standard input is empty"),
        ("{", 3, "neither a path nor JSON"), ('{"a":' * 50000, 3, "neither a path nor JSON"),
        ('{"error": {"code": 3, "message": "m\\u001b[2J"}}', 3, "the previous step failed: m\\x1b[2J"),
        ('{"error": 5}', 3, "the previous step failed"), ('{"output": 5}', 3, "neither `output` nor `path`"),
        ('{"ok": false, "path": "x"}', 3, "did not pass"), ('{"passed": false, "path": "x"}', 3, "did not pass"),
        ("{}", 3, "neither `output` nor `path`"), ('{"output": "x", "dry_run": true}', 3, "a dry run"),
        ("/nowhere", 3, "does not exist"),
    ],
)  # fmt: skip
def test_standard_input(refused, monkeypatch, tmp_path, given, code, says):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    refused(code, says, "inspect", "-")


def shell(script: str, **variables: object) -> subprocess.CompletedProcess[bytes]:
    full = {"MOECONV": f"{sys.executable} -m moeconv", **{k: str(v) for k, v in variables.items()}}
    return subprocess.run(["bash", "-c", script], capture_output=True, env=os.environ | full, check=False)


@pytest.mark.slow
def test_streams_that_are_closed_or_full(tmp_path, left_over):
    """What cannot be printed does not decide whether the work is done; the exit code still tells."""
    source = make_dense(tmp_path / "source")
    (tmp_path / "bad").mkdir()
    done = shell(
        """
        code() { echo "$1 $?" >&9; }
        exec 9>"$DIR/codes"
        $MOECONV inspect "$SRC" >&-; code closed-out
        $MOECONV inspect - <&-; code closed-in
        $MOECONV upcycle "$SRC" "$DIR/out1" --no-check 2>&-; code closed-err
        $MOECONV inspect "$SRC" >/dev/full; code full
        $MOECONV inspect "$SRC" --json >/dev/full; code full-json
        { $MOECONV upcycle "$SRC" "$DIR/out2" --no-check --shard-size 1KB 2>&1 >/dev/null; code broken-err; } | true
        { $MOECONV verify "$DIR/out1"; code verify; } | true
        rm "$DIR/out1/config.json"; cp "$SRC/config.json" "$DIR/out1/"
        { $MOECONV verify "$DIR/out1"; code verify-fails; } | true
        { $MOECONV inspect "$DIR/bad" --json; code error-json; } | true
        { $MOECONV --help; code help; } | true
        """,
        DIR=tmp_path, SRC=source,
    )  # fmt: skip
    codes = dict(line.split() for line in (tmp_path / "codes").read_text().splitlines())
    assert {name: int(code) for name, code in codes.items()} == {
        "closed-out": 0, "closed-in": 3, "closed-err": 0, "full": 4, "full-json": 4, "broken-err": 0, "verify": 0,
        "verify-fails": 5, "error-json": 3, "help": 0,
    }, done.stderr  # fmt: skip
    for words in (b"Traceback", b"Exception ignored", b"BrokenPipe", b"bug of moeconv"):
        assert words not in done.stderr + done.stdout
    assert left_over(tmp_path) == ["out1", "out2"]


@pytest.mark.slow
def test_paths_that_are_no_utf8_go_through_a_pipe(tmp_path):
    source = make_dense(tmp_path / "source")
    done = shell(
        """
        set -e -o pipefail
        out="$DIR/"$'o\\xff[/b]'
        $MOECONV upcycle "$SRC" "$out" --no-check -q | $MOECONV inspect - --json
        rm -r "$out"
        $MOECONV upcycle "$SRC" "$out" --no-check --json | $MOECONV verify -
        """,
        DIR=tmp_path / "[red]", SRC=source,
    )  # fmt: skip
    assert done.returncode != 0 and b"does not exist" in done.stderr  # `[red]` is a name, not markup
    (tmp_path / "[red]").mkdir()
    done = shell(
        """
        set -e -o pipefail
        out="$DIR/"$'o\\xff'
        $MOECONV upcycle "$SRC" "$out" --no-check -q | $MOECONV inspect - --json
        rm -r "$out"
        $MOECONV upcycle "$SRC" "$out" --no-check --json | $MOECONV verify -
        $MOECONV inspect "$out"
        """,
        DIR=tmp_path / "[red]", SRC=source,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_names_are_neither_markup_nor_terminal_codes(cli, tmp_path):
    out = tmp_path / "a[b]:smile:[link=x]\x1b[2J"
    source = make_dense(tmp_path / "source")
    outcome = cli("upcycle", source, out, "--no-check")
    assert outcome.code == 0 and "a[b]:smile:[link=x]\\x1b[2J" in outcome.out and "\x1b" not in outcome.out
    edit_json(out / MANIFEST_NAME, files={"[red]\x1b[2J": {}})
    outcome = cli("verify", out)
    assert outcome.code == 5 and "[red]\\x1b[2J is missing" in outcome.out and "\x1b" not in outcome.out + outcome.err


# -- verify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ruin", "says"),
    [
        (lambda p: _flip(p / "model.safetensors", -1), "has changed since it was written"),
        (lambda p: _flip(p / "config.json", -3, 0x0), "ok"),
        (config(eos_token_id=7), "config.json has changed"),
        (gone("LICENSE"), "LICENSE is missing"),
        (lambda p: edit_json(p / MANIFEST_NAME, files={"../source/config.json": {}}), "is not valid"),
        (lambda p: edit_json(p / MANIFEST_NAME, files={"x" * 300: {}}), "is missing"),
        (lambda p: edit_json(p / MANIFEST_NAME, files=5), "lists no files"),
        (lambda p: edit_json(p / MANIFEST_NAME, files={}), "is not in the manifest"),
        (lambda p: edit_json(p / MANIFEST_NAME, steps=[5]), "no manifest"),
        (lambda p: edit_json(p / MANIFEST_NAME, steps=[{"source": "0"}]), "not the one from which"),
    ],
)  # fmt: skip
def test_verify_names_what_is_wrong(cli, tmp_path, out, ruin, says):
    source = make_dense(tmp_path / "source")
    (source / "LICENSE").write_text("free")
    assert cli("upcycle", source, out, "--no-check").code == 0
    ruin(out)
    outcome = cli("verify", out, "--source", source, "--json")
    if says == "ok":
        assert outcome.code == 0 and outcome.json["ok"]
        return
    assert outcome.code == 5 and not outcome.json["ok"]
    assert any(says in problem for problem in outcome.json["problems"]), outcome.json["problems"]


def _flip(path: Path, at: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


def test_verify_compares_with_the_source_byte_by_byte(cli, tmp_path, out):
    """Also when the manifest has been made to fit the damage."""
    import hashlib

    source = make_dense(tmp_path / "source")
    assert cli("upcycle", source, out, "--no-check").code == 0
    model = open_model(out)
    ref = model.checkpoint.tensors["model.layers.1.self_attn.k_proj.weight"]
    _flip(out / ref.shard, ref.start + ref.nbytes // 2)
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    manifest["files"][ref.shard]["sha256"] = hashlib.sha256((out / ref.shard).read_bytes()).hexdigest()
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert cli("verify", out).code == 0
    outcome = cli("verify", out, "--source", source, "--json")
    assert outcome.code == 5 and "k_proj.weight' differs" in outcome.json["problems"][0]


# -- size ----------------------------------------------------------------------------------------------------------


def test_a_model_of_terabytes_is_looked_at_and_planned_from_its_headers(cli, refused, tmp_path, out):
    source = make_dense(tmp_path / "source", layers=1, hidden=48, intermediate=96, vocab=32, head_dim=4)
    big, wide = 1 << 18, 1 << 20
    edit_json(source / "config.json", hidden_size=big, intermediate_size=wide)
    entries, position = {}, 0
    for name, (dtype, shape, _) in read_tensors(source).items():
        shape = tuple({48: big, 96: wide}.get(size, size) for size in shape)
        size = 2 * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    head = with_header(json.dumps(entries).encode())
    with open(source / SINGLE_NAME, "wb") as file:
        file.write(head)
        try:
            file.truncate(len(head) + position)  # sparse
        except OSError as error:
            pytest.skip(f"no sparse files of 1.6 TB here: {error}")
    assert cli("inspect", source, "--json").json["bytes"] == position > 1.6e12
    planned = cli("upcycle", source, out, "--dry-run", "--json").json
    assert planned["bytes"] > 12e12 and planned["shards"] > 20
    outcome = cli("upcycle", source, out, "--no-check")
    assert outcome.code == 4 and "bytes are needed" in outcome.err and not out.exists()


def test_debug_prints_the_traceback(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("MOECONV_DEBUG", "1")
    outcome = cli("inspect", tmp_path / "gone")
    assert outcome.code == 3 and "Traceback" in outcome.err and "does not exist" in outcome.err


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "heads beyond reason": ({"head_dim": 2**70}, "head_dim must be a whole number from 0 to 65536"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1"),
    "heads that are null": ({"num_attention_heads": None}, "num_attention_heads must be a whole number from 1"),
    "a vocabulary in words": ({"vocab_size": "64"}, "vocab_size must be a whole number"),
    "an epsilon in words": ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number"),
    "ties that are a number": ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    "an activation that is none": ({"hidden_act": 5}, "hidden_act must be a word"),
    "rope that is a list": ({"rope_parameters": [1]}, "rope_parameters must be an object"),
    "a base in words": (
        {"rope_parameters": {"rope_theta": "x"}},
        "rope_parameters.rope_theta must be a number above 0",
    ),
    "a base of zero": ({"rope_scaling": {"rope_theta": 0}}, "rope_scaling.rope_theta must be a number above 0"),
    "a rope type that is none": ({"rope_parameters": {"rope_type": 5}}, "rope_parameters.rope_type must be a word"),
    "factors in words": (
        {"rope_scaling": {"long_factor": ["x"]}},
        "rope_scaling.long_factor must be a list of numbers",
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_config_values_of_the_wrong_kind(refused, tmp_path, out, what):
    changes, says = CONFIGS[what]
    source = make_dense(tmp_path / "source")
    edit_json(source / "config.json", **changes)
    refused(3, says, "inspect", source)
    refused(3, says, "upcycle", source, out, "--no-check")
