"""Packages outside add to moeconv by entry points; a broken one is named, without a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moeconv import plugins
from moeconv.errors import InputError

GROUP = "moeconv.test_group"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a package importable with one entry point, as pip leaves it in site-packages."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(package: str, code: str, *, value: str = "THING", name: str = "thing") -> None:
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}:{value}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)  # of a test before, by the same name
        plugins._registered.cache_clear()

    yield make
    plugins._registered.cache_clear()


def test_what_packages_add_comes_sorted_and_is_loaded_when_asked_for(install):
    install("zebra-pack", "THING = 'z'")
    install("apple-pack", "THING = 'a'")
    assert "apple_pack" not in sys.modules
    assert plugins.added(GROUP, str) == ("a", "z")
    assert plugins.added("moeconv.nobody_adds_here", str) == ()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("THING = 1 / 0", "ZeroDivisionError"),
        ("OTHER = 1", "AttributeError"),
        ("THING = 5", "is of type int, where a str is expected"),
    ],
)
def test_a_broken_package_is_named(install, code, says):
    install("broken-pack", code)
    with pytest.raises(InputError) as caught:
        plugins.added(GROUP, str)
    assert "the package broken-pack adds broken_pack:THING to moeconv.test_group" in caught.value.message
    assert says in caught.value.message
    assert "pip uninstall broken-pack" in caught.value.hint
