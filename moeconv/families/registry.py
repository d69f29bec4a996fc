"""All families, collected from the files of rows/ and from packages outside (entry points `moeconv.families`)."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TypeVar

from moeconv.errors import InputError, escape
from moeconv.families import rows
from moeconv.families.spec import Family, Pair
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.plugins import added

GROUP = "moeconv.families"
_ADDED = f"An installed package with an entry point in {GROUP} adds it: update or remove that package."
Row = TypeVar("Row", Family, Wrapper)
# The order in which `moeconv families` lists conversions, by the file that holds them. A file that is not named here
# comes after these, by its name: nobody has to extend this list.
_LISTED = (
    "mistral", "qwen", "dots", "mellum", "hy", "glm", "solar", "granite", "aria", "gpt_oss", "dbrx", "ernie", "cohere",
    "hunyuan", "olmo", "lfm2", "qwen3_5", "nemotron", "gemma", "deepseek", "phi",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tables:
    """The rows of every vendor. A few families have a dense row and one with experts, under the same model_type."""

    dense: Mapping[str, Family]  # by model_type
    moe: Mapping[str, Family]  # by model_type
    wrapped: Mapping[str, Mapping[str, Family]]  # model_type of a multimodal model -> of its language model -> row
    pairs: tuple[Pair, ...]

    @property
    def families(self) -> Mapping[str, Family]:
        """Every language model by its model_type, with the row that has experts where there are two."""
        return {**self.dense, **self.moe}


@cache
def tables() -> Tables:
    """The tables of all vendors. Raises InputError for a package outside that cannot be loaded, or whose rows
    contradict those that are known."""
    vendors = (*_built_in(), *added(GROUP, Vendor))
    wrappers = [wrapper for vendor in vendors for wrapper in vendor.wrappers]
    found = Tables(
        dense=_by_name("dense family", (row for vendor in vendors for row in vendor.dense)),
        moe=_by_name("Mixture-of-Experts family", (row for vendor in vendors for row in vendor.moe)),
        wrapped={
            name: {text.model_type: wrapper.row(text) for text in wrapper.texts}
            for name, wrapper in _by_name("multimodal family", wrappers).items()
        },
        pairs=tuple(pair for vendor in vendors for pair in vendor.pairs),
    )
    _check_pairs(found)
    return found


def _built_in() -> Iterator[Vendor]:
    names = (module.name for module in pkgutil.iter_modules(rows.__path__))
    for name in sorted(names, key=lambda name: (_LISTED.index(name) if name in _LISTED else len(_LISTED), name)):
        yield import_module(f"{rows.__name__}.{name}").VENDOR


def _by_name(what: str, found: Iterable[Row]) -> dict[str, Row]:
    result: dict[str, Row] = {}
    for row in found:
        if row.model_type in result:
            raise InputError(f"two rows describe the {what} {escape(row.model_type)}", hint=_ADDED)
        result[row.model_type] = row
    return result


def _check_pairs(found: Tables) -> None:
    """Every pair is of families that have rows, and there is one for a source and a target."""
    seen: set[tuple[str, str]] = set()
    for pair in found.pairs:
        name = f"the conversion of {escape(pair.source)} to {escape(pair.target)}"
        if pair.source not in found.dense or pair.target not in found.moe:
            raise InputError(f"{name} is of a family that has no row", hint=_ADDED)
        if (pair.source, pair.target) in seen:
            raise InputError(f"two rows describe {name}", hint=_ADDED)
        seen.add((pair.source, pair.target))
