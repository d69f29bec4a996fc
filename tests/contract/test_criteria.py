"""Contract: every criterion of the registry orders the experts, reads what it declares, and prunes by the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import make_moe
from words import add_tokenizer, text

from moeconv.calibrate.artifact import load_statistics
from moeconv.calibrate.run import calibrate
from moeconv.calibrate.weights import measure_experts, weight_cosine
from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.families.rule import rule_of
from moeconv.options import PruneOptions
from moeconv.prune.bootstrap import can_resample, stability
from moeconv.prune.criteria import CRITERIA, OF_WEIGHTS, SIMILARITIES, Evidence, criterion, measured, stats, weights

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = 6
SAMPLE = {"sample_logits", "sample_outputs", "sample_scale", "sample_bias", "sample_factor", "sample_unit"}
SIMILAR = {"output_cosine", "router_cosine", "logit_correlation"}
EVERY = pytest.mark.parametrize("name", list(CRITERIA))


class Watched:
    """Statistics that remember which fields were read."""

    def __init__(self, statistics):
        self.whole, self.read = statistics, set()

    def layer(self, layer, field):
        self.read.add(field)
        return self.whole.layer(layer, field)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("criteria")
    add_tokenizer(make_moe(folder / "moe", "qwen3_moe", experts=EXPERTS, top_k=2, hidden=32, intermediate=48))
    (folder / "data.txt").write_text(text(800))
    calibrate(folder / "moe", folder / "stats", data=[str(folder / "data.txt")], seq_len=16)
    return folder


def evidence_of(place: Path, name: str, similarity: str = "output") -> Evidence:
    model, needs = open_model(place / "moe"), CRITERIA[name].needs
    return Evidence(
        statistics=Watched(load_statistics(place / "stats")) if needs.data else None,
        weights=None if needs.weights is None else measure_experts(model, needs.weights),
        weight_cosine=weight_cosine(model, aligned=False) if needs.similarity and similarity in OF_WEIGHTS else None,
        rule=rule_of(model), similarity=similarity, num_experts=EXPERTS,
    )  # fmt: skip


@EVERY
def test_the_order_is_of_all_experts_that_may_go_and_reads_what_is_declared(place, name):
    needs = CRITERIA[name].needs
    for similarity in SIMILARITIES if needs.similarity else ("output",):
        evidence = evidence_of(place, name, similarity)
        whole = CRITERIA[name].order(evidence, 0, frozenset())
        some = CRITERIA[name].order(evidence, 0, frozenset({1, 4}))
        assert len(set(whole.experts)) == len(whole.experts) >= EXPERTS - 1 and set(whole.experts) <= set(
            range(EXPERTS)
        )
        assert len(set(some.experts)) == len(some.experts) >= EXPERTS - 3 and not {1, 4} & set(some.experts)
        assert len(whole.costs) == len(whole.experts) and len(whole.scores) == EXPERTS
        assert np.isfinite(whole.costs).all() and np.isfinite(whole.scores).all()
        again = CRITERIA[name].order(replace(evidence, samples={}), 0, frozenset())
        assert again == whole, "the same evidence gives the same order"
        if evidence.statistics is not None:
            may = set(needs.fields) | (SAMPLE if needs.sample else set()) | (SIMILAR if needs.similarity else set())
            assert set(needs.fields) <= evidence.statistics.read <= may


@EVERY
def test_a_resample_says_how_sure_it_is_where_it_changes_what_is_read(place, name):
    evidence = evidence_of(place, name)
    if not can_resample(CRITERIA[name].needs):
        assert not CRITERIA[name].needs.sample
        return
    orders = {0: CRITERIA[name].order(evidence, 0, frozenset())}
    found = stability(evidence, name, orders, [2], protected={0: frozenset()}, draws=3)
    assert 0 < found[2] <= 1


@EVERY
def test_the_command_takes_it(place, tmp_path, cli, name):
    needs, given = CRITERIA[name].needs, ("--stats", place / "stats")
    flags = ("--keep", 4, "--criterion", name, "--json")
    done = cli("prune", place / "moe", tmp_path / "out", *flags, *(given if needs.data else ()))
    assert done.code == 0, done.out
    block = done.json["prune"]
    assert block["criterion"] == name and all(len(kept) == 4 for kept in block["keep"].values())
    assert (CRITERIA[name].warning in done.json["warnings"]) == bool(CRITERIA[name].warning)
    if needs.data:
        refused = cli("prune", place / "moe", tmp_path / "none", *flags)
        assert refused.code == 2 and f"--criterion {name} needs statistics" in refused.json["error"]["message"]
    dry = cli("prune", place / "moe", tmp_path / "dry", *flags, "--dry-run", *(given if needs.data else ()))
    assert dry.code == 0 and dry.json["bytes"] == done.json["bytes"]


def test_help_lists_the_registry(cli):
    words = " ".join(cli("prune", "--help").out.replace("│", " ").split())
    assert f"One of: {', '.join(CRITERIA)}." in words
    assert PruneOptions().criterion is None


def test_a_criterion_of_weights_may_have_any_name_and_measure(place, tmp_path, cli, monkeypatch):
    """Its measure is called with each expert's weights, block by block."""
    monkeypatch.setattr(CRITERIA, "_records", dict(CRITERIA))

    @criterion("largest-weight", needs=weights(lambda e: max(float(np.abs(block).max()) for _, block in e.blocks())))
    def largest(evidence, layer, protected):
        from moeconv.prune.criteria import by_score

        return by_score(measured(evidence, layer), protected)

    done = cli("prune", place / "moe", tmp_path / "out", "--keep", 4, "--criterion", "largest-weight", "--json")
    assert done.code == 0, done.out
    from moeconv.tensors import read_tensor

    model = open_model(place / "moe")
    for layer in model.moe_layers:
        names = [[n for n, r in model.roles.items() if (r.group, r.layer, r.expert) == ("expert", layer, e)]
                 for e in range(EXPERTS)]  # fmt: skip
        want = [max(float(read_tensor(model.checkpoint, n).float().abs().max()) for n in each) for each in names]
        assert done.json["prune"]["scores"][str(layer)] == pytest.approx(want)
    with pytest.raises(ValueError, match="the name largest-weight is taken"):
        criterion("largest-weight", needs=stats("count"))(largest.order)


def test_weights_that_are_no_numbers_are_named(place, tmp_path):
    import shutil

    model = open_model(shutil.copytree(place / "moe", tmp_path / "moe"))
    ref = model.checkpoint.tensors[model.expert_name("down", layer=1, expert=2)]
    with open(model.checkpoint.path / ref.shard, "r+b") as file:
        file.seek(ref.start)
        file.write(b"\xff" * 4)
    for name in (name for name, c in CRITERIA.items() if c.needs.weights is not None):
        with pytest.raises(InputError, match="expert 2 of layer 1 has NaN"):
            measure_experts(open_model(tmp_path / "moe"), CRITERIA[name].needs.weights)
