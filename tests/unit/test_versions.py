"""A transformers newer than the tested ones is named, once; it is not refused."""

from __future__ import annotations

import sys

import pytest
import torch

from moeconv import versions
from tests.contract.stock import MOE_CASES, save_stock


@pytest.mark.parametrize(
    ("installed", "named"),
    [("5.20.2", False), ("5.24.3", False), ("5.25.0", True), ("5.25.0.dev0", True), ("6.0", True), ("unknown", False)],
)
def test_only_a_newer_release_is_named(monkeypatch, installed, named):
    monkeypatch.setattr(versions, "version", lambda _: installed)
    found = versions.untested_transformers()
    assert len(found) == named and all(installed in text and "5.24" in text for text in found)


def test_a_command_that_ran_transformers_warns_once_and_others_do_not(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda _: "5.99.1")
    moe_checkpoint = save_stock(tmp_path / "moe", *MOE_CASES["qwen3_moe"], dtype=torch.float32)
    assert "transformers" in sys.modules
    with_it = cli("verify", moe_checkpoint, "--json").json["warnings"]
    assert [text for text in with_it if "5.99.1" in text] == [
        "transformers 5.99.1 is newer than 5.24, the newest release that moeconv was tested with"
    ]
    monkeypatch.delitem(sys.modules, "transformers")
    assert not [text for text in cli("verify", moe_checkpoint, "--json").json["warnings"] if "5.99.1" in text]
