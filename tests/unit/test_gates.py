"""The tests' own rules: which warnings are errors, and what leaving out the slow tests says."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CASES = """
import pytest

@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("n", range(5))
def test_case(n): ...

@pytest.mark.slow
def test_long(): ...
"""


@pytest.mark.parametrize("module", ["moeconv", "moeconv.plan.flow", "tests.unit.test_plan"])
@pytest.mark.parametrize("kind", [UserWarning, DeprecationWarning, FutureWarning, RuntimeWarning])
def test_a_warning_of_our_own_code_is_an_error(module, kind):
    with pytest.raises(kind):
        warnings.warn_explicit("old", kind, "file.py", 1, module=module, registry={})


def test_warnings_of_named_packages_alone_are_left_out():
    known, module = (
        "`is_gradient_checkpointing` is deprecated and will be removed in v6.",
        "transformers.modeling_utils",
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit(known, FutureWarning, "file.py", 1, module=module, registry={})
        assert not seen
        warnings.warn_explicit(known, FutureWarning, "file.py", 1, module="elsewhere", registry={})
        warnings.warn_explicit("new", FutureWarning, "file.py", 2, module=module, registry={})
    assert len(seen) == 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_slow_tests_are_left_out_by_name_and_counted(tmp_path, workers):
    (tmp_path / "test_some.py").write_text(CASES)
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow")
    words = ("-p", "no:cacheprovider", "-m", "not slow", "-n", workers)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (
        "4 slow tests left out: `python -m pytest`, without -m, runs them all" in done.stdout
        and "2 passed" in done.stdout
    )


@pytest.mark.slow
def test_pytest_alone_finds_the_helpers_of_the_tests(tmp_path):
    """Without `python -m`, from another directory: nothing but pyproject.toml says where they are."""
    pytest_itself = Path(sys.executable).parent / "pytest"
    files = [TESTS / "contract" / "test_prefixes.py", TESTS / "crash" / "test_disk.py"]
    done = subprocess.run(
        [pytest_itself, "--collect-only", "-p", "no:cacheprovider", *files],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "tests collected" in done.stdout, done.stdout
