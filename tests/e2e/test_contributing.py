"""CONTRIBUTING.md's worked examples, replayed: in a copy of the tree, where the contract suite takes what was
added, and as a package outside that the real command finds by its entry points."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import make_moe

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"<!-- (?P<what>add|new|extra): (?P<file>\S+)(?: before \"(?P<before>[^\n]*)\")? -->\n```(?:python|text)\n"
    r"(?P<code>.*?)```",
    re.DOTALL,
)
PYTEST = ("pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers")
_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)


def section(title: str) -> str:
    """The text of a section of CONTRIBUTING.md."""
    parts = _SECTION.split((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    return dict(zip(parts[1::2], parts[2::2]))[title]


def replay(title: str, tree: Path) -> dict[str, int]:
    """Do what a section says in a copy of the tree. Returns {file: lines added to it, or 0 for a new one}."""
    shutil.copytree(ROOT / "moeconv", tree / "moeconv", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__", "e2e"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    touched: dict[str, int] = {}
    for block in _BLOCK.finditer(section(title)):
        path, code = tree / block["file"], block["code"]
        if block["what"] == "new":
            assert not path.exists()
            path.write_text(code)
        else:
            text, before = path.read_text(), block["before"].replace('\\"', '"')
            assert text.count(before) == 1, before
            space = "" if code.startswith(("from ", " ")) else "\n\n"  # behind a function
            path.write_text(text.replace(before, code + space + before))
        lines = 0 if block["what"] == "new" else len(code.strip().splitlines())
        touched[block["file"]] = touched.get(block["file"], 0) + lines
    return touched


def run(*words: object, tree: Path, code: int = 0) -> SimpleNamespace:
    """A command in the tree, with the tree's own moeconv."""
    path = os.pathsep.join(map(str, (tree, ROOT))) if (tree / "moeconv").is_dir() else f"{ROOT}{os.pathsep}{tree}"
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return SimpleNamespace(out=done.stdout, err=done.stderr)


def lints(tree: Path, *files: str) -> None:
    """What was added is written as the rest is."""
    run("ruff", "check", "-q", *files, tree=tree)
    run("ruff", "format", "--check", "-q", *files, tree=tree)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("title", "touched", "help", "choice", "suite", "chosen"),
    [
        ("Adding a quantization format", {"moeconv/quantize/fp8.py": 0, "moeconv/quantize/formats.py": 2}, "quantize",
         "float-quantized", ["tests/contract/test_compress.py", "tests/unit/test_quantize_plan.py"],
         "float-quantized and mixtral or fp8 and (registered or torch_is_not) or test_quantize_plan and "
         "(scheme or float-quantized)"),
        ("Adding a pruning criterion", {"moeconv/prune/criteria.py": 7}, "prune", "worst-source",
         ["tests/contract/test_criteria.py"], "worst-source or help or registered and criteria"),
        ("Adding an upcycling method", {"moeconv/upcycle/methods.py": 10}, "upcycle", "fade",
         ["tests/contract/test_bounds.py"], "fade and (passes or damaged_experts) or registered and upcycle.methods"),
    ],
    ids=["format", "criterion", "method"],
)  # fmt: skip
def test_what_a_section_adds_is_all_that_it_takes(tmp_path, title, touched, help, choice, suite, chosen):
    assert replay(title, tmp_path) == touched
    lints(tmp_path, *touched)
    words = " ".join(run("moeconv", help, "--help", tree=tmp_path).out.replace("│", " ").split())
    lists = [found.split(", ") for found in re.findall(r"One of: ([^.]*)\.", words)]
    assert any(choice in names and len(names) > 2 for names in lists), lists
    found = run(*PYTEST, *suite, "tests/unit/test_layers.py", "-k", chosen, tree=tmp_path).out
    assert int(re.search(r"(\d+) passed", found)[1]) >= 3, found


# -- a package outside -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package of CONTRIBUTING.md as pip leaves it in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    package, info = folder / "moeconv_extras", folder / "moeconv_extras-0.3.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").touch()
    own = section("In a package of your own")
    (extra,) = [block for block in _BLOCK.finditer(own) if block["what"] == "extra"]
    (folder / extra["file"]).write_text(extra["code"])
    (new,) = [block for block in _BLOCK.finditer(section("Adding a quantization format")) if block["what"] == "new"]
    (package / "fp8.py").write_text(new["code"])
    toml = re.search(r"<!-- entry points -->\n```toml\n(.*?)```", own, re.DOTALL)[1]
    points = re.sub(r'\[project.entry-points."(.+)"\]', r"[\1]", toml).replace('"', "")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moeconv-extras\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(points)
    make_moe(folder / "moe", "qwen3_moe", hidden=64, intermediate=96, experts=6, top_k=2)
    return folder


def test_the_command_finds_what_a_package_adds(installed):
    table = run("moeconv", "formats", tree=installed).out
    assert re.search(r"float-quantized fp8 +8 +dequantized +unknown", table)
    words = " ".join(run("moeconv", "prune", "--help", tree=installed).out.replace("│", " ").split())
    assert "magnitude, random, peak-weight." in words
    words = " ".join(run("moeconv", "quantize", "--help", tree=installed).out.replace("│", " ").split())
    assert "mlx, float-quantized." in words and " fp8," in words


def test_what_a_package_adds_works(installed, tmp_path):
    import json

    made = run("moeconv", "prune", installed / "moe", tmp_path / "less", "--keep", 4, "--criterion", "peak-weight",
               "--json", tree=installed)  # fmt: skip
    assert json.loads(made.out)["prune"]["criterion"] == "peak-weight"
    made = run("moeconv", "quantize", tmp_path / "less", tmp_path / "fp8", "--format", "float-quantized", "--json",
               tree=installed)  # fmt: skip
    block = json.loads(made.out)["quantize"]
    assert block["scheme"] == "fp8" and 0.01 < block["error"]["relative_rms"]["mean"] < 0.03
    assert block["counted"] == {"expert": 2 * 4 * 3}
    assert run("moeconv", "verify", tmp_path / "fp8", "--source", tmp_path / "less", tree=installed)
    # what the package wrote is a form that moeconv reads, also without the package
    shutil.copytree(installed / "moe", tmp_path / "bare" / "moe")
    run("moeconv", "quantize", tmp_path / "fp8", tmp_path / "again", "--requantize", "--format", "bitsandbytes",
        tree=tmp_path / "bare")  # fmt: skip


def test_a_package_that_is_broken_is_named_where_it_is_needed(installed, tmp_path):
    broken = shutil.copytree(installed, tmp_path / "site")
    (broken / "moeconv_extras" / "fp8.py").write_text("import no_such_module\n")
    for words in (("formats",), ("quantize", "--help"), ("quantize", broken / "moe", tmp_path / "out")):
        failed = run("moeconv", *words, tree=broken, code=3)
        assert failed.err.startswith(
            "moeconv: the package moeconv-extras adds moeconv_extras.fp8:FP8 to moeconv.formats"
        )
        assert "No module named 'no_such_module'" in failed.err and "Traceback" not in failed.err
        assert "pip uninstall moeconv-extras" in failed.err
    run("moeconv", "prune", broken / "moe", tmp_path / "pruned", "--keep", 3, tree=broken)
    run("moeconv", "--help", tree=broken)
    assert not (tmp_path / "out").exists()
