"""The library face: every documented name works again and again, in any order of imports, and loads late."""

from __future__ import annotations

import builtins
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_moe

import moeconv
from moeconv import api

DOCUMENTED = re.findall(r"\bapi\.(\w+)\(|moeconv\.(\w+)\(", (Path(__file__).parents[2] / "docs/python.md").read_text())
NAMES = sorted({name for pair in DOCUMENTED for name in pair if name})


def test_the_page_of_the_face_names_functions():
    assert {"evaluate", "open_model", "plan_upcycle", "execute", "verify"} <= set(NAMES)
    assert set(NAMES) <= set(api.__all__)


@pytest.mark.parametrize("name", api.__all__)
def test_a_name_is_a_function_at_every_call(name):
    first = getattr(api, name)
    importlib.import_module(first.__module__)
    assert inspect.isfunction(first)
    assert getattr(api, name) is first
    assert callable(getattr(moeconv, "open" if name == "open_model" else name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calibrate", "evaluate", "tune"])
def test_a_function_with_a_packages_name_is_callable_before_and_after_the_package_is_imported(name):
    """Two calls in a row in a fresh process; both reach the function, which refuses what it is given."""
    script = f"""
import moeconv
from moeconv import {name}
for call in (moeconv.{name}, {name}, moeconv.{name}):
    try:
        call("/nowhere", *(["stats"] if "{name}" != "evaluate" else []), data=["x"])
    except moeconv.errors.MoeconvError as error:
        print("does not exist" in error.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", "import moeconv.errors\n" + script], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True"] * 3, done.stdout + done.stderr


def test_the_face_loads_no_torch_and_leaves_the_built_ins_alone():
    script = "import sys, moeconv.api\nfrom moeconv import *\n"
    script += "assert open is __builtins__.open\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
    assert "open" not in moeconv.__all__ and not set(api.__all__) & set(dir(builtins))


def test_inspect_takes_a_model_or_its_directory(tmp_path):
    path = make_moe(tmp_path / "moe")
    assert moeconv.inspect(path) == moeconv.inspect(str(path)) == api.inspect(api.open_model(path))
    assert moeconv.inspect(path)["kind"] == "moe"
