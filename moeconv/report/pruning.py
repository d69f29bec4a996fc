"""What a report says of a prune: the experts and neurons that it removed, and the lines of its curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeconv.errors import escape
from moeconv.report.svg import Series
from moeconv.report.types import Number, PruningFigures

_REMOVES = {"experts": "experts alone", "both": "both", "neurons": "neurons alone"}


def removed(pruning: PruningFigures) -> str:
    """What was removed, and which mixes of experts and neurons were tried, in words."""
    sentences = []
    if pruning["after"] != pruning["before"]:
        sentences.append(f"{pruning['criterion']} reduced {pruning['before']} experts per layer to {pruning['after']}.")
    if pruning["width_after"] is not None:
        sentences.append(f"Every expert keeps {pruning['width_after']} of {pruning['width_before']} neurons.")
    if pruning["shared_width_after"] is not None:
        kept, of = pruning["shared_width_after"], pruning["shared_width_before"]
        sentences.append(f"The shared expert keeps {kept} of {of} neurons.")
    tried = [
        f"{p['experts']} x {p['width']} {p['loss_increase']:+.4f}{' (chosen)' if p['chosen'] else ''}"
        for p in pruning["mix"] if p["loss_increase"] is not None
    ]  # fmt: skip
    if tried:
        sentences.append(f"Experts x neurons that were tried, with the increase of the loss: {', '.join(tried)}.")
    return " ".join(sentences)


def curve_x(points: Sequence[Mapping[str, object]]) -> str:
    """What the x axis of a curve shows."""
    return f"share of {'experts' if _kinds(points) == [None] else 'the weights of experts'} removed"


def curve_mark(pruning: PruningFigures | None) -> tuple[float, str] | None:
    """(the share that was removed, what was kept) of the last prune; None if there is none."""
    if not pruning or not pruning["before"] or pruning["after"] is None:
        return None
    share, word = pruning["after"] / pruning["before"], f"{pruning['after']}"
    if pruning["width_before"] and pruning["width_after"] is not None:
        share *= pruning["width_after"] / pruning["width_before"]
        word += f" x {pruning['width_after']}"
    return 1 - share, f"{word} kept"


def curve_series(points: Sequence[Mapping[str, object]], key: str, *, first: Number) -> list[Series]:
    """The lines of a curve: one, or with --mix one each for experts alone, neurons alone, and both. They begin with the
    unpruned model, whose value is `first`."""
    series: list[Series] = []
    for kind in _kinds(points):
        line = [
            (ratio, y) for p in points
            if p.get("removes") == kind and isinstance(y := p.get(key), float)
            and isinstance(ratio := p.get("ratio"), int | float)
        ]  # fmt: skip
        if first is not None and all(ratio for ratio, _ in line):
            line.insert(0, (0.0, float(first)))
        name = key if kind is None else _REMOVES.get(str(kind), escape(kind))
        series.append((name, [ratio for ratio, _ in line], [y for _, y in line]))
    return series


def _kinds(points: Sequence[Mapping[str, object]]) -> list[object]:
    return list(dict.fromkeys(p.get("removes") for p in points))
