"""Contract: every row streamed a layer at a time equals stock transformers, and an MoE shows its real routing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from words import add_tokenizer, text

from moeconv.calibrate.statistics import layer_statistics
from moeconv.families.model import open_model
from moeconv.families.rule import route, rule_of
from moeconv.stream.layers import LayerStream
from tests.contract.stock import DENSE_CASES, MOE_CASES, load, save_stock, skip_where_stock_is_broken

torch.set_num_threads(1)


def _stream(path, ids):
    return LayerStream(open_model(path), ids, batch_size=2)


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("case", list(MOE_CASES))
def test_logits_and_routing_are_the_stock_models(tmp_path, case):
    skip_where_stock_is_broken(case)
    path = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    ids = np.random.default_rng(0).integers(3, 128, (2, 16))
    with torch.no_grad():
        expected = load(path)(torch.tensor(ids)).logits
    model = open_model(path)
    stream = _stream(path, ids)
    for layer in stream.layers():
        assert (layer.experts is None) == (layer.index not in model.moe_layers)
        for batch in layer.batches():
            if layer.experts is None:
                continue
            tokens = ids.size
            assert batch.router_logits.shape == (tokens, model.num_experts)
            assert batch.top_k_index.shape == batch.top_k_weights.shape == (tokens, model.top_k)
            assert ((batch.top_k_index >= 0) & (batch.top_k_index < model.num_experts)).all()
            # raw logits: rows of the router on what it reads, neither scores nor weights
            assert batch.router_logits.min() < 0 < batch.router_logits.max()
            if model.renormalises and not model.family.experts.routing.scaled:
                sums = batch.top_k_weights.sum(-1)
                assert torch.allclose(sums, sums[0].expand(tokens), rtol=1e-4)
    logits = torch.cat([out for _, out in stream.logits(batch_size=2)])
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.std()))


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("case", list(DENSE_CASES))
def test_logits_of_dense_rows_are_the_stock_models(tmp_path, case):
    skip_where_stock_is_broken(case)
    path = save_stock(tmp_path / "dense", *DENSE_CASES[case], dtype=torch.float32)
    ids = np.random.default_rng(0).integers(3, 128, (2, 16))
    with torch.no_grad():
        expected = load(path)(torch.tensor(ids)).logits
    stream = _stream(path, ids)
    stream.run()
    logits = torch.cat([out for _, out in stream.logits(batch_size=2)])
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.std()))


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("case", MOE_CASES)
def test_statistics_weigh_what_the_layer_really_adds(tmp_path, case):
    """The experts' outputs times the weights of the batch are the routed part of the FFN's output."""
    skip_where_stock_is_broken(case)
    path = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    model = open_model(path)
    ids = np.random.default_rng(1).integers(3, 128, (2, 12))
    plain = _stream(path, ids).run()
    stream = _stream(path, ids)
    for layer in stream.layers():
        if layer.experts is None:
            continue
        fields = layer_statistics(
            layer, source=torch.zeros(2, dtype=torch.int64), num_sources=1, num_experts=model.num_experts, seed=0,
            sample_tokens=8,
        )  # fmt: skip
        assert fields["count"].sum() == ids.size * model.top_k
        assert (fields["gate_norm_sum"].sum(0)[fields["count"].sum(0) > 0] > 0).all()
        assert fields["output_cosine"].shape == (model.num_experts, model.num_experts)
    assert torch.allclose(stream.hidden, plain.hidden, atol=1e-5)


def test_scales_behind_the_rule_are_a_part_of_the_outputs(tmp_path):
    """The rule's weights times the sampled outputs are what the layer's experts add, each expert's scale included."""
    path = save_stock(tmp_path / "moe", *MOE_CASES["gemma4"], dtype=torch.float32)
    model = open_model(path)
    for layer in _stream(path, np.random.default_rng(2).integers(3, 128, (2, 12))).layers():
        assert layer.scale is not None and float(layer.scale.std()) > 0.01
        added = sum(batch.ffn_output.sum(0) for batch in layer.batches(advance=False)).numpy()
        fields = layer_statistics(
            layer, source=torch.zeros(2, dtype=torch.int64), num_sources=1, num_experts=model.num_experts, seed=0,
            sample_tokens=24, rule=rule_of(model),
        )  # fmt: skip
        logits = fields["sample_logits"]
        chosen, weights = route(rule_of(model), logits, np.ones(8, bool), bias=fields["sample_bias"])
        outputs = np.take_along_axis(fields["sample_outputs"].astype(np.float64), chosen[..., None], 1)
        routed = (outputs * weights[..., None]).sum((0, 1)) * fields["sample_unit"] * fields["sample_factor"]
        assert np.abs(routed - added).max() <= 2e-3 * np.abs(added).max()


@pytest.mark.parametrize("case", ["cohere2_moe", "phimoe", "glm4_moe", "gpt_oss", "gemma4"])
def test_prune_by_data_follows_the_rule_of_the_model(tmp_path, cli, case):
    """By default what suits the rule: sigmoid by config, sparsemixer, groups, softmax over the chosen with a bias."""
    path = add_tokenizer(save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32))
    (tmp_path / "text").write_text(text(400))
    flags = ("--data", tmp_path / "text", "--seq-len", 16, "--json")
    done = cli("prune", path, tmp_path / "pruned", "--keep", 6, *flags)
    assert done.code == 0, done.out
    assert cli("evaluate", tmp_path / "pruned", *flags).code == 0


def test_weights_on_the_input_are_evaluated(tmp_path, cli):
    path = add_tokenizer(save_stock(tmp_path / "moe", *MOE_CASES["llama4"], dtype=torch.float32))
    (tmp_path / "text").write_text(text(400))
    assert cli("evaluate", path, "--data", tmp_path / "text", "--seq-len", 16, "--json").code == 0
