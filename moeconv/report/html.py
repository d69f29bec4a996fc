"""The HTML report: one self-contained page in light and dark colours. Its script only sorts tables and picks layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NotRequired

from markupsafe import Markup
from typing_extensions import TypedDict

from moeconv import __version__
from moeconv.checkpoint.target import starts_with
from moeconv.contract import Inspected
from moeconv.report import svg
from moeconv.report.pruning import curve_mark, curve_series, curve_x, removed
from moeconv.report.types import Figures, Number, PipelineRow, PruningLayer, TuningFigures, Verdict
from moeconv.units import counted, human_bytes, human_count, human_seconds

_PAGE = Path(__file__).parent / "page"
# the bytes that identify a page of `render`: its beginning, and words in it
_MARKS = ((b"<!doctype html>", b"report of moeconv "),)
_FOLD_ABOVE = 8  # layers; more charts than this are hidden until they are opened
_NONE = "–"


class _Tile(TypedDict):
    """A large figure at the top of the page, with a word under it."""

    value: str
    word: str
    note: NotRequired[str]


class _LossRow(PipelineRow):
    """A step, its loss above that of the first row, and that as a share of the largest, in percent."""

    above: float | None
    share: float | None


class _ComparedRow(TypedDict):
    """One size of this model and of the reference, in words."""

    word: str
    ours: str
    theirs: str
    ratio: str


class _RoleRow(TypedDict):
    """The parameters and bytes of one role."""

    role: str
    parameters: int | None
    bytes: int
    share: float
    word: str


class _BalanceRow(TypedDict):
    """The balance of one layer's router."""

    layer: int
    entropy: float
    share: str
    max_over_mean: str
    dead: int


class _Drawing(TypedDict):
    """A drawing with its caption."""

    caption: str
    svg: Markup


class _Chart(TypedDict):
    """A section of drawings; `folded` is the title under which they are hidden until they are opened."""

    title: str
    text: str
    folded: str
    figures: list[_Drawing]


_NO_CHART: _Chart = {"title": "", "text": "", "folded": "", "figures": []}


