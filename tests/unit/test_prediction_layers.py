"""Multi-token-prediction layers are run on data: their inputs, outputs and statistics against a plain reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from words import add_tokenizer, text

from moeconv.calibrate.artifact import load_statistics
from moeconv.calibrate.statistics import layer_statistics
from moeconv.families.model import open_model
from moeconv.families.rule import rule_of
from moeconv.plan.execute import execute
from moeconv.quantize.planner import plan_quantize
from moeconv.stream.layers import LayerStream
from moeconv.stream.prediction import prediction_layers
from tests.contract.stock import load
from tests.unit.test_mtp import make

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = np.random.default_rng(0).integers(3, 120, (3, 12))
CASES = ["glm4_moe", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "qwen3_next", "dots3_note_text"]
# case -> prefixes of the decoder layer and of what is beside it; names of the norms and of the projection
_NAMES = {
    "qwen3_next": ("mtp.layers.0.", "mtp.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc"),
    "": ("model.layers.3.", "model.layers.3.", "enorm", "hnorm", "eh_proj"),
}


def rms(x: torch.Tensor, weight: torch.Tensor, case: str, *, eps: float) -> torch.Tensor:
    """The norm of the family in float64: Qwen3-Next's is centred at zero."""
    weight = weight.double() + (case == "qwen3_next")
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def reference(path: Path, case: str) -> dict[str, torch.Tensor]:
    """In float64, with the stock model: the inputs and outputs of the prediction layer, and those of its experts."""
    tensors = load_file(path / "model.safetensors")
    layer, beside, of_embedding, of_hidden, project = _NAMES.get(case, _NAMES[""])
    model = load_with(path, layer, None).double()
    eps = model.config.rms_norm_eps
    like = 1 if case == "qwen3_next" else 2  # the layer whose block it has
    donor = load_with(path, layer, like).double()
    ids, seen = torch.tensor(IDS), {}
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]  # behind the final norm
        of_layer = "model.mtp." if case == "dots3_note_text" else beside
        tokens = tensors.get(of_layer + "embed_tokens.weight", tensors["model.embed_tokens.weight"]).double()
        embedded = rms(tokens[ids[:, 1:]], tensors[f"{beside}{of_embedding}.weight"], case, eps=eps)
        joined = torch.cat([embedded, rms(hidden, tensors[f"{beside}{of_hidden}.weight"], case, eps=eps)], -1)
        inputs = joined @ tensors[f"{beside}{project}.weight"].double().T
        block = donor.model.layers[like]

        def keep(_m: Any, given: Any, made: Any) -> None:
            seen.update(experts=given)

        block.mlp.experts.register_forward_hook(keep)
        block.register_forward_pre_hook(lambda _m, _a, kwargs: ((inputs,), kwargs), with_kwargs=True)
        block.register_forward_hook(lambda _m, _a, out: seen.update(outputs=out[0] if isinstance(out, tuple) else out))
        donor.model(ids[:, :-1], use_cache=False)
        x, index, weights = seen["experts"]
        each = torch.stack([
            block.mlp.experts(x, torch.full((len(x), 1), e), torch.ones(len(x), 1, dtype=torch.float64))
            for e in range(8)
        ], 1)  # fmt: skip
    return {"inputs": inputs, "outputs": seen["outputs"], "index": index, "weights": weights, "each": each}


def load_with(path: Path, layer: str, like: int | None) -> Any:
    """The stock model, with the prediction layer's weights in its layer `like` if that is given."""
    twin = path.with_name(f"like-{like}")
    twin.mkdir()
    (twin / "config.json").write_bytes((path / "config.json").read_bytes())
    own = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head")
    taken = load_file(path / "model.safetensors")
    tensors = {name: tensor for name, tensor in taken.items() if not name.startswith((layer, "mtp."))}
    if like is not None:
        place = f"model.layers.{like}."
        block = {n.removeprefix(layer): t for n, t in taken.items() if n.startswith(layer)}
        tensors |= {place + name: tensor for name, tensor in block.items() if not name.startswith(own)}
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    return load(twin)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_a_plain_reference_computes(tmp_path: Path, case: str) -> None:
    path, _ = make(tmp_path / "moe", case)
    wanted = reference(path, case)
    model = open_model(path)
    stream = LayerStream(model, IDS, dtype=torch.float32, batch_size=2).run()
    found = list(seen_of(stream, model))
    assert [number for number, *_ in found] == [3]
    _, inputs, outputs, made = found[0]
    for name, values in (("inputs", inputs), ("outputs", outputs)):
        spread = float(wanted[name].std())
        assert float((values.double() - wanted[name]).abs().max()) < 1e-4 * max(1.0, spread), name
    index, weights, each = (wanted[name] for name in ("index", "weights", "each"))
    norm = each.norm(dim=-1).gather(1, index)
    for name, value in {
        "count": torch.ones_like(weights), "gate_sum": weights, "norm_sum": norm, "gate_norm_sum": weights * norm,
    }.items():  # fmt: skip
        total = torch.zeros(8, dtype=torch.float64).index_add_(0, index.flatten(), value.double().flatten())
        assert np.allclose(made[name].sum(0), total.numpy(), rtol=1e-4, atol=1e-6), name
    assert made["tokens"].sum() == IDS.shape[0] * (IDS.shape[1] - 1), "the last position has no next token"
    assert "sample_unit" in made


