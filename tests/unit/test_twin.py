"""Statistics of a model for the same model in another dtype or quantization, when asked, and for no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import edit_json, make_dense, make_moe, read_tensors, write_shards
from words import add_tokenizer, text

from moeconv.calibrate.artifact import KIND, load_statistics
from moeconv.calibrate.run import calibrate
from moeconv.calibrate.twin import structure
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.prune.planner import plan_prune
from moeconv.quantize.planner import plan_quantize

PACKINGS = [
    {"format": "compressed-tensors", "scheme": "int4"}, {"format": "compressed-tensors", "scheme": "int8"},
    {"format": "compressed-tensors", "scheme": "int4", "scope": "all-linear"},
    {"format": "bitsandbytes", "scheme": "nf4"}, {"format": "bitsandbytes", "scheme": "int8"},
]  # fmt: skip
SIZES: dict[str, Any] = {"experts": 8, "hidden": 64, "intermediate": 128}


def packed(model: Path, out: Path, **parameters: Any) -> Path:
    source = open_model(model)
    execute(plan_quantize(source, **parameters), source=source.checkpoint, out=out)
    return add_tokenizer(out)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same in INT4, text, and the statistics of both."""
    room = tmp_path_factory.mktemp("twins")
    add_tokenizer(make_moe(room / "model", "olmoe", **SIZES))
    packed(room / "model", room / "int4", scheme="int4")
    (room / "text.txt").write_text(text(400))
    for name in ("model", "int4"):
        calibrate(room / name, room / f"{name}.stats", data=[str(room / "text.txt")], seq_len=16)
    return room


@pytest.mark.parametrize("parameters", PACKINGS)
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_one_structure_in_every_packing(tmp_path, family, parameters):
    model = make_moe(tmp_path / "model", family, **SIZES)
    assert structure(open_model(model)) == structure(open_model(packed(model, tmp_path / "packed", **parameters)))


def test_one_structure_in_every_dtype_and_wording(tmp_path):
    models = [make_moe(tmp_path / d, "qwen3_moe", dtype=d, **SIZES) for d in ("BF16", "F32", "F16")]
    edit_json(models[1] / "config.json", drop=["rope_theta"],
              rope_parameters={"rope_type": "default", "rope_theta": 10000})  # fmt: skip
    edit_json(models[2] / "config.json", transformers_version="4.51.0", _name_or_path="elsewhere")
    assert len({structure(open_model(m)) for m in models}) == 1


@pytest.mark.parametrize(
    "changed", [{"experts": 4}, {"layers": 3}, {"top_k": 1}, {"hidden": 32}, {"vocab": 80}, {"rope_theta": 500.0},
                {"rms_norm_eps": 1e-5}, {"moe_intermediate_size": 32}, {"norm_topk_prob": False}],
)  # fmt: skip
def test_another_structure_where_anything_else_differs(tmp_path, changed):
    usual = make_moe(tmp_path / "usual", "qwen3_moe", **SIZES)
    other = make_moe(tmp_path / "other", "qwen3_moe", **(SIZES | changed))
    assert structure(open_model(usual)) != structure(open_model(other))


@pytest.mark.slow
@pytest.mark.parametrize(("of", "on"), [("int4", "model"), ("model", "int4")])
def test_a_prune_takes_them_when_asked(room, cli, tmp_path, of, on):
    words = ("prune", room / on, tmp_path / "out", "--keep", 4, "--stats", room / f"{of}.stats", "--json")
    refused = cli(*words)
    assert refused.code == 3 and "pass --stats-of-twin" in refused.json["error"]["hint"]
    planned = cli(*words, "--stats-of-twin", "--dry-run")
    done = cli(*words, "--stats-of-twin")
    assert done.code == 0, done.out
    identity = load_statistics(room / f"{of}.stats").metadata["identity"]
    for result in (planned, done):
        assert result.json["prune"]["stats_of_twin"] == identity
    manifest = json.loads((tmp_path / "out" / "moeconv_manifest.json").read_text())
    assert manifest["steps"][-1]["parameters"]["decided_by"]["stats_of_twin"] == identity
    own = cli("prune", room / of, tmp_path / "own", "--keep", 4, "--stats", room / f"{of}.stats", "--json").json[
        "prune"
    ]
    assert done.json["prune"]["keep"] == own["keep"] and "stats_of_twin" not in own


