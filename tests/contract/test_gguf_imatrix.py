"""Every family that GGUF is written for has an importance matrix: all its matrices, or a stated part of them."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
import torch
from contract.gguf_cases import CASES, make
from contract.stock import skip_where_stock_is_broken
from words import text

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.options import DataOptions, MeasureOptions
from moeconv.plan.meter import SilentMeter
from moeconv.quantize.gguf.llama_cpp import find_row
from moeconv.quantize.gguf.measure_imatrix import matrices_of, write_imatrix

torch.set_num_threads(1)
# the class multiplies by its matrices expert by expert, so that no call shows the inputs of their down projections
NOT_SEEN = ("dbrx experts",)


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("case", list(CASES))
def test_a_family_has_an_importance_matrix(tmp_path: Any, case: str) -> None:
    skip_where_stock_is_broken(case.split()[0].split("-")[0])  # "granitemoehybrid-nope experts"
    path, out = make(tmp_path / "model", case), tmp_path / "im.gguf"
    (tmp_path / "text.txt").write_text(text(400))
    asked = {
        "data": DataOptions(data=(str(tmp_path / "text.txt"),)), "measure": MeasureOptions(tokens=96, seq_len=16),
        "seed": 0, "overwrite": False, "meter": SilentMeter(),
    }  # fmt: skip
    if case in NOT_SEEN:
        with pytest.raises(InputError, match="are not seen"):
            write_imatrix(str(path), out, **asked)
        return
    found = write_imatrix(str(path), out, **asked)
    names = {t.name.removesuffix(".in_sum2") for t in gguf.GGUFReader(out).tensors if t.name.endswith(".in_sum2")}
    model = open_model(path)
    every = list(matrices_of(model, find_row(model)))
    assert names == {one.name for one in every if one.seen} and any("ffn_" in name for name in names)
    left_out = [one.name for one in every if not one.seen]
    assert all(name.endswith("attn_k_b.weight") for name in left_out)
    assert not left_out or any("attn_k_b.weight" in warning for warning in found["warnings"])
