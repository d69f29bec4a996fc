"""The result of a verb in Python: the JSON object of its command, with a short text and a table for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence

from moeconv.units import human_bytes, human_count

_ROWS = 40  # of a table in a notebook


class VerbResult(dict[str, object]):
    """A dictionary with the fields that `moeconv.contract` describes."""

    def __init__(self, command: str, fields: Mapping[str, object]) -> None:
        super().__init__(fields)
        self._command = command

    def __repr__(self) -> str:
        words = ", ".join(f"{name}={value}" for name, value in _figures(self) if name != "warnings")
        return f"<moeconv {self._command}: {words}>"

    def _repr_html_(self) -> str:
        """A table for notebooks: the figures, then one table for each list of rows, such as the layers."""
        parts = [f"<b>moeconv {html.escape(self._command)}</b>", _table(("", ""), list(_figures(self)))]
        for name, rows in _lists(self):
            columns = [key for key, value in rows[0].items() if not isinstance(value, list | dict)]
            cells = [[_short(row.get(key)) for key in columns] for row in rows[:_ROWS]]
            more = f"<p>... and {len(rows) - _ROWS} more</p>" if len(rows) > _ROWS else ""
            parts.append(f"<details><summary>{html.escape(name)}</summary>{_table(columns, cells)}{more}</details>")
        return "".join(parts)


def _figures(result: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(name, value) of the most important figures."""
    for name in ("output", "path", "ok", "passed"):
        if result.get(name) is not None:
            yield name, str(result[name])
    parameters = result.get("parameters")
    if isinstance(parameters, Mapping):
        counts = [f"{human_count(parameters[k])} {k}" for k in ("total", "active") if parameters.get(k)]
        yield "parameters", ", ".join(counts)
    if isinstance(size := result.get("bytes"), int):
        yield "size", human_bytes(size)
    for name in ("loss", "perplexity", "kl", "top1_agreement", "seconds"):
        if isinstance(value := result.get(name), float):
            yield name, _short(value)
    if isinstance(found := result.get("warnings"), list) and found:
        yield "warnings", "; ".join(map(str, found))


def _lists(result: Mapping[str, object], under: str = "") -> Iterator[tuple[str, Sequence[Mapping[str, object]]]]:
    """The lists of rows in a result, at any depth, with their key paths."""
    for key, value in result.items():
        name = f"{under}.{key}" if under else key
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield name, value
        elif isinstance(value, dict):
            yield from _lists(value, name)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns) if any(columns) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"
