"""docs/errors.md is complete: every exit code that a command can end with, each with an example that was run."""

from __future__ import annotations

import ast
import re
import signal
from pathlib import Path

import pytest

import moeconv
from moeconv import errors

ROOT = Path(moeconv.__file__).parent
PAGE = ROOT.parent / "docs" / "errors.md"
SIGNALS = {128 + signal.SIGINT, 128 + signal.SIGTERM}
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the manual is not installed")


def kinds(base: type[errors.MoeconvError] = errors.MoeconvError) -> set[type[errors.MoeconvError]]:
    return {base}.union(*map(kinds, base.__subclasses__()))


def codes() -> set[int]:
    return {kind.exit_code for kind in kinds()}


def test_the_table_has_every_code_and_no_other():
    listed = {int(n) for row in re.findall(r"^\| ([\d, ]+) \|", PAGE.read_text(), re.M) for n in row.split(",")}
    assert listed == {0} | codes() | SIGNALS


def test_every_code_that_a_user_can_cause_has_examples_of_that_code():
    sections = dict(re.findall(r"^## (\d)\S*:.*?\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
    assert {int(code) for code in sections} >= codes()
    for code in codes() - {1}:
        ends = re.findall(r"^exit code (\d+)$", sections[str(code)], re.M)
        blocks = sections[str(code)].count("<!-- run: ")
        assert blocks >= 2 and ends == [str(code)] * blocks, code


def test_errors_are_raised_as_one_of_these_kinds():
    """A class of its own elsewhere has one of their codes: no other number reaches the shell."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "exit_code" for t in node.targets):
                assert isinstance(node.value, ast.Constant) and node.value.value in codes(), path


def test_a_bug_is_code_1_and_asks_for_a_report(cli, monkeypatch, tmp_path):
    from moeconv.inspect import step

    def broken(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(step, "gguf_file", broken)
    done = cli("inspect", tmp_path)
    assert done.code == 1 and "a bug of moeconv: KeyError" in done.err and "MOECONV_DEBUG=1" in done.err
    assert "Traceback" not in done.err
