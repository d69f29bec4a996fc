"""Every language model in the registry of transformers is taken, or refused by name with the reason."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from moeconv.errors import Unsupported
from moeconv.families.find import find_family
from moeconv.families.refused import refusals
from moeconv.families.registry import tables
from moeconv.versions import NEWEST, release

_FILE = Path(__file__).parents[2] / "docs" / "registry.py"
_SPEC = importlib.util.spec_from_file_location("registry_page", _FILE)
assert _SPEC is not None and _SPEC.loader is not None
page = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = page  # its dataclass looks itself up there
_SPEC.loader.exec_module(page)


@pytest.fixture(scope="module")
def registry():
    return page.read()


def test_a_release_that_brings_a_family_that_nothing_here_names_fails(registry):
    assert not page.unnamed(registry), "add a row, or a reason in moeconv/families/refused.py"
    newer = replace(registry, causal=(*registry.causal, "novel"), experts={**registry.experts, "unheard": ("unheard",)})
    assert page.unnamed(newer) == ["novel", "unheard"]


def test_the_registry_is_read(registry):
    assert {"llama", "mixtral", "gpt_oss"} <= set(registry.causal)
    assert {"llava", "qwen3_vl_moe"} <= set(registry.images)
    assert {"mixtral", "qwen3_moe", "switch_transformers", "dbrx"} <= registry.experts.keys()
    assert not {"llama", "qwen3", "clip"} & registry.experts.keys()


@pytest.mark.skipif(release(transformers.__version__) != NEWEST, reason="the page is of the newest tested release")
def test_the_page_is_that_of_the_newest_release(registry):
    assert page.PAGE.read_text() == page.page(registry), "run python docs/registry.py"


def test_what_is_taken_is_not_refused_and_the_reverse():
    known = tables()
    taken = {*known.dense, *known.moe, *known.wrapped, *known.aliases}
    assert not taken & refusals().keys()


@pytest.mark.parametrize("model_type", refusals())
def test_a_refusal_states_its_reason(model_type):
    with pytest.raises(Unsupported) as refused:
        find_family({"model_type": model_type})
    assert refusals()[model_type] in refused.value.message
