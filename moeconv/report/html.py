"""The HTML report: one self-contained page, light and dark, readable without scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moeconv import __version__
from moeconv.checkpoint.target import starts_with
from moeconv.report import svg
from moeconv.units import human_bytes, human_count, human_seconds

_PAGE = Path(__file__).parent / "page"
# what every page has begun with and says of itself
_MARKS = ((b"<!doctype html>", b"report of moeconv "),)
_FOLD_ABOVE = 8  # layers; more small charts than this are folded away
_NONE = "–"
_ERRORS = {
    "relative_rms": "weights",
    "output_rms": "outputs",
    "output_rms_rtn": "outputs, nearest codes",
}  # keys of a layer's error -> what it is of


def render(figures: Mapping[str, Any], *, title: str) -> str:
    """The page of `figures.gather(...)`."""
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
        style=Markup((_PAGE / "style.css").read_text("utf-8")),
        model=figures["model"],
        reference=figures["reference"],
        reference_word="the reference",
        warnings=figures["warnings"],
        history=figures["history"],
        evaluations=figures["evaluations"],
        tiles=_tiles(figures),
        pipeline=_pipeline(figures["pipeline"]),
        compared=_compared(figures["model"], figures["reference"]),
        roles=_roles(figures["model"]),
        charts=[chart for chart in _charts(figures) if chart["figures"]],
        balance=_balance(figures),
        balance_title="Balance of the routers",
    )


def is_report(path: Path) -> bool:
    """Whether a file is a page that `render` made."""
    return starts_with(path, *_MARKS)


def _or_none(show: Any) -> Any:
    return lambda value: _NONE if value is None else show(value)


# -- tables ------------------------------------------------------------------------------------------------------------


def _tiles(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    model = figures["model"]
    tiles = [
        {"value": human_count(model["parameters"]["total"]), "word": "parameters"},
        {"value": human_count(model["parameters"]["active"]), "word": "active per token"},
        {"value": human_bytes(model["bytes"]), "word": f"in {_files(model['shards'])}"},
    ]
    if model["num_experts"]:
        tiles.append({"value": f"{model['num_experts']} × top-{model['top_k']}",
                      "word": f"experts in {len(model['moe_layers'])} of {model['layers']} layers"})  # fmt: skip
    if model["quantization"]:
        tiles.append(
            {"value": f"{8 * model['bytes'] / model['parameters']['total']:.2f}", "word": "bits per parameter"}
        )
    losses = [r for r in figures["pipeline"] if r["loss"] is not None]
    if losses:
        note = f"{losses[-1]['loss'] - losses[0]['loss']:+.4f} on {losses[0]['step']}" if len(losses) > 1 else ""
        tiles.append({"value": f"{losses[-1]['loss']:.4f}", "word": "loss, nats per token", "note": note})
    check = figures["equivalence"]
    if isinstance(check.get("relative"), float) and check["relative"] < 1e-2:
        tiles.append({"value": f"{check['relative']:.1e}", "word": "of the logits' spread from the source"})
    return tiles


def _files(count: int) -> str:
    return "one file" if count == 1 else f"{count} files"


def _pipeline(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    losses = [r["loss"] for r in rows if r["loss"] is not None]
    most = max((loss - losses[0] for loss in losses), default=0.0)
    made = []
    for row in rows:
        above = None if row["loss"] is None else row["loss"] - losses[0]
        share = None if above is None else (100 * max(0.0, above) / most if most > 0 else 0.0)
        made.append({**row, "above": above, "share": None if share is None else round(share, 1)})
    return made


def _compared(model: Mapping[str, Any], reference: Mapping[str, Any] | None) -> list[dict[str, str]]:
    words: list[tuple[str, Callable[[Mapping[str, Any]], Any], Callable[[Any], str]]] = [
        ("parameters", lambda m: m["parameters"]["total"], human_count),
        ("active per token", lambda m: m["parameters"]["active"], human_count),
        ("FLOPs per token", lambda m: m["flops_per_token"], human_count),
        ("bytes", lambda m: m["bytes"], human_bytes),
        ("experts' parameters", lambda m: m["parameters"]["experts"], human_count),
        ("router's parameters", lambda m: m["parameters"]["router"], human_count),
        ("layers", lambda m: m["layers"], str),
        ("tensors", lambda m: m["tensors"], str),
    ]
    rows = []
    for word, take, show in words:
        ours, theirs = take(model), take(reference) if reference else None
        ratio = f"{ours / theirs:.2f}" if theirs else _NONE
        rows.append(
            {"word": word, "ours": show(ours), "theirs": _NONE if theirs is None else show(theirs), "ratio": ratio}
        )
    return rows


def _roles(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    total = sum(model["bytes_by_role"].values()) or 1
    rows = []
    for role, size in sorted(model["bytes_by_role"].items(), key=lambda pair: -pair[1]):
        share = 100 * size / total
        rows.append({"role": role, "parameters": model["parameters_by_role"].get(role), "bytes": size,
                     "share": round(share, 1), "word": f"{share:.1f} %"})  # fmt: skip
    return rows


def _balance(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"layer": r["layer"], "entropy": r["entropy"], "share": f"{100 * r['entropy_share']:.1f} %",
         "max_over_mean": f"{r['max_over_mean']:.2f}", "dead": r["dead"]}
        for r in figures.get("utilization", ())
    ]  # fmt: skip


# -- charts ------------------------------------------------------------------------------------------------------------


def _charts(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        _curve(figures),
        _pruned(figures),
        _utilization(figures),
        _similarity(figures),
        _tuned(figures),
        _packed(figures),
    ]


def _chart(title: str, figures: Sequence[tuple[str, Markup]], *, text: str = "", folded: str = "") -> dict[str, Any]:
    shown = [{"caption": caption, "svg": markup} for caption, markup in figures if markup]
    return {"title": title, "text": text, "folded": folded, "figures": shown}


def _utilization(figures: Mapping[str, Any]) -> dict[str, Any]:
    rows = figures.get("utilization", ())
    if not rows:
        return _chart("", [])
    about = figures["statistics"]
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


def _similarity(figures: Mapping[str, Any]) -> dict[str, Any]:
    rows = figures.get("similarity", ())
    drawn = []
    for row in rows:
        matrix, layer = row["output_cosine"], row["layer"]
        markup = svg.heatmap(matrix, rows=range(len(matrix)), columns=range(len(matrix)), most=1.0, width=260,
                             label=f"similarity of experts in layer {layer}")  # fmt: skip
        if row["dendrogram"]:
            markup += svg.tree(row["dendrogram"], label=f"tree of experts in layer {layer}")
        drawn.append((f"layer {layer}", markup))
    folded = f"{len(rows)} layers" if len(rows) > _FOLD_ABOVE else ""
    text = (
        "Cosine of two experts' outputs, mean over tokens that both are shown (negative ones in the second colour), "
        "and the tree that joins experts at 1 − cosine. Experts that answer alike can be removed or merged."
    )
    return _chart("Similarity of experts", drawn, text=text, folded=folded)


def _pruned(figures: Mapping[str, Any]) -> dict[str, Any]:
    pruning = figures["pruning"]
    if not pruning:
        return _chart("", [])
    rows = [
        (r["layer"], r["scores"], [e in r["kept"] for e in range(len(r["scores"]))])
        for r in pruning["layers"] if r["scores"] and all(v is not None for v in r["scores"])
    ]  # fmt: skip
    text = (
        f"{pruning['before']} experts a layer became {pruning['after']} by {pruning['criterion']}. A row is a layer, a "
        "dot an expert at its score, as a share of the layer's largest; hollow ones were removed."
    )
    return _chart("Scores of experts", [("", svg.strip(rows, label="scores per layer"))] if rows else [], text=text)


def _tuned(figures: Mapping[str, Any]) -> dict[str, Any]:
    tuning = figures["tuning"]
    if not tuning or not tuning["layers"]:
        return _chart("", [])
    layers = [r["layer"] for r in tuning["layers"]]
    series = [(when, layers, [r[when]["max_over_mean"] for r in tuning["layers"]]) for when in ("before", "after")]
    words = [
        f"{name} {tuning[f'{name}_before']:.4f} to {tuning[f'{name}_after']:.4f}"
        for name in ("loss", "kl", "error")
        if tuning[f"{name}_before"] is not None and tuning[f"{name}_after"] is not None
    ]
    text = f"{tuning['objective']}, {tuning['steps']} steps, on text held out from them: {', '.join(words)}."
    chart = svg.lines(series, x_word="layer", y_word="max / mean", label="load balance")
    return _chart("Tuning", [("largest load over the mean", chart)], text=text)


def _packed(figures: Mapping[str, Any]) -> dict[str, Any]:
    layers = [r for r in figures["quantization_error"] if r["layer"] is not None]
    at = [r["layer"] for r in layers]
    known = [k for k in _ERRORS if layers and all(isinstance(r.get(k), float) for r in layers)]
    series = [(_ERRORS[k], at, [r[k] for r in layers]) for k in known]
    drawn = [("", svg.lines(series, x_word="layer", y_word="relative RMS error", y_from=0.0, label="error per layer"))]
    return _chart("Quantization error by layer", drawn)


def _curve(figures: Mapping[str, Any]) -> dict[str, Any]:
    points = figures["curve"]
    series = []
    for name in ("loss", "kl"):
        known = [p for p in points if isinstance(p.get(name), float) and isinstance(p.get("ratio"), int | float)]
        series.append((name, [p["ratio"] for p in known], [p[name] for p in known]))
    drawn = [
        (word, svg.lines([one], x_word="share of experts removed", y_word="nats per token", label=word))
        for word, one in zip(("loss", "KL to the unpruned model"), series)
    ]
    return _chart("What pruning costs", drawn)
