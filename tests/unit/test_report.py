"""The report: figures of what was measured, on one page without outside references."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from tiny import make_dense, make_moe

from moeconv.calibrate.artifact import load_statistics, write_statistics
from moeconv.families.model import open_model
from moeconv.inspect.run import inspect
from moeconv.report import svg
from moeconv.report.figures import dendrogram, gather
from moeconv.report.html import render


def write_random_statistics(path, model, *, seed=0):
    draw = np.random.default_rng(seed)
    e, fields = model.num_experts, {}
    for layer in model.moe_layers:
        cosine = np.clip(draw.normal(0.3, 0.3, (e, e)), -1, 1)
        count = draw.integers(1, 100, (2, e)).astype(np.float64)
        fields[layer] = {
            "count": count, "tokens": count.sum(1) / model.top_k, "entropy_sum": count.sum(1) * 0.5,
            "output_cosine": (cosine + cosine.T) / 2, "router_cosine": cosine, "logit_correlation": cosine,
        }  # fmt: skip
    metadata = {
        "identity": model.identity, "model_type": "mixtral", "layers": list(model.moe_layers), "num_experts": e,
        "top_k": model.top_k, "tokens": 100,
        "sources": [{"name": "<b>a", "sha256": "", "tokens": 50}, {"name": "b", "sha256": "", "tokens": 50}],
    }  # fmt: skip
    write_statistics(path, fields, metadata=metadata)
    return load_statistics(path)


class Page(HTMLParser):
    """Tags are balanced, and what refers to somewhere else is written down."""

    def __init__(self, text):
        super().__init__()
        self.open, self.outside, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")]
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_a_page_shows_what_was_measured_and_nothing_from_elsewhere(tmp_path, cli):
    dense, moe = make_dense(tmp_path / "dense", "llama", layers=3), tmp_path / "moe"
    results = [cli("upcycle", dense, moe, "--experts", "4", "--method", "drop", "--json").json]
    results.append(cli("prune", moe, tmp_path / "small", "--keep", "2", "--json").json)
    results[1]["warnings"].append("<script>alert(1)</script>")
    statistics = write_random_statistics(tmp_path / "s.safetensors", open_model(moe))
    for i, result in enumerate(results):
        (tmp_path / f"{i}.json").write_text(json.dumps(result))
    done = cli(
        "report", tmp_path / "small", tmp_path / "r.html", "--stats", tmp_path / "s.safetensors", "--reference", dense,
        "--results", tmp_path / "0.json", "--results", tmp_path / "1.json", "--title", "<i>mine", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    figures, text = done.json["figures"], (tmp_path / "r.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 1 and page.outside == []
    assert "alert(1)" not in text.split("<script>")[1]
    assert "&lt;script&gt;" in text and "&lt;i&gt;mine" in text and "<b>a" not in text
    assert [s["command"].split()[1] for s in figures["history"]] == ["upcycle", "prune"]
    assert figures["model"]["num_experts"] == 2 and figures["reference"]["kind"] == "dense"
    load = statistics.layer(0, "count").sum(0)
    assert figures["utilization"][0]["load"] == pytest.approx(load / load.sum())
    assert figures["statistics"]["of_this_model"] is False
    # a heat map for all text and one a source; a matrix and a tree a layer; scores; entropy
    assert page.tags.count("svg") == 3 + 1 + 2 * 3 + 1
    kept = [len(r["kept"]) for r in figures["pruning"]["layers"]]
    assert kept == [2, 2, 2]


def test_a_model_without_anything_measured_still_has_a_page(tmp_path):
    model = open_model(make_dense(tmp_path / "dense", "llama"))
    figures = gather(model)
    page = Page(render(figures, title="x"))
    assert page.tags.count("svg") == 0 and figures["model"] == inspect(model)


def test_statistics_of_a_stranger_are_refused_and_a_page_is_not_replaced_unasked(tmp_path, cli):
    model, other = make_moe(tmp_path / "a", seed=1), make_moe(tmp_path / "b", seed=2)
    write_random_statistics(tmp_path / "s.safetensors", open_model(other))
    done = cli("report", model, tmp_path / "r.html", "--stats", tmp_path / "s.safetensors", "--json")
    assert done.code == 3 and not (tmp_path / "r.html").exists()
    (tmp_path / "r.html").write_text("mine")
    assert cli("report", model, tmp_path / "r.html", "--json").code == 4
    refused = cli("report", model, tmp_path / "r.html", "--overwrite", "--json")
    assert refused.code == 4 and "not a report file of moeconv" in refused.json["error"]["message"]
    assert (tmp_path / "r.html").read_text() == "mine"
    (tmp_path / "r.html").unlink()
    for words in ([], ["--overwrite"]):
        assert cli("report", model, tmp_path / "r.html", *words, "--json").code == 0
    (tmp_path / "wrong.json").write_text('{"error": {"code": 3, "message": "x", "hint": ""}}')
    assert cli("report", model, tmp_path / "q.html", "--results", tmp_path / "wrong.json", "--json").code == 3


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [1, None, "a"], {"a": None}, float("inf")])
@pytest.mark.parametrize(
    "path", ["steps", "steps.0", "tune", "tune.layers", "tune.layers.0", "prune", "prune.keep", "prune.scores",
             "quantize", "quantize.error", "quantize.error.output", "curve", "curve.0",
             "upcycle.equivalence", "warnings", "reference", "sources", "gates"],
)  # fmt: skip
def test_a_result_of_any_shape_is_shown_or_left_out(tmp_path, path, value):
    model = open_model(make_moe(tmp_path / "moe"))
    result = {
        "command": "run", "tokens_per_second": 1.0, "perplexity": 2.0, "warnings": [],
        "tune": {"layers": [{"layer": 0, "max_over_mean": 1.0, "before": {}}]},
        "quantize": {"error": {"layers": [{"layer": 0}]}},
        "curve": [{"ratio": 0.5}],
        "prune": {"keep": {"0": [1]}, "scores": {"0": [1.0, 2.0]}}, "upcycle": {"equivalence": {}},
    }  # fmt: skip
    at, words = result, path.split(".")
    if words[0] == "steps" and len(words) == 2:
        result["steps"] = [value]
    else:
        for word in words[:-1]:
            at = at[int(word)] if isinstance(at, list) else at[word]
        at[int(words[-1]) if isinstance(at, list) else words[-1]] = value
    Page(render(gather(model, results=[result]), title="x"))


def test_the_curve_of_a_prune_and_the_error_of_a_quantize_are_drawn(tmp_path, cli):
    moe = make_moe(tmp_path / "moe", intermediate=128)
    done = cli("quantize", moe, tmp_path / "small", "--group-size", "32", "--json").json
    rows = done["quantize"]["error"]["layers"]
    outputs = [{"layer": r["layer"], "output_rms": 0.01, "output_rms_rtn": 0.1} for r in rows]
    done["quantize"]["error"]["output"] = {"layers": outputs}  # as gptq has it
    curve = {"command": "prune", "curve": [{"ratio": x, "loss": 3.0 + x, "kl": x} for x in (0.25, 0.5)]}
    figures = gather(open_model(moe), results=[done, curve])
    assert [r["relative_rms"] for r in figures["quantization_error"]] == [r["relative_rms"] for r in rows]
    assert figures["quantization_error"][0]["output_rms"] == 0.01 and len(figures["curve"]) == 2
    text = render(figures, title="x")
    assert Page(text).tags.count("svg") == 3 and "What pruning costs" in text and "nearest codes" in text


def test_the_tree_joins_the_closest_first():
    cosine = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    tree = dendrogram(cosine)
    assert set(tree["order"][:2]) == {0, 1} or set(tree["order"][1:]) == {0, 1}
    heights = sorted(max(ys) for _, ys in tree["joins"])
    assert heights == pytest.approx([0.1, (0.9 + 0.8) / 2])
    assert dendrogram(np.ones((1, 1))) is None


def test_axis_ticks_are_round_and_cover_the_values():
    for low, high in ((0, 1), (3.24, 3.41), (-2, 7), (0.0001, 0.0003), (5, 5)):
        found = svg.ticks(low, high, 5)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
        assert len({round(b - a, 9) for a, b in pairwise(found)}) == 1


def test_a_large_matrix_becomes_one_image():
    markup = svg.heatmap(np.random.default_rng(0).normal(size=(64, 64)), rows=range(64), columns=range(64), label="x")
    assert markup.count("<rect") < 20 and "data:image/png;base64," in markup
    assert re.search(r"<image [^>]*/>", markup)


def evaluation(path, *, loss, kl, passed):
    gate = {"limit": 0.1, "value": kl, "passed": passed}
    sources = [{"name": "held.txt", "tokens": 10, "loss": loss}]
    return {"path": str(path), "loss": loss, "perplexity": 2.0, "kl": kl, "tokens": 10, "tokens_per_second": 1.0,
            "reference": {"loss": 1.0, "perplexity": 2.7}, "sources": sources,
            "gates": {"max_kl": gate}, "passed": passed}  # fmt: skip


def test_the_verdict_the_losses_and_the_facts_come_first(tmp_path, cli):
    moe, out = make_moe(tmp_path / "moe"), tmp_path / "small"
    pruned = cli("prune", moe, out, "--keep", "2", "--json").json
    pruned["warnings"] = ["careful"]
    recipe = {"steps": [], "warnings": ["prune: careful", "other"]}
    good = gather(open_model(out), results=[pruned, evaluation(out, loss=1.05, kl=0.05, passed=True)])
    assert good["verdict"] == {"checked": 1, "failed": []}
    assert [(r["step"], r["loss"], r["kl"]) for r in good["pipeline"]] == [
        ("reference", 1.0, None), ("prune aimer", 1.05, 0.05),
    ]  # fmt: skip
    assert good["about"]["data"] == ["held.txt"] and good["about"]["date"] and "torch" in good["about"]["versions"]
    bad = gather(
        open_model(out), reference=open_model(moe),
        results=[
            recipe, pruned, evaluation(out, loss=1.5, kl=0.5, passed=False), {"ok": False, "problems": ["a is gone"]},
        ],
    )  # fmt: skip
    assert bad["verdict"]["failed"] == ["max_kl is 0.5000, the limit is 0.1", "verify: a is gone"]
    assert bad["warnings"] == ["other", "prune: careful"] or bad["warnings"] == ["careful", "other"]
    page = render(bad, title="t")
    assert page.index("2 of 2 checks failed") < page.index("What was done") and "compared with" in page
    assert ">1.5000<" in page and "1 check passed" in render(good, title="t")


def test_markdown_states_the_same_and_is_written_beside_the_page(tmp_path, cli):
    moe, out = make_moe(tmp_path / "moe"), tmp_path / "page.html"
    result = tmp_path / "e.json"
    result.write_text(json.dumps(evaluation(moe, loss=1.5, kl=0.5, passed=False) | {"warnings": ["a <b> | c"]}))
    words = ("report", moe, out, "--markdown", "--results", result, "--json")
    made = cli(*words).json
    text = (tmp_path / "page.md").read_text()
    assert made["markdown"] == str(tmp_path / "page.md") and "1 of 1 check failed" in text
    assert "| evaluate moe |" in text and "| max\\_kl | 0.5000 | 0.1000 | **failed** |" in text
    assert "a \\<b\\> \\| c" in text
    assert cli(*words).code == 4 and cli(*words, "--overwrite").code == 0
    (tmp_path / "page.md").write_text("mine")
    assert cli(*words, "--overwrite").code == 4 and (tmp_path / "page.md").read_text() == "mine"


def test_similarity_is_scaled_to_the_others_and_has_a_legend(tmp_path):
    model = open_model(make_moe(tmp_path / "moe"))
    figures = gather(model, statistics=write_random_statistics(tmp_path / "s.safetensors", model))
    for row in figures["similarity"]:
        row["output_cosine"] = [[1.0 if i == j else 0.04 for j in range(4)] for i in range(4)]
    page = render(figures, title="t")
    assert ">0.04<" in page and 'fill-opacity="1.000"' in page


def test_a_tree_of_many_experts_is_cut():
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(128, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    tree = dendrogram(vectors @ vectors.T)
    assert tree is not None and len(tree["order"]) == 32 and len(tree["joins"]) == 31
    held = [int(leaf[1:-1]) if isinstance(leaf, str) else 1 for leaf in tree["order"]]
    assert sum(held) == 128 and "<svg" in svg.tree(tree, label="t")


def test_a_curve_begins_at_the_unpruned_model_and_marks_what_was_chosen(tmp_path, cli):
    moe = make_moe(tmp_path / "moe")
    pruned = cli("prune", moe, tmp_path / "out", "--keep", "3", "--json").json
    points = [{"ratio": 0.25, "loss": 1.1, "kl": 0.1}, {"ratio": 0.5, "loss": 1.4, "kl": 0.3}]
    about = {"criterion": "reap", "refit": True, "reference_loss": 1.0}
    curve = {"command": "prune", "curve": points} | about
    page = render(gather(open_model(tmp_path / "out"), results=[curve, pruned]), title="t")
    assert "loss: 0, 1<" in page and "kl: 0, 0<" in page
    assert "Criterion reap, refitted." in page and ">3 kept<" in page and 'class="mark"' in page


def test_a_mix_of_experts_and_neurons_shows_both(tmp_path, cli):
    moe = make_moe(tmp_path / "moe", "qwen3_moe", experts=4, hidden=64, intermediate=64)
    pruned = cli("prune", moe, tmp_path / "out", "--keep", 3, "--width", 16, "--json").json
    pruned["prune"] |= {"shared_width_before": 64, "shared_width_after": 8}
    pruned["prune"]["mix"] = [
        {"experts": 3, "width": 16, "loss_increase": 0.1, "kl": 0.1, "tokens": 9, "chosen": True, "bytes": 1},
        {"experts": 2, "width": 32, "loss_increase": 0.2, "kl": 0.1, "tokens": 9, "chosen": False, "bytes": 1},
    ]
    points = [{"ratio": r, "loss": 1.0 + r, "kl": r, "removes": kind} for r in (0.25, 0.5)
              for kind in ("experts", "both", "neurons")]  # fmt: skip
    curve = {"command": "prune", "curve": points, "criterion": "reap", "refit": True, "reference_loss": 1.0}
    page = render(gather(open_model(tmp_path / "out"), results=[curve, pruned]), title="t")
    assert "Every expert keeps 16 of 32 neurons. The shared expert keeps 8 of 64 neurons." in page
    assert "tried, with the increase of the loss: 3 x 16 +0.1000 (chosen), 2 x 32 +0.2000." in page
    assert ">3 x 16 kept<" in page and "share of the weights of experts removed" in page
    assert all(f">{word}<" in page for word in ("experts alone", "both", "neurons alone"))
