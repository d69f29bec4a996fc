"""Packages outside add to moeconv by entry points; a broken one is named, without a traceback."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import pytest

from moeconv import plugins
from moeconv.errors import InputError
from moeconv.plugins import Registry

GROUP = "moeconv.test_group"


@pytest.fixture
def install(install):
    """A package of this file's group."""
    return partial(install, group=GROUP)


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


@dataclass(frozen=True)
class Record:
    name: str


def registry() -> Registry[Record]:
    return Registry(Record, GROUP, [Record("own"), Record("other")])


SHARED = registry()
CODE = f"import {__name__} as here\n"


def test_what_packages_add_comes_behind_our_own(install):
    install("zebra-pack", CODE + "THING = here.Record('z')")
    found = registry()
    assert list(found) == ["own", "other", "z"] and len(found) == 3
    assert found["z"] == Record("z") and "z" in found and "y" not in found


def test_a_package_may_read_the_registry_that_it_extends(install):
    install("reader-pack", CODE + "THING = here.Record(f'more-than-{len(here.SHARED)}')")
    assert list(SHARED) == ["own", "other", "more-than-2"]


@pytest.mark.parametrize(("name", "says"), [("'own'", "the name own is taken"), ("'a b'", "'a b' is not a name"),
                                            ("None", "None is not a name")])  # fmt: skip
def test_a_record_that_cannot_stand_beside_the_others_names_its_package(install, name, says):
    install("broken-pack", CODE + f"THING = here.Record({name})")
    found = registry()
    for _ in range(2):  # the second look does not take what the first one refused
        with pytest.raises(InputError, match=f"the package broken-pack adds .* is refused: {says}"):
            list(found)


def test_a_module_that_ends_the_program_does_not(install):
    install("broken-pack", "raise SystemExit(7)")
    with pytest.raises(InputError, match=r"the package broken-pack .* SystemExit: 7"):
        list(registry())


def test_two_records_of_one_name():
    found = registry()
    with pytest.raises(ValueError, match="the name own is taken"):
        found.add(Record("own"))
    new = found.add(Record("new"))
    assert found.add(new) is new
