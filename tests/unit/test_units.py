"""A number agrees with its noun and its verb, in every message."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import make_moe

import moeconv
from moeconv.units import counted

ROOT = Path(moeconv.__file__).parent
NOUNS = "experts|tensors|tokens|sequences|shards|problems|steps|entries|siblings|words|records|texts|windows"


@pytest.mark.parametrize(
    ("n", "words", "expected"),
    [
        (1, ("expert",), "1 expert"),
        (0, ("expert",), "0 experts"),
        (2, ("entry", "entries"), "2 entries"),
        (1, ("expert is", "experts are"), "1 expert is"),
        (5, ("expert is", "experts are"), "5 experts are"),
    ],
)
def test_one_of_a_thing_is_not_plural(n: int, words: tuple[str, ...], expected: str) -> None:
    assert counted(n, *words) == expected


def test_a_prune_to_one_expert_says_one_expert(tmp_path: Path, cli: Any) -> None:
    done = cli("prune", make_moe(tmp_path / "m", top_k=2), tmp_path / "o", "--keep", 1, "--criterion", "random")
    assert done.code == 2 and "1 expert is fewer than the 2 that every token is routed to" in done.err


def plural_subjects(path: Path) -> list[str]:
    """f-strings that put a number before a plural where a sentence begins, so that it may be 1 and the verb follows."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for before, value, after in zip([None, *parts], parts, parts[1:]):
            begins = before is None or (isinstance(before, ast.Constant) and str(before.value).endswith((": ", "; ")))
            if not (begins and isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant)):
                continue
            if re.match(rf" (?:{NOUNS})\b(?!/)", str(after.value)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_no_message_begins_with_a_number_and_a_plural_that_may_be_of_one() -> None:
    files = [path for path in sorted(ROOT.rglob("*.py")) if "report" not in path.parts]  # figures, in tables
    assert [where for path in files for where in plural_subjects(path)] == []
