"""A recipe that YAML itself trips over is refused with its file and line, not with a traceback."""

from __future__ import annotations

import pytest

from moeconv.errors import UsageError
from moeconv.recipe import load_recipe

STEP = "steps:\n  - {step: upcycle, from: a, to: b, with: {experts: %s}}\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("steps: &a\n  - *a\n", "r.yaml"),
        (STEP % "2020-99-99", "r.yaml"),
        ("vars: {e: '[1'}\n" + STEP % "'${e}'", "r.yaml:3: "),
    ],
    ids=["alias in itself", "no such date", "a variable that is no YAML"],
)
def test_a_recipe_that_yaml_cannot_read_is_wrong_usage(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text, "utf-8")
    with pytest.raises(UsageError, match=said):
        load_recipe(str(tmp_path / "r.yaml"))
