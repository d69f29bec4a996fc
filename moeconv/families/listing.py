"""The JSON of `moeconv families`: the supported families, what can be done with each, and the conversions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from moeconv.contract import Families, FamilyPair, FamilySource
from moeconv.errors import UsageError, escape
from moeconv.families.find import accepted, find_family
from moeconv.families.hub_names import model_type_of
from moeconv.families.pairs import possible
from moeconv.families.registry import tables
from moeconv.families.served import ENGINES, evidence
from moeconv.families.spec import Family

FormatsOf = Callable[[Family], Sequence[str]]


def families(formats_of: FormatsOf, *, model: str | None = None) -> Families:
    """The supported families and conversions; with `model`, a model_type or a name on the hub, those of that family.

    `formats_of` returns the quantization formats that can store a family. Raises UsageError for an unknown name,
    Unsupported for a family that moeconv does not support.
    """
    known = tables()
    pairs: list[FamilyPair] = [
        {"from": p.source, "to": p.target, "exact": True, "default": p.default, "note": p.note} for p in known.pairs
    ]
    around = {name: sorted(rows) for name, rows in sorted(known.wrapped.items())}
    taken = accepted()
    sources = _sources(formats_of)
    listed: Families = {
        "dense": list(taken["dense"]), "moe": list(taken["moe"]), "multimodal": around, "pairs": pairs,
        "sources": sources,
    }  # fmt: skip
    return listed if model is None else _only(listed, _model_type(model, {row["model_type"] for row in sources}))


def _model_type(name: str, known: set[str]) -> str:
    """The model_type that a user means by a model_type or by a name on the hub."""
    if name in known:
        return name
    found = model_type_of(name)
    if found is None:
        at = name if "/" in name else f"OWNER/{name}"
        raise UsageError(
            f"--model {escape(name)}: no family is known by this name",
            hint=f"`moeconv inspect hf://{escape(at).removeprefix('hf://')}` reads its config.json, which decides.",
        )
    if found not in known:
        find_family({"model_type": found})  # raises Unsupported with the reason
    return found


def _only(listed: Families, model_type: str) -> Families:
    """What is listed about one model_type."""
    sources = [row for row in listed["sources"] if row["model_type"] == model_type]
    names = {model_type, *(row[key] for row in sources for key in ("alias_of", "text") if row[key] is not None)}
    return {
        "dense": [name for name in listed["dense"] if name in names],
        "moe": [name for name in listed["moe"] if name in names],
        "multimodal": {name: inside for name, inside in listed["multimodal"].items() if name in names},
        "pairs": [pair for pair in listed["pairs"] if pair["from"] in names or pair["to"] in names],
        "sources": sources,
    }


def _sources(formats_of: FormatsOf) -> list[FamilySource]:
    """Every model_type of a source, sorted: rows, multimodal models by the language model in them, and aliases."""
    known = tables()
    found = [_source(row, formats_of) for row in _rows()]
    for alias, model_type in known.aliases.items():
        found += [
            row | {"model_type": alias, "alias_of": model_type} for row in found if row["model_type"] == model_type
        ]
    return sorted(found, key=lambda row: (row["model_type"], row["kind"], row["text"] or ""))


def _rows() -> Iterator[Family]:
    known = tables()
    yield from (*known.dense.values(), *known.moe.values())
    for name, inside in known.wrapped.items():
        yield from inside.values()
        yield from (row for row in known.wrapped_dense.get(name, {}).values() if row not in inside.values())


def _source(row: Family, formats_of: FormatsOf) -> FamilySource:
    """What can be done with the checkpoints of a row. The engines of a dense row are those of what it becomes."""
    targets = list(dict.fromkeys(target.model_type for target in possible(row))) if row.kind == "dense" else []
    formats = list(formats_of(row))
    made = next(iter(targets), "") if row.kind == "dense" else row.model_type
    runs = row.remote is None or bool(row.remote.like)
    verbs = {
        "upcycle": targets, "prune": row.kind == "moe", "quantize": formats, "tune": row.kind == "moe" and runs,
        "calibrate": runs, "evaluate": runs,
    }  # fmt: skip
    return {
        "model_type": row.model_type,
        "kind": row.kind,
        "text": row.multimodal.text or None,
        "alias_of": None,
        "verbs": [verb for verb, can in verbs.items() if can],
        "targets": targets,
        "formats": formats,
        "runtimes": {engine: evidence(made, engine) for engine in ENGINES},
    }
