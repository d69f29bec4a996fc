"""The library face: every documented name works again and again, in any order of imports, and loads late."""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_dense, make_moe

import moeconv
from moeconv import api
from moeconv.errors import InputError, OutputError, UsageError
from moeconv.requests import groups_of
from moeconv.verbs import REQUESTS

ROOT = Path(__file__).parents[2]
DOCUMENTED = re.findall(r"\bapi\.(\w+)\(|moeconv\.(\w+)\(", (ROOT / "docs/python.md").read_text())
NAMES = sorted({name for pair in DOCUMENTED for name in pair if name})


def test_the_page_of_the_face_names_functions():
    assert {"evaluate", "open_model", "plan_upcycle", "execute", "prune", "upcycle"} <= set(NAMES)
    assert set(NAMES) <= set(api.__all__)


@pytest.mark.parametrize("name", api.__all__)
def test_a_name_is_a_function_at_every_call(name):
    first = getattr(api, name)
    importlib.import_module(first.__module__)
    assert inspect.isfunction(first)
    assert getattr(api, name) is first
    assert callable(getattr(moeconv, "open" if name == "open_model" else name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calibrate", "evaluate", "prune"])
def test_a_function_with_a_packages_name_is_callable_before_and_after_the_package_is_imported(name):
    """Two calls in a row in a fresh process; both reach the function, which refuses what it is given."""
    script = f"""
import moeconv
from moeconv import {name}
for call in (moeconv.{name}, {name}, moeconv.{name}):
    try:
        call("/nowhere", *(["made"] if "{name}" != "evaluate" else []), data=["x"])
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


# -- the verbs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbs")
    heard: list[str] = []
    dense = make_dense(folder / "dense")
    made = moeconv.upcycle(dense, folder / "moe", experts=4, no_check=True, progress=lambda p: heard.append(p.unit))
    return folder, made, heard


def test_a_verb_does_what_its_command_does(upcycled, cli):
    folder, made, heard = upcycled
    again = cli("upcycle", folder / "dense", folder / "cli", "--experts", "4", "--no-check", "--json").json
    assert set(made) == set(again) and made["plan_id"] == again["plan_id"] and "shard" in heard
    assert {path.name for path in (folder / "moe").iterdir()} == {path.name for path in (folder / "cli").iterdir()}
    assert moeconv.verify(folder / "moe")["ok"] is True
    pruned = moeconv.prune(api.open_model(folder / "moe"), folder / "pruned", keep=2)
    assert pruned["prune"]["experts_after"] == 2 and (folder / "pruned" / "README.md").is_file()


def test_a_result_is_short_as_text_and_a_table_in_a_notebook(upcycled):
    _, made, _ = upcycled
    assert made.__class__.__name__ == "VerbResult" and isinstance(made, dict)
    assert repr(made).startswith("<moeconv upcycle: output=") and len(repr(made)) < 300
    shown = made._repr_html_()
    assert "<table>" in shown and "parameters" in shown
    assert "ok=True" in repr(moeconv.verify(upcycled[0] / "moe"))


def test_a_verb_prints_nothing_and_logs(upcycled, capsys, caplog):
    caplog.set_level("INFO", logger="moeconv")
    moeconv.inspect(upcycled[0] / "moe")
    moeconv.report(upcycled[0] / "moe", upcycled[0] / "page.html")
    assert capsys.readouterr() == ("", "")
    assert "reading what was measured" in caplog.text


def test_wrong_words_and_places_are_refused_as_on_the_command_line(upcycled):
    folder = upcycled[0]
    with pytest.raises(UsageError, match="unknown parameter 'ratoi'") as refused:
        moeconv.prune(folder / "moe", folder / "new", ratoi=0.5)
    assert "ratio" in refused.value.hint
    with pytest.raises(UsageError, match="quantize takes model, out"):
        moeconv.quantize(folder / "moe")
    with pytest.raises(UsageError, match="not one of rtn"):
        moeconv.quantize(folder / "moe", folder / "new", method="rtx")
    with pytest.raises(OutputError):
        moeconv.prune(folder / "moe", folder / "moe", keep=2)


def test_the_other_verbs_that_write_a_model(tmp_path):
    dense = make_dense(tmp_path / "dense")
    moeconv.upcycle(dense, tmp_path / "moe", experts=4, top_k=2, no_check=True)
    whole = moeconv.collapse(tmp_path / "moe", tmp_path / "one", width=64, no_check=True)
    assert whole["output"] == str(tmp_path / "one") and moeconv.inspect(tmp_path / "one")["kind"] == "dense"
    with pytest.raises(UsageError, match="needs statistics"):
        moeconv.arrange(tmp_path / "moe", tmp_path / "shares", devices=2)
    with pytest.raises(InputError, match="No such file"):
        moeconv.import_gguf(tmp_path / "no.gguf", tmp_path / "imported")


def test_one_path_stands_for_a_list_of_one(upcycled, tmp_path):
    with pytest.raises(InputError, match=r"nothing\.txt"):
        moeconv.prune(upcycled[0] / "moe", tmp_path / "out", keep=2, data=tmp_path / "nothing.txt")


@pytest.mark.parametrize("name", REQUESTS)
def test_help_shows_every_option(name):
    shown = inspect.signature(getattr(api, name))
    options = [f.name for group in groups_of(REQUESTS[name]) for f in dataclasses.fields(group)]
    assert list(shown.parameters)[-1] == "progress" and set(options) < set(shown.parameters)
    assert all(f"    {option}: " in getattr(api, name).__doc__ for option in options)


@pytest.mark.slow
def test_a_type_checker_knows_the_parameters_and_results(tmp_path):
    """A wrong name, a wrong type and a field that a result lacks are errors; the code of the manual has none."""
    script = tmp_path / "script.py"
    good = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    wrong = [
        'moeconv.prune("a", "b", ratio="half")',
        'moeconv.prune("a", "b", rato=0.5)',
        'moeconv.verify("a")["good"]',
    ]
    shown = 'reveal_type(moeconv.prune("a", "b")["prune"]["experts_after"])'
    script.write_text("\n".join([*good, *wrong, shown]))
    words = [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--ignore-missing-imports", script]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False, env=environment)
    errors = [line for line in done.stdout.splitlines() if "script.py" in line and ": error:" in line]
    assert re.search(r'Revealed type is "(builtins\.)?int"', done.stdout), done.stdout
    first = script.read_text().splitlines().index(wrong[0]) + 1
    assert {int(line.split(":")[1]) for line in errors} == {first, first + 1, first + 2}, errors
    assert "rato" in done.stdout and "good" in done.stdout
