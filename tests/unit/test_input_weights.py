"""Experts whose inputs are multiplied by the routing weights (Llama 4): statistics against a plain reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from words import add_tokenizer, text

from moeconv.calibrate.artifact import load_statistics
from moeconv.calibrate.statistics import layer_statistics
from moeconv.families.model import open_model
from moeconv.families.rule import rule_of
from moeconv.prune.reconstruction import Reconstruction
from moeconv.prune.repair.pruned import masked, pruned_pass
from moeconv.prune.repair.refit import Refit
from moeconv.prune.repair.variant import Variant
from moeconv.stream import stored
from moeconv.stream.layers import LayerStream
from tests.contract.stock import MOE_CASES, load, save_stock

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = np.random.default_rng(0).integers(3, 120, (3, 12))
TOP_K, EXPERTS = 2, 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    family, config = MOE_CASES["llama4"]
    return Path(save_stock(tmp_path / "moe", family, config | {"num_experts_per_tok": TOP_K}, dtype=torch.bfloat16))


def reference(path: Path) -> list[dict[str, np.ndarray]]:
    """Of every MoE layer, from the stock model in float64: the logits [T, E], what every expert computes of its
    weighted input [T, E, H], the residual stream before the FFN and after the layer [T, H]."""
    model, found = load(path).double(), []
    for layer in model.model.layers:
        if not layer.is_moe_layer:
            continue
        seen: dict[str, torch.Tensor] = {}
        found.append(seen)
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, a, seen=seen: seen.update(before=a[0]))
        layer.register_forward_hook(lambda _m, _a, out, seen=seen: seen.update(after=out))

        def compute(block, arguments, _out, seen=seen):  # type: ignore[no-untyped-def]
            x = arguments[0].reshape(-1, 64)
            logits = x @ block.router.weight.T
            scaled = torch.sigmoid(logits.float()).double()[:, :, None] * x[:, None]  # the class weighs in float32
            gate, up = torch.einsum("nea,eab->neb", scaled, block.experts.gate_up_proj).chunk(2, -1)
            hidden = up * torch.nn.functional.silu(gate)
            seen.update(logits=logits, outputs=torch.einsum("nei,eia->nea", hidden, block.experts.down_proj))

        layer.feed_forward.register_forward_hook(compute)
    with torch.no_grad():
        model(torch.tensor(IDS), use_cache=False)
    return [{name: value.detach().flatten(0, -2).numpy() if value.ndim == 3 and name != "outputs" else
             value.detach().numpy() for name, value in seen.items()} for seen in found]  # fmt: skip


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= 2e-5 * max(1e-3, float(np.abs(expected).max())))


@pytest.mark.parametrize("group", [1 << 25, 1])
def test_every_field_is_that_of_a_plain_reference(path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """An expert adds f(g x), so that f is its output and ||f|| stands for g ||f||."""
    monkeypatch.setattr(stored, "GROUP_BYTES", group)
    model = open_model(path)
    stream = LayerStream(model, IDS, dtype=torch.float32, batch_size=2)
    layers = iter(reference(path))
    for layer in stream.layers():
        if layer.experts is None:
            continue
        assert (stored.stored_in(layer.experts) is not None) == (group == 1)
        plain = next(layers)
        made = layer_statistics(
            layer, source=torch.tensor([0, 1, 1]), num_sources=2, num_experts=EXPERTS, seed=0, sample_tokens=36,
            rule=rule_of(model),
        )  # fmt: skip
        logits, outputs = plain["logits"], plain["outputs"]
        routed = np.zeros(logits.shape)
        np.put_along_axis(routed, np.argsort(-logits, 1)[:, :TOP_K], 1.0, 1)
        gate, norm = routed / (1 + np.exp(-logits)), routed * np.linalg.norm(outputs, axis=2)
        before, after = plain["before"], plain["after"]
        moved = 1 - (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
        of_source = np.eye(2)[np.repeat([0, 1, 1], IDS.shape[1])]
        for name, each in {
            "count": routed, "gate_sum": gate, "gate_sq_sum": gate**2, "norm_sum": norm, "norm_sq_sum": norm**2,
            "gate_norm_sum": norm, "gate_norm_sq_sum": norm**2, "easy_ep_sum": norm * moved[:, None],
        }.items():  # fmt: skip
            assert close(made[name], of_source.T @ each), name
        count = routed.sum(0)
        mean = np.einsum("te,teh->eh", routed, outputs) / np.maximum(count, 1)[:, None]
        assert close(made["out_mean"], mean)
        spread = (norm**2).sum(0) / np.maximum(count, 1) - (mean**2).sum(1)
        assert close(made["out_var"], np.maximum(spread, 0))
        units = outputs / np.linalg.norm(outputs, axis=2, keepdims=True)
        assert np.abs(made["output_cosine"] - np.einsum("tih,tjh->ij", units, units) / len(units)).max() < 1e-5
        sampled = made["sample_outputs"].astype(np.float64) * made["sample_unit"]
        assert np.abs(sampled - outputs).max() < 1e-3 * np.abs(outputs).max(), "of all experts, chosen or not"
        assert made["sample_factor"] == 1
    assert next(layers, None) is None


def test_the_loss_of_the_sample_is_that_of_the_masked_layer(path: Path) -> None:
    model = open_model(path)
    stream = LayerStream(model, IDS, dtype=torch.float32)
    for layer in stream.layers():
        if layer.experts is None:
            continue
        made = layer_statistics(
            layer, source=torch.zeros(3, dtype=torch.int64), num_sources=1, num_experts=EXPERTS, seed=0,
            sample_tokens=36, rule=rule_of(model), hidden=stream.hidden.clone(),
        )  # fmt: skip
        unit, scale, bias = made["sample_unit"][0], made["sample_scale"], made["sample_bias"]
        outputs = made["sample_outputs"].astype(np.float32) * unit
        sample = Reconstruction(rule_of(model), made["sample_logits"], outputs, scale=scale, bias=bias, factor=1.0)
        whole = torch.cat([b.ffn_output for b in layer.batches(advance=False)]).double()
        for kept in ([0, 1, 2, 3], [1, 4, 5, 6, 7]):
            with masked(stream, layer, kept):
                part = torch.cat([b.ffn_output for b in layer.batches(advance=False)]).double()
            wanted = float((((whole - part) ** 2).sum(1) / torch.from_numpy(scale) ** 2).mean())
            assert sample.loss(kept) == pytest.approx(wanted, rel=5e-3)


def test_a_rule_with_another_factor_keeps_no_sample(path: Path) -> None:
    """The outputs of the sample are those for the rule's own weights."""
    model = open_model(path)
    for layer in LayerStream(model, IDS, dtype=torch.float32).layers():
        if layer.experts is not None:
            made = layer_statistics(
                layer, source=torch.zeros(3, dtype=torch.int64), num_sources=1, num_experts=EXPERTS, seed=0,
                sample_tokens=36, rule=replace(rule_of(model), score="softmax"),
            )  # fmt: skip
            assert "sample_unit" not in made


