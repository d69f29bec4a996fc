"""Contract: config.json says the shape of every tensor that a stock model saves, and opening holds each to it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import InputError
from moeconv.families.check import Shapes
from moeconv.families.model import open_model
from moeconv.families.spec import UNCHANGED
from tests.contract.stock import DENSE_CASES, MOE_CASES, save_stock

torch.set_num_threads(1)
CASES = {f"{kind}:{case}": made for kind, cases in (("dense", DENSE_CASES), ("moe", MOE_CASES))
         for case, made in cases.items()}  # fmt: skip


def with_tensors(checkpoint: Checkpoint, **changes) -> Checkpoint:
    """The checkpoint with other headers; its files stay as they are."""
    other = copy.copy(checkpoint)
    other.tensors = {**checkpoint.tensors, **changes}
    return other


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_the_shape_that_config_says_and_a_misshapen_one_is_named(tmp_path: Path, case: str) -> None:
    model = open_model(save_stock(tmp_path / "model", *CASES[case], dtype=torch.bfloat16))
    expected = Shapes(model)
    tried: set[str] = set()
    for name, role in model.roles.items():
        if role.group in UNCHANGED:
            continue
        ref = model.checkpoint.tensors[name]
        assert expected(role) == ref.shape, name
        if role.key not in tried:
            tried.add(role.key)
            wrong = replace(ref, shape=(ref.shape[0] + 1, *ref.shape[1:]))
            with pytest.raises(InputError) as raised:
                open_model(with_tensors(model.checkpoint, **{name: wrong}))
            assert name in raised.value.message and str(list(wrong.shape)) in raised.value.message


@pytest.mark.parametrize("rows", [1, -1])
def test_a_vocabulary_that_is_not_the_embedding_s_is_refused_before_anything_is_written(
    tmp_path: Path, cli, rows: int
) -> None:
    from tests.tiny import edit_json, make_dense

    source = make_dense(tmp_path / "source", vocab=64)
    edit_json(source / "config.json", vocab_size=64 + rows)
    refused = cli("upcycle", source, tmp_path / "out", "--json")
    assert refused.code == 3 and f"vocab_size = {64 + rows}" in refused.json["error"]["message"]
    assert not (tmp_path / "out").exists()
    found = cli("verify", source, "--json")
    assert found.code == 5 and "embed_tokens" in found.json["problems"][0]