def test_a_quantize_takes_them_when_asked(room, cli, tmp_path):
    mixed = ("--format", "bitsandbytes", "--scheme", "mixed", "--average-bits", 6)
    words = ("quantize", room / "model", tmp_path / "out", *mixed, "--stats", room / "int4.stats", "--json")
    assert cli(*words).code == 3
    done = cli(*words, "--stats-of-twin")
    assert done.code == 0, done.out
    identity = load_statistics(room / "int4.stats").metadata["identity"]
    assert done.json["quantize"]["stats_of_twin"] == identity
    manifest = json.loads((tmp_path / "out" / "moeconv_manifest.json").read_text())
    assert manifest["steps"][-1]["parameters"]["stats_of_twin"] == identity


def test_an_upcycle_takes_them_when_asked(cli, tmp_path):
    """Of a dense model in float32, for the same in bfloat16."""
    dense, wide = (add_tokenizer(make_dense(tmp_path / d, dtype=d)) for d in ("BF16", "F32"))
    (tmp_path / "text.txt").write_text(text(400))
    calibrate(wide, tmp_path / "stats", data=[str(tmp_path / "text.txt")], seq_len=16, sample_tokens=64)
    words = ("upcycle", dense, tmp_path / "out", "--method", "split", "--experts", 4, "--stats", tmp_path / "stats",
             "--no-check", "--json")  # fmt: skip
    refused = cli(*words)
    assert refused.code == 3 and "pass --stats-of-twin" in refused.json["error"]["hint"]
    done = cli(*words, "--stats-of-twin")
    assert done.code == 0, done.out
    assert done.json["upcycle"]["stats_of_twin"] == open_model(wide).identity
    manifest = json.loads((tmp_path / "out" / "moeconv_manifest.json").read_text())
    assert manifest["steps"][-1]["parameters"]["measured"]["stats_of_twin"] == open_model(wide).identity


def test_a_stranger_is_no_twin(room, cli, tmp_path):
    """Another structure, other weights, the model after an edit, a file that does not say, each with its reason."""
    trained = add_tokenizer(make_moe(tmp_path / "trained", "olmoe", seed=5, **SIZES))
    smaller = add_tokenizer(make_moe(tmp_path / "smaller", "olmoe", **(SIZES | {"top_k": 1})))
    model = open_model(room / "model")
    execute(plan_prune(model, keep=6, criterion="random"), source=model.checkpoint, out=tmp_path / "pruned")
    old = tmp_path / "old.stats"
    data = (room / "int4.stats").read_bytes()
    old.write_bytes(data.replace(b'\\"structure\\"', b'\\"structurx\\"'))
    assert (
        "structure" not in SafetensorsFile(old).metadata["moeconv"] and KIND in SafetensorsFile(old).metadata["moeconv"]
    )
    for path, stats, says in (
        (trained, room / "int4.stats", "of other weights: the cosine of two router rows of layer 0"),
        (smaller, room / "int4.stats", "not of a twin of this model"),
        (tmp_path / "pruned", room / "int4.stats", "not of a twin of this model"),
        (room / "model", old, "does not record the structure"),
    ):
        done = cli("prune", path, tmp_path / "out", "--keep", 4, "--stats", stats, "--stats-of-twin", "--json")
        assert done.code == 3 and says in done.json["error"]["message"], done
    alone = cli("prune", smaller, tmp_path / "out", "--keep", 4, "--stats", room / "int4.stats", "--json")
    assert alone.code == 3 and "--stats-of-twin" not in alone.json["error"]["hint"]


def test_a_router_in_another_dtype_is_the_same(room, tmp_path):
    """Its rows are rounded, and their cosines are not taken for another model's."""
    half = make_moe(tmp_path / "half", "olmoe", dtype="F32", **SIZES)
    tensors = read_tensors(room / "model")
    assert load_statistics(room / "int4.stats").check_belongs(open_model(half), twin=True) is not None
    write_shards(half, {name: tensors[name] for name in tensors})
    assert load_statistics(room / "int4.stats").check_belongs(open_model(half), twin=True) is not None
