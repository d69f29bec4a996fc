"""A recipe's grid: a step of every combination, named and placed apart, and what it refuses."""

from __future__ import annotations

import pytest

from moeconv.errors import UsageError
from moeconv.recipe.read import load_recipe

HEAD = "steps:\n  - step: upcycle\n    from: a\n    to: out\n    with: {experts: 8}\n"


def steps(tmp_path, grid: str, head: str = HEAD):
    (tmp_path / "r.yaml").write_text(f"{head}    grid: {grid}\n")
    return load_recipe(str(tmp_path / "r.yaml")).steps


def test_every_combination_is_a_step_of_its_own(tmp_path):
    made = steps(tmp_path, "{method: [copy, drop], top_k: [1, 2]}")
    assert [s.name for s in made] == [f"upcycle {m} top_k {k}" for m in ("copy", "drop") for k in (1, 2)]
    assert [s.to.rpartition("/")[2] for s in made] == ["out-copy-1", "out-copy-2", "out-drop-1", "out-drop-2"]
    assert [(s.parameters["method"], s.parameters["top_k"]) for s in made] == [
        ("copy", 1), ("copy", 2), ("drop", 1), ("drop", 2),
    ]  # fmt: skip
    assert all(s.parameters["experts"] == 8 for s in made)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("{experts: [4, 8]}", "both in `with` and in `grid`"),
        ("{top_k: []}", "list of different values"),
        ("{top_k: [1, 1]}", "list of different values"),
        ("{to: [a/b]}", "file name"),
        ("{topk: [1]}", "has no parameter 'topk'"),
        ("{method: [copy, fly]}", "not one of"),
        ("{top_k: 2}", "list"),
    ],
)
def test_refusals_name_the_line(tmp_path, grid, words):
    with pytest.raises(UsageError, match=r"r\.yaml:\d") as caught:
        steps(tmp_path, grid)
    assert words in caught.value.message


def test_a_step_that_writes_nothing_has_no_grid(tmp_path):
    head = "steps:\n  - step: evaluate\n    from: a\n"
    with pytest.raises(UsageError, match="writes nothing"):
        steps(tmp_path, "{tokens: [1, 2]}", head)
