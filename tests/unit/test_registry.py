"""The registry finds every row, in an order that does not depend on the file system."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from moeconv.errors import Unsupported
from moeconv.families import registry, rows
from moeconv.families.find import find_family
from moeconv.families.registry import tables
from moeconv.families.spec import Family
from moeconv.families.vendor import Vendor

FILES = sorted(module.name for module in pkgutil.iter_modules(rows.__path__))
VENDORS: dict[str, Vendor] = {name: importlib.import_module(f"{rows.__name__}.{name}").VENDOR for name in FILES}
LISTED = {
    id(row)
    for vendor in VENDORS.values()
    for row in (*vendor.dense, *vendor.moe, *(text for wrapper in vendor.wrappers for text in wrapper.texts))
}


@pytest.mark.parametrize("name", FILES)
def test_every_row_of_a_file_is_listed(name):
    module = importlib.import_module(f"{rows.__name__}.{name}")
    forgotten = [word for word, value in vars(module).items() if isinstance(value, Family) and id(value) not in LISTED]
    assert not forgotten


def test_every_vendor_is_in_the_tables():
    known = tables()
    for vendor in VENDORS.values():
        assert all(known.dense[row.model_type] is row for row in vendor.dense)
        assert all(known.moe[row.model_type] is row for row in vendor.moe)
        assert all(pair in known.pairs for pair in vendor.pairs)
        assert {wrapper.model_type for wrapper in vendor.wrappers} <= known.wrapped.keys()


def test_the_order_of_conversions_does_not_depend_on_the_file_system(monkeypatch):
    before = [(pair.source, pair.target) for pair in tables().pairs]
    found = list(pkgutil.iter_modules(rows.__path__))
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda _path: reversed(found))
    tables.cache_clear()
    assert [(pair.source, pair.target) for pair in tables().pairs] == before
    tables.cache_clear()
    assert before[0] == ("llama", "mixtral")  # what `moeconv families` has always listed first


def test_a_pair_is_in_the_file_of_its_target():
    for name, vendor in VENDORS.items():
        own = {row.model_type for row in (*vendor.moe, *(text for w in vendor.wrappers for text in w.texts))}
        assert {pair.target for pair in vendor.pairs} <= own, name


@pytest.mark.parametrize(("aliases", "what"), [({"llama": "mistral"}, "has a row itself"), ({"new": "none"}, "no row")])
def test_an_alias_must_be_of_a_known_family_and_not_one_itself(aliases, what):
    with pytest.raises(ValueError, match=what):
        registry._merged([*VENDORS.values(), Vendor(aliases=aliases)])


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("deepseek_v4", "id of the token"), ("glm5_next", "mix residual streams"), ("longcat_flash", "without weights")],
)
def test_experts_that_no_row_describes_are_refused_with_the_reason(model_type, why):
    with pytest.raises(Unsupported, match=why):
        find_family({"model_type": model_type, "vision_config": {}})
