"""Engines that were run with a family, and what --target says of those that were not."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeconv.families.measured import MEASURED, VERSIONS, how_known
from moeconv.families.registry import tables
from moeconv.families.served import check_served, served


def test_every_measurement_is_of_a_family_and_an_engine_with_a_version():
    assert set(MEASURED) == set(VERSIONS)
    for rows in MEASURED.values():
        assert set(rows) <= set(tables().moe)
        assert {row.found for row in rows.values()} <= {"same", "differs", "refused"}


@pytest.mark.parametrize("engine", sorted(MEASURED))
def test_a_family_that_was_measured_to_run_is_not_said_to_fail(engine):
    for name, row in MEASURED[engine].items():
        if row.found == "same":
            assert served(name, engine) != "no", (engine, name)


def test_target_says_what_was_not_measured_or_differs():
    assert check_served("qwen3_moe", ["vllm", "llama.cpp", "transformers"]) == []
    assert "not measured here" in check_served("qwen3_moe", ["sglang"])[0]
    assert "refused a small random model" in check_served("minimax_m2", ["vllm"])[0]
    assert "rotary_embedding" in check_served("deepseek_v3", ["vllm"])[0]
    assert how_known("qwen3_moe", "sglang") == "listed" and how_known("qwen3_moe", "vllm") == "measured"


def test_the_manual_says_what_the_table_says():
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    for engine, rows in MEASURED.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {VERSIONS[engine]} |")]
        same, conditional, differs, refused = ([*cell.strip().split(", ")] for cell in line.split("|")[2:6])
        said = dict.fromkeys([*same, *conditional], "same") | dict.fromkeys(differs, "differs")
        said |= dict.fromkeys(refused, "refused")
        assert said == {name: row.found for name, row in rows.items()}
        assert set(conditional) == {name for name, row in rows.items() if row.found == "same" and row.note}