def render(figures: Figures, *, title: str) -> str:
    """The HTML page of the figures that `figures.gather` returned."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "count": _or_none(human_count), "bytes": _or_none(human_bytes), "seconds": _or_none(human_seconds),
        "fixed": _or_none(lambda n: f"{n:.4f}"), "fixed3": _or_none(lambda n: f"{n:.3f}"),
        "signed": _or_none(lambda n: f"{n:+.4f}"), "percent": _or_none(lambda n: f"{100 * n:.2f} %"),
        "whole": _or_none(lambda n: f"{n:,.0f}"),
    }  # fmt: skip
    return environment.get_template("page.html").render(
        title=title,
        version=__version__,
        script=Markup((_PAGE / "script.js").read_text("utf-8")),
        verdict=figures["verdict"],
        verdict_word=verdict_word(figures["verdict"]),
        facts=facts(figures),
        style=Markup((_PAGE / "style.css").read_text("utf-8")),
        model=figures["model"],
        reference=figures["reference"],
        reference_word="the reference",
        warnings=figures["warnings"],
        history=figures["history"],
        evaluations=figures["evaluations"],
        tiles=_tiles(figures),
        pipeline=_pipeline(figures["pipeline"]),
        samples=figures.get("samples", []),
        compared=_compared(figures["model"], figures["reference"]),
        roles=_roles(figures["model"]),
        charts=[chart for chart in _charts(figures) if chart["figures"]],
        balance=_balance(figures),
        balance_title="Balance of the routers",
    )


def verdict_word(verdict: Verdict) -> str:
    """The verdict in one line."""
    failed, checked = verdict["failed"], verdict["checked"]
    if not checked:
        return "The results contain no check or gate"
    return f"{len(failed)} of {counted(checked, 'check')} failed" if failed else f"{counted(checked, 'check')} passed"


def facts(figures: Figures) -> list[tuple[str, str]]:
    """(label, fact) of what the report is about."""
    about = figures["about"]
    found = [
        ("model", about["path"]),
        ("compared with", about["reference"] or ""),
        ("written", about["date"] or ""),
        ("versions", ", ".join(f"{name} {number}" for name, number in about["versions"].items())),
        ("data", ", ".join(about["data"])),
    ]
    return [(word, fact) for word, fact in found if fact]


def is_report(path: Path) -> bool:
    """Whether a file is a page of `render`."""
    return starts_with(path, *_MARKS)


def _or_none(show: Callable[[float], str]) -> Callable[[Number], str]:
    """`show` with a dash for None."""
    return lambda value: _NONE if value is None else show(value)


_count = _or_none(human_count)


# -- tables ------------------------------------------------------------------------------------------------------------


def _tiles(figures: Figures) -> list[_Tile]:
    model = figures["model"]
    total = model["parameters"]["total"]
    tiles: list[_Tile] = [
        {"value": _count(total), "word": "parameters"},
        {"value": _count(model["parameters"]["active"]), "word": "active per token"},
        {"value": human_bytes(model["bytes"]), "word": f"in {_files(model['shards'])}"},
    ]
    if model["num_experts"]:
        tiles.append({"value": f"{model['num_experts']} × top-{model['top_k']}",
                      "word": f"experts in {len(model['moe_layers'] or ())} of {model['layers']} layers"})  # fmt: skip
    if model["quantization"] and total:
        tiles.append({"value": f"{8 * model['bytes'] / total:.2f}", "word": "bits per parameter"})
    losses = [(row["step"], row["loss"]) for row in figures["pipeline"] if row["loss"] is not None]
    if losses:
        (first_step, first), (_, last) = losses[0], losses[-1]
        note = f"{last - first:+.4f} on {first_step}" if len(losses) > 1 else ""
        tiles.append({"value": f"{last:.4f}", "word": "loss, nats per token", "note": note})
    relative = figures["equivalence"].get("relative")
    if isinstance(relative, float) and relative < 1e-2:
        tiles.append({"value": f"{relative:.1e}", "word": "of the logits' spread from the source"})
    return tiles


def _files(count: int) -> str:
    return "one file" if count == 1 else f"{count} files"


def _pipeline(rows: Sequence[PipelineRow]) -> list[_LossRow]:
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    most = max((loss - losses[0] for loss in losses), default=0.0)
    made: list[_LossRow] = []
    for row in rows:
        above = None if row["loss"] is None else row["loss"] - losses[0]
        share = None if above is None else (100 * max(0.0, above) / most if most > 0 else 0.0)
        made.append({**row, "above": above, "share": None if share is None else round(share, 1)})
    return made


_COMPARED: tuple[tuple[str, Callable[[Inspected], int | None], Callable[[float], str]], ...] = (
    ("parameters", lambda m: m["parameters"]["total"], human_count),
    ("active per token", lambda m: m["parameters"]["active"], human_count),
    ("FLOPs per token", lambda m: m["flops_per_token"], human_count),
    ("bytes", lambda m: m["bytes"], human_bytes),
    ("experts' parameters", lambda m: m["parameters"]["experts"], human_count),
    ("router's parameters", lambda m: m["parameters"]["router"], human_count),
    ("layers", lambda m: m["layers"], str),
    ("tensors", lambda m: m["tensors"], str),
)


def _compared(model: Inspected, reference: Inspected | None) -> list[_ComparedRow]:
    rows: list[_ComparedRow] = []
    for word, take, show in _COMPARED:
        ours, theirs = take(model), take(reference) if reference else None
        ratio = f"{ours / theirs:.2f}" if ours is not None and theirs else _NONE
        rows.append({"word": word, "ours": _or_none(show)(ours), "theirs": _or_none(show)(theirs), "ratio": ratio})
    return rows


def _roles(model: Inspected) -> list[_RoleRow]:
    total = sum(model["bytes_by_role"].values()) or 1
    rows: list[_RoleRow] = []
    for role, size in sorted(model["bytes_by_role"].items(), key=lambda pair: -pair[1]):
        share = 100 * size / total
        rows.append({"role": role, "parameters": model["parameters_by_role"].get(role), "bytes": size,
                     "share": round(share, 1), "word": f"{share:.1f} %"})  # fmt: skip
    return rows


def _balance(figures: Figures) -> list[_BalanceRow]:
    return [
        {"layer": r["layer"], "entropy": r["entropy"], "share": f"{100 * r['entropy_share']:.1f} %",
         "max_over_mean": f"{r['max_over_mean']:.2f}", "dead": r["dead"]}
        for r in figures.get("utilization", ())
    ]  # fmt: skip


# -- charts ------------------------------------------------------------------------------------------------------------


def _charts(figures: Figures) -> list[_Chart]:
    return [
        _curve(figures),
        _pruned(figures),
        _utilization(figures),
        _similarity(figures),
        _tuned(figures),
        _packed(figures),
    ]


def _chart(title: str, drawings: Sequence[tuple[str, Markup]], *, text: str = "", folded: str = "") -> _Chart:
    shown: list[_Drawing] = [{"caption": caption, "svg": markup} for caption, markup in drawings if markup]
    return {"title": title, "text": text, "folded": folded, "figures": shown}


def _utilization(figures: Figures) -> _Chart:
    rows, about = figures.get("utilization"), figures.get("statistics")
    if not rows or about is None:
        return _NO_CHART
    experts = about["num_experts"]
    word = "this model" if about["of_this_model"] else "an earlier step of this model"
    drawn = [
        ("share of a layer's routed tokens, 1 = even", svg.heatmap(
            [[share * experts for share in r["load"]] for r in rows], rows=[r["layer"] for r in rows],
            columns=range(experts), row_word="layer", column_word="expert", label="utilization per layer and expert"))
    ]  # fmt: skip
    names = about["sources"]
    if len(names) > 1:
        drawn += [
            (f"on {name} alone", svg.heatmap(
                [[share * experts for share in r["by_source"][i]] for r in rows], rows=[r["layer"] for r in rows],
                columns=range(experts), row_word="layer", column_word="expert", label=f"utilization on {name}"))
            for i, name in enumerate(names)
        ]  # fmt: skip
    layers = [r["layer"] for r in rows]
    entropy = ("share of its maximum", layers, [r["entropy_share"] for r in rows])
    drawn.append(("entropy of the router", svg.lines([entropy], x_word="layer", y_word="of ln(experts)", y_from=0.0,
                                                     label="router entropy per layer")))  # fmt: skip
    return _chart("Utilization", drawn, text=f"Measured on {about['tokens']:,} tokens through {word}.")


def _similarity(figures: Figures) -> _Chart:
    rows = figures.get("similarity", ())
    drawn = []
    for row in rows:
        matrix, layer = _without_diagonal(row["output_cosine"]), row["layer"]
        markup = svg.heatmap(matrix, rows=range(len(matrix)), columns=range(len(matrix)), width=260,
                             label=f"similarity of experts in layer {layer}")  # fmt: skip
        if row["dendrogram"]:
            markup += svg.tree(row["dendrogram"], label=f"tree of experts in layer {layer}")
        drawn.append((f"layer {layer}", markup))
    folded = f"{len(rows)} layers" if len(rows) > _FOLD_ABOVE else ""
    text = (
        "The cosine of two experts' outputs, as the mean over tokens that both compute (negative values have the "
        "second colour), and the tree that joins experts at distance 1 − cosine. Experts with similar outputs can be "
        "removed or merged."
    )
    return _chart("Similarity of experts", drawn, text=text, folded=folded)


def _without_diagonal(matrix: list[list[float]]) -> list[list[float]]:
    """The matrix with a diagonal of 0, so that the colours show the differences between experts."""
    return [[0.0 if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]


def _pruned(figures: Figures) -> _Chart:
    pruning = figures["pruning"]
    if not pruning:
        return _NO_CHART
    rows = [row for layer in pruning["layers"] if (row := _scores(layer)) is not None]
    text = removed(pruning)
    if rows:
        text += (
            " Each row is a layer, and each dot an expert at its score relative to the largest of the layer; hollow "
            "dots were removed."
        )
    drawn = [("", svg.strip(rows, label="scores per layer"))] if rows else []
    return _chart("Scores of experts" if rows else "Pruning", drawn, text=text)


def _scores(layer: PruningLayer) -> tuple[str, list[float], list[bool]] | None:
    """(layer, the scores of its experts, which were kept); None where a score is missing."""
    scores = [score for score in layer["scores"] if score is not None]
    if not scores or len(scores) < len(layer["scores"]):
        return None
    return layer["layer"], scores, [expert in layer["kept"] for expert in range(len(scores))]


def _tuned(figures: Figures) -> _Chart:
    tuning = figures["tuning"]
    if not tuning or not tuning["layers"]:
        return _NO_CHART
    layers = [r for r in tuning["layers"] if r["layer"] is not None]
    at = [r["layer"] for r in layers if r["layer"] is not None]
    series = [
        ("before", at, [r["before"]["max_over_mean"] for r in layers]),
        ("after", at, [r["after"]["max_over_mean"] for r in layers]),
    ]
    changes = ", ".join(_changes(tuning))
    text = f"{tuning['objective']}, {tuning['steps']} steps, measured on held-out text: {changes}."
    chart = svg.lines(series, x_word="layer", y_word="max / mean", label="load balance")
    return _chart("Tuning", [("largest load over the mean", chart)], text=text)


def _changes(tuning: TuningFigures) -> list[str]:
    """The figures before and after training, where the objective has them."""
    pairs = {
        "loss": (tuning["loss_before"], tuning["loss_after"]),
        "kl": (tuning["kl_before"], tuning["kl_after"]),
        "error": (tuning["error_before"], tuning["error_after"]),
    }
    return [
        f"{name} {before:.4f} to {after:.4f}"
        for name, (before, after) in pairs.items()
        if before is not None and after is not None
    ]


def _packed(figures: Figures) -> _Chart:
    layers = [r for r in figures["quantization_error"] if r["layer"] is not None]
    at = [r["layer"] for r in layers if r["layer"] is not None]
    errors = {
        "weights": [r["relative_rms"] for r in layers],
        "outputs": [r["output_rms"] for r in layers],
        "outputs, nearest codes": [r["output_rms_rtn"] for r in layers],
    }
    series = [(name, at, ys) for name, ys in errors.items() if ys and all(isinstance(y, float) for y in ys)]
    drawn = [("", svg.lines(series, x_word="layer", y_word="relative RMS error", y_from=0.0, label="error per layer"))]
    return _chart("Quantization error by layer", drawn)


def _curve(figures: Figures) -> _Chart:
    about = figures["curve_of"]
    if about is None:
        return _NO_CHART
    x_word, mark = curve_x(figures["curve"]), curve_mark(figures["pruning"])
    drawn = []
    for key, word, first in (("loss", "loss", about["reference_loss"]), ("kl", "KL to the unpruned model", 0.0)):
        series = curve_series(figures["curve"], key, first=first)
        drawn.append((word, svg.lines(series, x_word=x_word, y_word="nats per token", label=word, mark=mark)))
    text = f"Criterion {about['criterion']}, {'refitted' if about['refit'] else 'without a refit'}."
    return _chart("What pruning costs", drawn, text=text)
