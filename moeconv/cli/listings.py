"""The tables of `moeconv families`, `moeconv formats` and `moeconv recipes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeconv.cli.tables import grid, pairs

if TYPE_CHECKING:
    from rich.table import Table

    from moeconv.contract import CopiedRecipe, Families, FamilySource, Formats, ShippedRecipes


def family_table(result: Families) -> list[Table]:
    """What can be done with each family, and the conversions. Multimodal models around several language models with
    which the same can be done share a row."""
    engines = list(result["sources"][0]["runtimes"])
    rows: dict[tuple[str, ...], list[str]] = {}
    for source in result["sources"]:
        kind = "MoE" if source["kind"] == "moe" else "dense"
        same = (source["model_type"], kind, _becomes(source), ", ".join(source["formats"]))
        inside = rows.setdefault((*same, *source["runtimes"].values()), [])
        inside += [f"as {source['alias_of']}"] if source["alias_of"] else []
        inside += [f"with {source['text']}"] if source["text"] else []
    listed = [[*row[:2], ", ".join(inside).replace(", with ", ", "), *row[2:]] for row, inside in rows.items()]
    conversions = [
        [p["from"], p["to"], "exact" if p["exact"] else "near", "yes" if p["default"] else "", p["note"]]
        for p in result["pairs"]
    ]
    found = [grid(["family", "kind", "", "becomes", "quantize --format", *engines], listed)]
    return found + ([grid(["from", "to", "", "default", "note"], conversions)] if conversions else [])


def _becomes(source: FamilySource) -> str:
    first, *others = source["targets"] or [""]
    return f"{first} (or {len(others)} others)" if len(others) > 1 else ", ".join([first, *others])


def format_table(result: Formats) -> list[Table]:
    """Formats, the runtimes that load them, and which of these were run, with notes about some."""
    if result["place"] is not None:
        short = [
            [f["name"], f["stored_bits"] or f["bits"] or "-", f["error"] or "-", f["command"]]
            for f in result["formats"]
        ]
        return [grid(["format", "bits", "error", "command"], short)]
    runtimes = list(result["formats"][0]["loads"])
    rows = [[f["name"], f["bits"] or "-", *(f["loads"][r] for r in runtimes)] for f in result["formats"]]
    formats = dict.fromkeys(f["format"] for f in result["formats"])
    known = (_how_known(result, format, runtime) for format in formats for runtime in runtimes)
    return [
        grid(["format", "bits", *runtimes], rows),
        grid(["format", "runtime", "run with", "note"], [row for row in known if any(row[2:])]),
    ]


def _how_known(result: Formats, format: str, runtime: str) -> list[str]:
    """A row: what of a format was run with a runtime, in which version, and what one should know of it."""
    of = [f for f in result["formats"] if f["format"] == format]
    run = {f["scheme"]: version for f in of if (version := f["measured"][runtime])}
    schemes = f" ({', '.join(run)})" if len(run) < len(of) else ""
    return [format, runtime, next(iter(run.values())) + schemes if run else "", of[0]["notes"].get(runtime, "")]


def recipe_table(result: ShippedRecipes | CopiedRecipe) -> list[Table]:
    """The recipes that ship with moeconv, or what was copied."""
    if "output" in result:
        return [pairs({"output": result["output"]})]
    rows = [[r["name"], ", ".join(r["files"]), r["about"]] for r in result["recipes"]]
    return [grid(["recipe", "files", ""], rows)]
