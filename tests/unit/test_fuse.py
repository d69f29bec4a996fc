"""Prune and quantize in one pass: the bytes of the two steps one after the other, and when a recipe does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from moeconv.families.model import open_model
from moeconv.families.rows.mistral import MIXTRAL
from moeconv.plan.execute import execute
from moeconv.plan.fuse import fuse
from moeconv.plan.planned import planned_model
from moeconv.prune.planner import plan_prune
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.planner import plan_quantize

KEEP = {0: [0, 2, 5], 1: [1, 2, 3]}
NOT_COMPARED = ("moeconv_manifest.json", "README.md")  # they name what lay between


def same_files(one: Path, other: Path) -> None:
    a, b = ({n: h for n, h in tiny.hashes(p).items() if n not in NOT_COMPARED} for p in (one, other))
    assert a == b and any(name.endswith(".safetensors") for name in a)


@pytest.mark.parametrize("dtype", [None, "float16"])  # a cast in front of the packing: two kernels as one
@pytest.mark.parametrize("format", [f.name for f in FORMATS.values() if f.takes(MIXTRAL) and f.shard is None])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_same_bytes_as_one_after_the_other(tmp_path, family, format, dtype):
    sizes = tiny.packable(FORMATS[format].schemes[0], hidden=64, intermediate=128)
    path = tiny.make_moe(tmp_path / "m", family, experts=6, shards=2, **sizes)
    model, size = open_model(path), {"shard_size": "30KB"}
    first = plan_prune(model, keep=3, keep_experts=KEEP, dtype=dtype, **size)
    second = plan_quantize(planned_model(first), format=format, **size)
    fused = fuse(first, second)
    assert fused is not None and fused.nbytes == second.nbytes and fused.identity == model.identity
    assert {i.kernel for i in fused.items()} >= ({"chain"} if dtype else {"copy"})
    execute(fused, source=model.checkpoint, out=tmp_path / "fused")
    execute(first, source=model.checkpoint, out=tmp_path / "pruned")
    pruned = open_model(tmp_path / "pruned")
    execute(plan_quantize(pruned, format=format, **size), source=pruned.checkpoint, out=tmp_path / "packed")
    same_files(tmp_path / "fused", tmp_path / "packed")
    steps = json.loads((tmp_path / "fused" / "moeconv_manifest.json").read_text())["steps"]
    assert [s["command"] for s in steps] == ["prune", "quantize"] and steps[1]["source"] == steps[0]["plan_id"]
    open_model(tmp_path / "fused")


RECIPE = """
name: fused
vars: {{source: {source}, work: {work}}}
{more}
steps:
  - step: prune
    from: ${{source}}
    to: ${{work}}/pruned
    with: {{keep: 3, criterion: aimer}}
  - step: quantize
    from: ${{work}}/pruned
    to: ${{work}}/packed
    with: {{{packing}}}
{tail}
"""


def recipe(folder: Path, work: str, *, more: str = "", packing: str = "bits: 4", tail: str = "") -> Path:
    path = folder / f"{work}.yaml"
    path.write_text(RECIPE.format(source=folder / "m", work=folder / work, more=more, packing=packing, tail=tail))
    return path


def test_a_recipe_does_both_in_one_pass(cli, tmp_path):
    tiny.make_moe(tmp_path / "m", experts=6, hidden=64, intermediate=128)
    done = cli("run", recipe(tmp_path, "w"), "--json")
    assert done.code == 0, done.out
    pruned, packed = done.json["steps"][1:]
    assert pruned["output"] is None and pruned["fused_into"] == packed["output"]
    assert pruned["result"]["prune"]["keep"] and packed["result"]["quantize"]["error"]["relative_rms"]["mean"] > 0
    assert not (tmp_path / "w" / "pruned").exists() and done.json["output"] == packed["output"]
    again = cli("run", recipe(tmp_path, "w"), "--json").json["steps"]
    assert all(row["kept"] for row in again[1:])
    # the same two by hand
    for command in (
        ("prune", tmp_path / "m", tmp_path / "p", "--keep", 3, "--criterion", "aimer"),
        ("quantize", tmp_path / "p", tmp_path / "q", "--bits", 4),
    ):
        assert cli(*command, "--json").code == 0
    same_files(tmp_path / "w" / "packed", tmp_path / "q")


@pytest.mark.parametrize(
    "change",
    [
        {"tail": "  - {step: prune, from: '${work}/pruned', to: '${work}/other', with: {keep: 2, criterion: aimer}}"},
        {"packing": "format: gguf"},
    ],
)
def test_not_where_something_else_needs_what_lies_between(tmp_path, change):
    from moeconv.recipe.fused import fuses
    from moeconv.recipe.read import load_recipe

    tiny.make_moe(tmp_path / "m", experts=6, hidden=64, intermediate=128)
    assert fuses(load_recipe(str(recipe(tmp_path, "w"))), 0)
    assert not fuses(load_recipe(str(recipe(tmp_path, "w", **change))), 0)
    (tmp_path / "w" / "pruned").mkdir(parents=True)
    assert not fuses(load_recipe(str(recipe(tmp_path, "w"))), 0)
