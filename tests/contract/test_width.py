"""Contract: every MoE row with fewer neurons per expert loads strictly in its stock class and computes as the stock
model does whose other neurons add nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.families.model import open_model
from moeconv.tensors import read_tensor
from tests.contract.stock import (
    DENSE_CASES,
    MOE_CASES,
    WRAPPED_DENSE,
    dropped,
    load,
    logits,
    relative_difference,
    row_of,
    save_stock,
    skip_where_stock_is_broken,
)

torch.set_num_threads(1)


def downs(model, name, role):
    """The down projections [n, H, I] in a tensor: of one expert or FFN, or of all experts of a layer."""
    tensor = read_tensor(model.checkpoint, name)
    layout = model.family.tensors.packed.get(role.key) if role.expert is None else None
    if layout is None:
        return tensor[None]
    if layout.flat:
        tensor = tensor.reshape(model.num_experts, -1, tensor.shape[-1])
    return tensor.mT if layout.transposed else tensor


def stored(model, role, made, like):
    """Down projections as `downs` returns them, as the tensor of that role is stored."""
    layout = model.family.tensors.packed.get(role.key) if role.expert is None else None
    if layout is None:
        return made[0]
    return (made.mT if layout.transposed else made).reshape(like.shape)


def columns(narrow, wide):
    """The numbers of the columns of `wide` [H, I] that are those of `narrow` [H, W], in order."""
    same = (narrow[:, :, None] == wide[:, None]).all(0)
    assert bool((same.sum(1) == 1).all()), "a column is not one of the source"
    return same.int().argmax(1)


def zeroed(source, narrow, kept, folder):
    """A copy of `source` in which the neurons that `narrow` lacks add nothing: their down columns are 0. `kept` {layer:
    experts in the order of their new numbers}."""
    before, after = open_model(source), open_model(narrow)
    changed = {}
    for name, role in before.roles.items():
        if role.group not in ("expert", "shared", "ffn") or not role.key.endswith(".down"):
            continue
        wide = downs(before, name, role)
        experts = kept.get(role.layer, []) if role.group == "expert" else [0]
        if role.expert is not None:
            if role.expert not in experts:
                continue
            number = experts.index(role.expert)
            of = next(n for n, r in after.roles.items() if (r.key, r.layer, r.expert) == (role.key, role.layer, number))
            pairs = [(0, downs(after, of, after.roles[of])[0])]
        else:
            cut = downs(after, name, role)
            pairs = [(experts[i] if role.group == "expert" else 0, cut[i]) for i in range(len(cut))]
        made = wide.clone()
        for at, cut in pairs:
            if cut.shape[1] >= wide.shape[2]:  # it keeps its width, or has zeros beside it
                assert torch.equal(cut[:, : wide.shape[2]], wide[at]) and not cut[:, wide.shape[2] :].any()
                continue
            some = columns(cut, wide[at])
            assert bool((some.diff() > 0).all())
            made[at] = torch.zeros_like(wide[at]).index_copy(1, some, wide[at][:, some])
        changed[name] = stored(before, role, made, read_tensor(before.checkpoint, name)).contiguous()
    folder.mkdir()
    for file in source.glob("*.safetensors"):
        tensors = {name: changed.get(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("case", list(MOE_CASES))
def test_a_narrower_model_equals_the_stock_model_without_those_neurons(tmp_path, cli, case):
    skip_where_stock_is_broken(case)
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    opened = open_model(source)
    # a quarter, in whole multiples of 4, where a half would make a matrix square
    width = opened.expert_width // 16 * 4 if opened.family.tensors.layouts else opened.expert_width // 2
    flags = ("--width", width, "--keep", 6, "--json")
    promised = cli("prune", source, tmp_path / "out", *flags, "--dry-run")
    assert promised.code == 0, promised.out
    done = cli("prune", source, tmp_path / "out", *flags)
    assert done.code == 0, done.out
    shards = [f for f in done.json["files"] if f.endswith(".safetensors")]
    assert promised.json["bytes"] == sum((tmp_path / "out" / f).stat().st_size for f in shards)
    assert open_model(tmp_path / "out").expert_width == width
    kept = {int(layer): experts for layer, experts in done.json["prune"]["keep"].items()}
    model = load(zeroed(source, tmp_path / "out", kept, tmp_path / "zeroed"))
    with dropped(model, open_model(source), kept):
        wanted = logits(model)
    assert relative_difference(wanted, logits(load(source))) > 1e-3, "the neurons did nothing"
    assert relative_difference(wanted, logits(load(tmp_path / "out"))) <= 1e-5


SHARED = [case for case in MOE_CASES if {*row_of(case).experts.shared_width} - {row_of(case).experts.width}]


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("case", SHARED)
def test_a_narrower_shared_expert_equals_the_stock_one_without_those_neurons(tmp_path, cli, case):
    skip_where_stock_is_broken(case)
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    opened = open_model(source)
    width, experts = opened.shared_width // 2, opened.family.experts
    flags = ["--shared-width", width, "--json"]
    if experts.width in experts.shared_width:  # the width is a number of shared experts times that of the experts
        flags += ["--width", opened.expert_width // 2]
    promised = cli("prune", source, tmp_path / "out", *flags, "--dry-run")
    assert promised.code == 0, promised.out
    done = cli("prune", source, tmp_path / "out", *flags)
    assert done.code == 0, done.out
    shards = [f for f in done.json["files"] if f.endswith(".safetensors")]
    assert promised.json["bytes"] == sum((tmp_path / "out" / f).stat().st_size for f in shards)
    assert open_model(tmp_path / "out").shared_width == done.json["prune"]["shared_width_after"] == width
    kept = {layer: list(range(opened.num_experts)) for layer in opened.moe_layers}
    wanted = logits(load(zeroed(source, tmp_path / "out", kept, tmp_path / "zeroed")))
    assert relative_difference(wanted, logits(load(source))) > 1e-3, "the neurons did nothing"
    assert relative_difference(wanted, logits(load(tmp_path / "out"))) <= 1e-5


DENSE = DENSE_CASES | {f"{name} inside": (kind, config) for name, (kind, config, _) in WRAPPED_DENSE.items()}


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("case", list(DENSE))
def test_a_narrower_dense_model_equals_the_stock_model_without_those_neurons(tmp_path, cli, case):
    skip_where_stock_is_broken(case)
    source = save_stock(tmp_path / "dense", *DENSE[case], dtype=torch.float32)
    width = open_model(source).ffn_width // 2
    promised = cli("prune", source, tmp_path / "out", "--width", width, "--json", "--dry-run")
    assert promised.code == 0, promised.out
    done = cli("prune", source, tmp_path / "out", "--width", width, "--json")
    assert done.code == 0, done.out
    shards = [f for f in done.json["files"] if f.endswith(".safetensors")]
    assert promised.json["bytes"] == sum((tmp_path / "out" / f).stat().st_size for f in shards)
    assert open_model(tmp_path / "out").ffn_width == width
    wanted = logits(load(zeroed(source, tmp_path / "out", {}, tmp_path / "zeroed")))
    assert relative_difference(wanted, logits(load(source))) > 1e-3, "the neurons did nothing"
    assert relative_difference(wanted, logits(load(tmp_path / "out"))) <= 1e-5


def test_a_width_that_makes_the_order_of_a_matrix_ambiguous_is_refused(tmp_path, cli):
    name, config, *more = MOE_CASES["qwen3_vl_moe"]
    config = config | {"text_config": config["text_config"] | {"moe_intermediate_size": 48}}
    source = save_stock(tmp_path / "moe", name, config, *more, dtype=torch.float32)
    model = open_model(source)
    refused = cli("prune", source, tmp_path / "out", "--width", model.hidden_size // 2, "--json")
    assert refused.code == 2 and "square" in refused.json["error"]["message"], refused.out
    assert not (tmp_path / "out").exists()
