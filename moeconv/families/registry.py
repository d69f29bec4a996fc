"""All families, collected from the files of rows/ and from other packages (entry points `moeconv.families`)."""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TypeVar

from moeconv.families import rows
from moeconv.families.spec import Family, Pair
from moeconv.families.vendor import Vendor, Wrapper
from moeconv.plugins import added

GROUP = "moeconv.families"
Row = TypeVar("Row", Family, Wrapper)
# The files of rows/ in the order in which `moeconv families` lists their conversions. Other files follow in
# alphabetical order, so a new file need not be added here.
_LISTED = (
    "mistral", "qwen", "dots", "mellum", "hy", "glm", "solar", "granite", "aria", "gpt_oss", "dbrx", "ernie", "cohere",
    "hunyuan", "olmo", "lfm2", "qwen3_5", "nemotron", "gemma", "deepseek", "phi",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tables:
    """The rows of all vendors. A few families have a dense row and a row with experts under the same model_type."""

    dense: Mapping[str, Family]  # by model_type
    moe: Mapping[str, Family]  # by model_type
    # model_type of a multimodal model -> that of its text model -> row; if there are two, the one with experts
    wrapped: Mapping[str, Mapping[str, Family]]
    wrapped_dense: Mapping[str, Mapping[str, Family]]  # the dense rows among them, and those beside them
    wrappers: Mapping[str, Wrapper]  # by model_type
    pairs: tuple[Pair, ...]
    aliases: Mapping[str, str]  # another model_type of a family -> that of its row

    @property
    def families(self) -> Mapping[str, Family]:
        """The row of each language model by model_type; if there are two, the one with experts."""
        return {**self.dense, **self.moe}


@cache
def tables() -> Tables:
    """The tables of all vendors.

    Raises InputError, which names the package, for another package that cannot be loaded or whose rows contradict the
    others.
    """
    vendors = list(_built_in())

    def accept(vendor: Vendor) -> None:
        _merged([*vendors, vendor])
        vendors.append(vendor)

    added(GROUP, Vendor, accept=accept)
    return _merged(vendors)


def _built_in() -> Iterator[Vendor]:
    names = (module.name for module in pkgutil.iter_modules(rows.__path__))
    for name in sorted(names, key=lambda name: (_LISTED.index(name) if name in _LISTED else len(_LISTED), name)):
        yield import_module(f"{rows.__name__}.{name}").VENDOR


def _merged(vendors: Sequence[Vendor]) -> Tables:
    """The rows of all vendors by name. Raises ValueError for duplicate rows, and for a pair whose family has no row."""
    dense = _by_name("dense family", (row for vendor in vendors for row in vendor.dense))
    moe = _by_name("Mixture-of-Experts family", (row for vendor in vendors for row in vendor.moe))
    wrappers = _by_name("multimodal family", (wrapper for vendor in vendors for wrapper in vendor.wrappers))
    pairs = tuple(pair for vendor in vendors for pair in vendor.pairs)
    texts = [text for wrapper in wrappers.values() for text in wrapper.texts]
    inside = {kind: {text.model_type for text in texts if text.kind == kind} for kind in ("dense", "moe")}
    aliases = {alias: name for vendor in vendors for alias, name in vendor.aliases.items()}
    _check_aliases(aliases, dense.keys() | moe.keys() | wrappers.keys() | inside["dense"] | inside["moe"])
    _check_pairs(pairs, sources=dense.keys() | inside["dense"], alone=moe.keys(), inside=inside["moe"])
    by_kind = {
        kind: {
            name: {text.model_type: wrapper.row(text) for text in wrapper.texts if text.kind == kind}
            for name, wrapper in wrappers.items()
        }
        for kind in ("dense", "moe")
    }
    wrapped = {name: {**by_kind["dense"][name], **by_kind["moe"][name]} for name in wrappers}
    return Tables(dense, moe, wrapped, by_kind["dense"], wrappers, pairs, aliases)


def _by_name(what: str, found: Iterable[Row]) -> dict[str, Row]:
    result: dict[str, Row] = {}
    for row in found:
        if row.model_type in result:
            raise ValueError(f"two rows describe the {what} {row.model_type}")
        result[row.model_type] = row
    return result


def _check_aliases(aliases: Mapping[str, str], known: Collection[str]) -> None:
    """Raises ValueError for an alias that has a row of its own, and for an alias of a family without a row."""
    for alias, name in aliases.items():
        if alias in known or name not in known:
            why = "but has a row itself" if alias in known else "which has no row"
            raise ValueError(f"{alias} is an alias of {name}, {why}")


def _check_pairs(
    pairs: Sequence[Pair], *, sources: AbstractSet[str], alone: AbstractSet[str], inside: AbstractSet[str]
) -> None:
    """Raises ValueError for a pair of a family without a row, a duplicate pair, or a second default of a source.

    A source may have one default among the targets that exist `alone`, and one among those that exist only `inside`
    multimodal models.
    """
    seen: set[tuple[str, str]] = set()
    defaults: set[tuple[str, bool]] = set()
    for pair in pairs:
        name = f"the conversion of {pair.source} to {pair.target}"
        if pair.source not in sources or pair.target not in alone | inside:
            raise ValueError(f"{name} is of a family that has no row")
        if (pair.source, pair.target) in seen:
            raise ValueError(f"two rows describe {name}")
        default = (pair.source, pair.target in alone)
        if pair.default and default in defaults:
            raise ValueError(f"{name} is a second default for {pair.source}")
        seen.add((pair.source, pair.target))
        defaults |= {default} if pair.default else set()
