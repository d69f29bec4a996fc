"""The manual cannot lie: every command that a page shows is executed, every output that it shows is compared.

A block that cannot run here stands behind `<!-- not run: WHY -->`.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moeconv.cli.commands import VERBS

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("refresh", ROOT / "docs" / "refresh.py")
assert _SPEC is not None and _SPEC.loader is not None
refresh = importlib.util.module_from_spec(_SPEC)
sys.modules["refresh"] = refresh
_SPEC.loader.exec_module(refresh)

PAGES = {str(page.relative_to(ROOT)): page for page in refresh.PAGES}
_CODE = re.compile(r"(?P<skip><!-- not run: [^\n]+ -->\n)?```(?P<kind>sh|python)\n(?P<code>.*?)```", re.DOTALL)


def script_of(text: str) -> str:
    """All shell and Python blocks of a page as one bash script, in order."""
    lines = ["set -euo pipefail"]
    for match in _CODE.finditer(text):
        if match["skip"] is None:
            shell = match["kind"] == "sh"
            lines.append(match["code"] if shell else f"python - <<'END_OF_PYTHON'\n{match['code']}END_OF_PYTHON")
    return "\n".join(lines) if len(lines) > 1 else ""


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("page", PAGES)
def test_outputs_on_a_page_are_what_the_commands_print(tmp_path, page):
    text = PAGES[page].read_text()
    assert refresh.refreshed(text, folder=str(tmp_path)) == text


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if script_of(path.read_text())])
def test_commands_on_a_page_run(tmp_path, page):
    script = script_of(PAGES[page].read_text())
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=refresh.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def test_every_command_has_its_page_with_its_help():
    text = "\n".join(path.read_text() for path in PAGES.values())
    missing = [verb.name for verb in VERBS if f"<!-- run: moeconv {verb.name} --help -->" not in text]
    assert missing == []