def seen_of(stream: LayerStream, model: Any) -> Any:
    """(number, inputs, outputs, statistics) of every prediction layer."""
    for found in prediction_layers(stream):
        outputs = torch.cat([batch.outputs for batch in found.layer.batches(advance=False, hidden=found.hidden)])
        made = layer_statistics(
            found.layer, source=torch.zeros(3, dtype=torch.int64), num_sources=1, num_experts=8, seed=0,
            sample_tokens=16, rule=rule_of(model), hidden=found.hidden,
        )  # fmt: skip
        yield found.number, found.hidden.clone(), outputs, made


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen3_next"])
def test_its_experts_are_chosen_by_data(tmp_path: Path, cli: Any, case: str) -> None:
    path, prefix = make(tmp_path / "moe", case)
    add_tokenizer(path)
    (tmp_path / "text").write_text(text(400))
    data = ("--data", tmp_path / "text", "--seq-len", 16, "--json")
    assert cli("calibrate", path, tmp_path / "stats", *data).code == 0
    statistics = load_statistics(tmp_path / "stats")
    assert statistics.prediction_layers == (3,) and 3 not in statistics.layers
    done = cli("prune", path, tmp_path / "out", "--keep", 4, "--stats", tmp_path / "stats", "--json")
    assert done.code == 0 and not any("multi-token-prediction" in w for w in done.json["warnings"]), done.out
    by_sum = cli(
        "prune", path, tmp_path / "sums", "--keep", 4, "--stats", tmp_path / "stats", "--criterion", "ean-sum",
        "--no-rescale", "--json",
    )  # fmt: skip
    kept = by_sum.json["prune"]["keep"]["3"]
    groups = open_model(path).groups[0]  # the same number stays in each
    norms = statistics.layer(3, "norm_sum").sum(0).reshape(groups, -1)
    best = np.argsort(-norms, axis=1)[:, : 4 // groups] + np.arange(groups)[:, None] * norms.shape[1]
    assert kept == sorted(best.flatten().tolist())
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "sums"))
    assert torch.equal(after[prefix + "mlp.gate.weight"], before[prefix + "mlp.gate.weight"][kept])
    inside = cli("prune", path, tmp_path / "inside", "--keep", 4, *data)
    assert inside.json["prune"]["keep"]["3"] == done.json["prune"]["keep"]["3"], "measured by prune itself"
    plain = cli("prune", path, tmp_path / "plain", "--keep", 4, "--criterion", "random", "--json")
    assert (
        any("no data ran through them" in w for w in plain.json["warnings"]) and "3" not in plain.json["prune"]["keep"]
    )


@pytest.mark.parametrize("by_data", [False, True], ids=["weights", "data"])
def test_its_experts_keep_their_own_best_neurons(tmp_path: Path, cli: Any, by_data: bool) -> None:
    path, prefix = make(tmp_path / "moe", "glm4_moe")
    add_tokenizer(path)
    (tmp_path / "text").write_text(text(1500))
    data = ("--data", tmp_path / "text", "--seq-len", 16)
    assert cli("calibrate", path, tmp_path / "stats", *data, "--json").code == 0
    width = open_model(path).expert_width // 2
    flags = ("--stats", tmp_path / "stats", "--criterion", "saliency", "--keep", 4, "--width", width)
    done = cli("prune", path, tmp_path / "out", *flags, *(data if by_data else ()), "--json")
    assert done.code == 0, done.out
    kept = done.json["prune"]["keep"]["3"]
    assert kept != done.json["prune"]["keep"]["2"], "the layer must not keep what the last one keeps"
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "out"))
    for new, old in enumerate(kept):
        name = prefix + "mlp.experts.{}.{}_proj.weight"
        gate, up, down = (before[name.format(old, part)] for part in ("gate", "up", "down"))
        score = gate.double().norm(dim=1) * up.double().norm(dim=1) * down.double().norm(dim=0)
        best = score.argsort(descending=True)[:width].sort().values
        assert torch.equal(after[name.format(new, "gate")], gate[best])
        assert torch.equal(after[name.format(new, "down")], down[:, best])


def test_files_of_several_runs_are_added(tmp_path: Path, cli: Any) -> None:
    path, _ = make(tmp_path / "moe", "glm4_moe")
    add_tokenizer(path)
    for i in range(2):
        (tmp_path / f"text{i}").write_text(text(200, seed=i))
        given = ("--data", tmp_path / f"text{i}", "--seq-len", 16)
        assert cli("calibrate", path, tmp_path / f"stats{i}", *given).code == 0
    merged = tmp_path / "merged"
    done = cli("calibrate", path, merged, "--merge", tmp_path / "stats0", "--merge", tmp_path / "stats1", "--json")
    assert done.code == 0, done.out
    one, two, both = (load_statistics(tmp_path / name) for name in ("stats0", "stats1", "merged"))
    counts = [s.layer(3, "count").sum() for s in (one, two, both)]
    assert both.prediction_layers == (3,) and counts[0] + counts[1] == counts[2] > 0


def test_packed_layers_are_decoded(tmp_path: Path) -> None:
    path, _ = make(tmp_path / "moe", "deepseek_v3")
    source = open_model(path)
    plan = plan_quantize(source, scheme="int8", group_size="auto")
    execute(plan, source=source.checkpoint, out=tmp_path / "packed")
    runs = []
    for at in (path, tmp_path / "packed"):
        model = open_model(at)
        runs += [out for _, _, out, _ in seen_of(LayerStream(model, IDS, dtype=torch.float32).run(), model)]
    assert len(runs) == 2 and 0 < float((runs[0] - runs[1]).norm() / runs[0].norm()) < 0.1
