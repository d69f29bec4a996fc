"""Config groups of compressed-tensors: every weight is read by the group that its reader gives it, and keeps it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.errors import InputError
from moeconv.families.model import Model, open_model
from moeconv.families.module_groups import groups_of
from moeconv.plan.execute import execute
from moeconv.prune.planner import plan_prune
from moeconv.quantize.planner import plan_quantize
from moeconv.tensors import decode_weight
from tests.tiny import edit_json, make_moe

torch.set_num_threads(1)
LAYER = "model.layers.{}.mlp.experts."
MATRICES = [f"{LAYER.format(at)}{e}.{part}_proj" for at in (0, 1) for e in range(12) for part in ("gate", "up", "down")]
TARGETS = [
    "Linear", "Embedding", "Module", "Router", MATRICES[4], MATRICES[40], r"re:.*experts\.\d\..*", r"re:.*down_proj",
    r"re:model\.layers\.1\..*", r"re:.*experts\.(1|10)\..*", r"re:.*embed.*", r"re:.*experts\.1[01]\.up_proj$",
]  # fmt: skip


def by_library(groups: dict[str, list[str]], ignore: list[str], name: str, module: torch.nn.Module) -> str | None:
    """What apply_quantization_config of compressed-tensors does with one module."""
    from compressed_tensors.utils.match import is_match, match_targets

    scheme = {target: key for key, targets in groups.items() for target in targets}
    matched = match_targets(name, module, scheme)
    return scheme[matched[0]] if matched and not is_match(name, module, ignore) else None


def test_the_group_of_a_module_is_that_of_compressed_tensors() -> None:
    draw = random.Random(0)
    linear, embedding = torch.nn.Linear(1, 1), torch.nn.Embedding(1, 1)
    found = set()
    for _ in range(60):
        groups = {f"group_{i}": draw.sample(TARGETS, draw.randint(1, 4)) for i in range(draw.randint(1, 3))}
        ignore = draw.sample(TARGETS, draw.randint(0, 2)) if draw.random() < 0.5 else []
        quantization = {"config_groups": {k: {"targets": t} for k, t in groups.items()}, "ignore": ignore}
        known = groups_of(quantization)
        for name in draw.sample(MATRICES, 12):
            wanted = by_library(groups, ignore, name, linear)
            assert known.group_of(name) == wanted, (groups, ignore, name)
            found.add(wanted)
        name = "model.embed_tokens"
        assert known.group_of(name, embedding=True) == by_library(groups, ignore, name, embedding)
    assert found == {None, "group_0", "group_1", "group_2"}


def group(bits: int, *targets: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"targets": list(targets), "weights": weights | {"dynamic": False}}


def two_schemes(folder: Path, eight: Any) -> Path:
    """A checkpoint of 12 experts in INT4, in INT8 those of the modules for which `eight` is true."""
    source = open_model(make_moe(folder / "plain", "qwen3_moe", experts=12, hidden=32, moe_intermediate_size=32))
    tensors: dict[str, torch.Tensor] = {}
    for scheme, wanted in (("int4", False), ("int8", True)):
        out = folder / scheme
        plan = plan_quantize(source, format="compressed-tensors", scheme=scheme, group_size="32")
        execute(plan, source=source.checkpoint, out=out)
        for file in sorted(out.glob("*.safetensors")):
            tensors |= {n: t for n, t in load_file(file).items() if bool(eight(n)) == wanted}
    target = folder / "both"
    target.mkdir()
    for file in ("config.json", "tokenizer.json"):
        if (folder / "int4" / file).exists():
            (target / file).write_bytes((folder / "int4" / file).read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def stated(path: Path, groups: dict[str, Any], ignore: list[str] | None = None) -> Path:
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    more = {} if ignore is None else {"ignore": ignore}
    edit_json(path / "config.json", quantization_config=said | {"config_groups": groups} | more)
    return path


def bits(model: Model) -> dict[str, int]:
    return {name: stored.encoding.bits for name, stored in model.stored.items()}


EIGHT = {r"re:.*experts\.(1|7|11)\..*": lambda n: any(f"experts.{e}." in n for e in (1, 7, 11))}
EIGHT |= {
    r"re:.*down_proj": lambda n: "down_proj" in n,
    f"{LAYER.format(0)}7.up_proj": lambda n: "0.mlp.experts.7.up" in n,
}


@pytest.mark.parametrize("target", [*EIGHT])
def test_groups_are_read_by_their_targets_and_kept_by_a_prune(tmp_path: Path, target: str) -> None:
    eight = EIGHT[target]
    path = two_schemes(tmp_path, eight)
    stated(path, {"group_0": group(4, "Linear"), "group_1": group(8, target)})
    model = open_model(path)
    assert all(b == (8 if eight(name) else 4) for name, b in bits(model).items()) and {*bits(model).values()} == {4, 8}
    keep = {0: [1, 4, 7, 9], 1: [0, 2, 10, 11]}
    execute(plan_prune(model, keep=4, keep_experts=keep), source=model.checkpoint, out=tmp_path / "out")
    pruned = open_model(tmp_path / "out")
    for name, found in bits(pruned).items():
        role = pruned.roles[next(iter(pruned.stored[name].parts.values()))]
        old = name.replace(f"experts.{role.expert}.", f"experts.{keep[role.layer][role.expert]}.")
        assert found == bits(model)[old]
        assert torch.equal(decode_weight(pruned, name), decode_weight(model, old))


def test_a_packed_weight_that_config_json_makes_plain_is_refused(tmp_path: Path) -> None:
    path = two_schemes(tmp_path, lambda n: "down_proj" in n)
    said = json.loads((path / "config.json").read_text())["quantization_config"]["ignore"]
    down = group(8, r"re:.*down_proj")
    with pytest.raises(InputError, match="makes it a plain one"):  # gate and up are of no group
        open_model(stated(path, {"group_0": down}))
    with pytest.raises(InputError, match="makes it a plain one"):  # ignore beats every target
        open_model(stated(path, {"group_0": group(4, "Linear"), "group_1": down}, [*said, MATRICES[2]]))
    with pytest.raises(InputError, match="is expected"):  # the groups of the other weights
        open_model(stated(path, {"group_0": group(8, "Linear"), "group_1": group(4, "re:.*down_proj")}, said))
    assert open_model(stated(path, {"group_0": group(4, "Linear"), "group_1": down}, said))


def test_groups_that_numbers_alone_tell_apart_are_told_apart_after_a_prune(tmp_path: Path) -> None:
    """A pattern that becomes names in full would beat the other group's pattern."""
    path = two_schemes(tmp_path, lambda n: any(f"experts.{e}." in n for e in (3, 10)))
    eight = group(8, r"re:.*experts\.(3|10)\..*")  # before the next one in alphabetical order
    model = open_model(stated(path, {"group_0": eight, "group_1": group(4, r"re:.*experts\.\d+\..*")}))
    keep = {0: [1, 3, 4], 1: [3, 10, 11]}
    execute(plan_prune(model, keep=3, keep_experts=keep), source=model.checkpoint, out=tmp_path / "out")
    found = bits(open_model(tmp_path / "out"))
    assert {n for n, b in found.items() if b == 8} == {
        f"{LAYER.format(at)}{e}.{part}_proj.weight"
        for at, e in ((0, 1), (1, 0), (1, 1))
        for part in ("gate", "up", "down")
    }
