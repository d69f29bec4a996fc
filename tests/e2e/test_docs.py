"""The manual cannot lie: every command that a page shows is executed, every output that it shows is compared.

Commands run in an empty directory, with moeconv as its wheel installs it, so that they need nothing from the checkout.
A block that cannot run here stands behind `<!-- not run: WHY -->`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment in which the wheel of this checkout is installed; its dependencies are those of the tests."""
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "moeconv", source / "moeconv", ignore=shutil.ignore_patterns("__pycache__"))
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, source]
    subprocess.run(words, check=True, capture_output=True, text=True)
    environment = {k: v for k, v in refresh.environment().items() if k not in ("DEMO", "PYTHONPATH")}
    return environment | {"PYTHONPATH": str(place), "PATH": f"{place / 'bin'}{os.pathsep}{environment['PATH']}"}


@pytest.mark.slow
def test_the_wheel_has_everything(installed, tmp_path):
    script = "import moeconv, os; print(os.path.dirname(moeconv.__file__))"
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, env=installed, cwd=tmp_path, capture_output=True, text=True, check=True)
    package = Path(done.stdout.strip())
    assert str(package).startswith(installed["PYTHONPATH"])
    here = {file.relative_to(ROOT / "moeconv") for file in (ROOT / "moeconv").rglob("*") if file.is_file()}
    missing = {file for file in here if not (package / file).is_file() and "__pycache__" not in file.parts}
    assert missing == set()


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("page", PAGES)
def test_outputs_on_a_page_are_what_the_commands_print(tmp_path, page):
    text = PAGES[page].read_text()
    assert refresh.refreshed(text, folder=str(tmp_path)) == text


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if script_of(path.read_text())])
def test_commands_on_a_page_run(tmp_path, page, installed):
    script = script_of(PAGES[page].read_text())
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=installed, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def test_every_command_has_its_page_with_its_help():
    text = "\n".join(path.read_text() for path in PAGES.values())
    missing = [verb.name for verb in VERBS if f"<!-- run: moeconv {verb.name} --help -->" not in text]
    assert missing == []
