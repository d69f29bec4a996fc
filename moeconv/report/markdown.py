"""The report as Markdown, for a comment on a pull request or the summary of a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeconv import __version__
from moeconv.checkpoint.target import starts_with
from moeconv.report.html import facts, verdict_word
from moeconv.report.types import Figures, Number
from moeconv.units import human_bytes, human_count, human_seconds

_MARK = "<!-- report of moeconv "


def render_markdown(figures: Figures, *, title: str) -> str:
    """The verdict, the sizes, and the table of the steps with their losses."""
    verdict, model = figures["verdict"], figures["model"]
    sign = "❌" if verdict["failed"] else "✅" if verdict["checked"] else "➖"
    parts = [f"{_MARK}{__version__} -->", f"## {_plain(title)}", f"{sign} **{verdict_word(verdict)}**"]
    if verdict["failed"]:
        parts.append("\n".join(f"- {_plain(text)}" for text in verdict["failed"]))
    sizes = [
        ("parameters", _shown(model["parameters"]["total"], human_count)),
        ("active per token", _shown(model["parameters"]["active"], human_count)),
        ("size", human_bytes(model["bytes"])),
        ("experts", f"{model['num_experts']} × top-{model['top_k']}" if model["num_experts"] else "–"),
    ]
    parts.append(_table(["", ""], [*sizes, *facts(figures)]))
    if figures["pipeline"]:
        rows = [
            [r["step"], _shown(r["total"], human_count), _shown(r["active"], human_count),
             _shown(r["bytes"], human_bytes), _shown(r["loss"], _fixed), _shown(r["kl"], _fixed),
             _shown(r["seconds"], human_seconds)]
            for r in figures["pipeline"]
        ]  # fmt: skip
        parts.append(_table(["step", "parameters", "active", "bytes", "loss", "KL", "time"], rows))
    gates = [
        [g["name"], _shown(g["value"], _fixed), _shown(g["limit"], _fixed), "passed" if g["passed"] else "**failed**"]
        for evaluation in figures["evaluations"] for g in evaluation["gates"]
    ]  # fmt: skip
    if gates:
        parts.append(_table(["gate", "value", "limit", ""], gates))
    if samples := figures.get("samples"):
        compared = figures["reference"] is not None
        rows = [
            [s["prompt"], *([s["before"] or ""] if compared else []), s["after"] + (" …" if s["cut"] else "")]
            for s in samples
        ]  # fmt: skip
        parts.append(_table(["prompt", *(["reference"] if compared else []), "this model"], rows))
    if figures["warnings"]:
        listed = "\n".join(f"- {_plain(text)}" for text in figures["warnings"])
        parts.append(f"<details><summary>Warnings: {len(figures['warnings'])}</summary>\n\n{listed}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def is_markdown_report(path: Path) -> bool:
    """Whether `render_markdown` wrote a file."""
    return starts_with(path, (_MARK.encode(), b""))


def _fixed(value: float) -> str:
    return f"{value:.4f}"


def _shown(value: Number, show: object) -> str:
    return "–" if value is None else str(show(value)) if callable(show) else str(value)


def _plain(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    words = " ".join(str(text).split())
    for sign in "\\`*_[]<>|":
        words = words.replace(sign, f"\\{sign}")
    return words


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)])


def _cell(text: str) -> str:
    return text if text == "**failed**" else _plain(text)
