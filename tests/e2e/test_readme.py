"""README shows what the commands print: the blocks that need no model are run again and compared."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_in_the_readme_are_what_the_commands_print(tmp_path):
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "docs" / "refresh.py")
    assert spec is not None and spec.loader is not None
    refresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(refresh)
    text = (ROOT / "README.md").read_text()
    for word in ("moeconv families", "moeconv formats", "moeconv inspect"):
        assert f"<!-- run: {word}" in text
        assert refresh.refreshed(text, folder=str(tmp_path), only=word) == text