@pytest.mark.parametrize("group", [1 << 25, 1])
def test_a_refit_lowers_the_error(path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(stored, "GROUP_BYTES", group)
    monkeypatch.setattr("moeconv.prune.repair.refit._TOKENS_PER_COLUMN", 0)
    ids = np.random.default_rng(1).integers(3, 120, (64, 16))
    stream = LayerStream(open_model(path), ids, dtype=torch.float32)
    variant = Variant(keep={1: [0, 1, 2, 3], 2: [2, 3, 4, 5]}, refit=Refit())
    pruned_pass(stream, [variant])
    assert [found.layer for found in variant.fitted] == [1, 2]
    assert all(found.error_after < found.error_before for found in variant.fitted)


def test_calibrate_and_prune_by_the_default_criterion(path: Path, tmp_path: Path, cli) -> None:  # type: ignore[no-untyped-def]
    add_tokenizer(path)
    (tmp_path / "text").write_text(text(400))
    stats = tmp_path / "stats"
    assert cli("calibrate", path, stats, "--data", tmp_path / "text", "--seq-len", 16, "--json").code == 0
    assert load_statistics(stats).has(1, "sample_unit")
    done = cli("prune", path, tmp_path / "out", "--keep", 4, "--stats", stats, "--json")
    assert done.code == 0 and done.json["prune"]["criterion"] == "reconstruction"
