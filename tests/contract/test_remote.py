"""Contract: families whose class is code in their checkpoints. moeconv never runs it, and outputs keep it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from words import add_tokenizer, text

from moeconv.families.check import Shapes, _belongs
from moeconv.families.model import Model, open_model
from moeconv.families.registry import tables
from moeconv.stream.layers import LayerStream
from tests.contract.stock import _COMMON, dropped, load, logits, relative_difference, save_stock
from tests.tiny import edit_json

pytestmark = pytest.mark.usefixtures("one_thread")
_TINY = _COMMON | {"intermediate_size": 96, "num_experts_per_tok": 2, "tie_word_embeddings": False}
_WIDTH = {"moe_intermediate_size": 32, "head_dim": 16, "first_k_dense_replace": 1}
# as the published configs word them
CONFIGS = {
    "deepseek": _TINY | _WIDTH | {"n_routed_experts": 8, "n_shared_experts": 2},
    "bailing_moe": _TINY | _WIDTH | {"num_experts": 8, "num_shared_experts": 2},
    "minicpm": _TINY | {"num_experts": 8, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16},
}
LING = _TINY | _WIDTH | {
    "num_experts": 8, "num_shared_experts": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5, "rope_theta": 600000.0, "use_qk_norm": True, "norm_topk_prob": True,
    "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "rms_norm_eps": 1e-6,
}  # fmt: skip
CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}


class _Bare:
    """A checkpoint without files."""

    def __init__(self, config: dict) -> None:
        self.config, self.tensors = config, {}


def _write(path: Path, model_type: str, config: dict) -> Path:
    """A checkpoint with the names and shapes of the row, random weights, and code that no test may run."""
    family = tables().moe[model_type]
    stated = config | {"model_type": model_type, "auto_map": CODE, "architectures": [family.architecture]}
    model = Model(_Bare(stated), family, {}, ())
    expected, moe = Shapes(model), frozenset(model.moe_layers)
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(expected(role), generator=draw).bfloat16()
        for name, role in family.expand(layers=model.num_layers, experts=model.num_experts)
        if _belongs(model, role, moe) and not role.key.endswith("_bias")
    }
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(stated))
    for name in ("configuration_x.py", "modeling_x.py"):
        (path / name).write_text("raise SystemExit('the code of a checkpoint was run')\n")
    return add_tokenizer(path)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_without_a_class_what_needs_no_run_works_and_the_rest_is_refused_with_the_reason(tmp_path, cli, model_type):
    source = _write(tmp_path / "moe", model_type, CONFIGS[model_type])
    before = load_file(source / "model.safetensors")
    assert cli("inspect", source, "--json").json["num_experts"] == 8
    assert cli("verify", source, "--json").json["ok"]
    done = cli("prune", source, tmp_path / "pruned", "--keep", 6, "--json")
    assert done.code == 0, done.out
    assert any("code is copied" in warning for warning in done.json["warnings"])
    config, family = json.loads((tmp_path / "pruned" / "config.json").read_text()), tables().moe[model_type]
    assert config["auto_map"] == CODE and config["model_type"] == model_type and config[family.experts.count[0]] == 6
    assert (tmp_path / "pruned" / "modeling_x.py").exists()
    after = load_file(tmp_path / "pruned" / "model.safetensors")
    for layer, kept in done.json["prune"]["keep"].items():
        router = family.name("router.weight", layer=int(layer))
        assert torch.equal(after[router], before[router][kept])
        for new, old in enumerate(kept):
            names = (family.name("expert.down", layer=int(layer), expert=e) for e in (new, old))
            assert torch.equal(*(where[name] for where, name in zip((after, before), names, strict=True)))
    packed = cli("quantize", source, tmp_path / "packed", "--json")
    assert packed.code == 0, packed.out
    assert packed.json["quantize"]["loads"]["transformers"] == "unknown"
    assert cli("verify", tmp_path / "packed", "--json").json["ok"]
    (tmp_path / "text").write_text(text(300))
    flags = ("--data", tmp_path / "text", "--seq-len", 16, "--json")
    for words in (
        ("evaluate", source),
        ("prune", source, tmp_path / "out", "--keep", 6),
        ("quantize", source, tmp_path / "out", "--method", "gptq"),
    ):
        refused = cli(*words, *flags)
        assert refused.code == 3, refused.out
        assert "its class is code in the checkpoint" in refused.json["error"]["message"]
    refused = cli("verify", source, "--load", "--json")
    assert refused.code == 3 and "no class of transformers computes the same" in refused.json["error"]["message"]
    assert not (tmp_path / "out").exists()


def _ling(path: Path) -> tuple[Path, Path]:
    """A tiny Ling 2.0, and the class of transformers that computes the same, with the same weights."""
    stock, ling = (save_stock(path / name, "sarvam_moe", LING, dtype=torch.float32) for name in ("stock", "ling"))
    config = LING | {"model_type": "bailing_moe_v2", "architectures": ["BailingMoeV2ForCausalLM"], "auto_map": CODE}
    (ling / "config.json").write_text(json.dumps(config))
    return ling, stock


def test_ling_2_is_run_by_a_class_that_computes_the_same_and_stays_what_it_is(tmp_path, cli):
    source, stock = _ling(tmp_path)
    ids = np.random.default_rng(0).integers(3, 128, (2, 12))
    streamed = torch.cat([out for _, out in LayerStream(open_model(source), ids).run().logits()])
    with torch.no_grad():
        expected = load(stock)(torch.tensor(ids)).logits
    assert (streamed - expected).abs().max() <= 1e-5 * float(expected.std())
    (add_tokenizer(source), (tmp_path / "text").write_text(text(400)))
    flags = ("--data", tmp_path / "text", "--seq-len", 16, "--json")
    done = cli("prune", source, tmp_path / "out", "--keep", 4, *flags)
    assert done.code == 0, done.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "bailing_moe_v2" and config["auto_map"] == CODE and config["num_experts"] == 4
    model = load(stock)
    with dropped(model, open_model(stock), done.json["prune"]["keep"]):
        masked = logits(model)
    stated = json.loads((stock / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(stated | {"n_routed_experts": 4}))
    assert relative_difference(masked, logits(load(tmp_path / "out"))) <= 1e-5


@pytest.mark.parametrize("key", ["partial_rotary_factor", "rope_theta", "n_group", "routed_scaling_factor"])
def test_what_the_config_of_ling_2_leaves_out_is_what_its_own_class_assumes(tmp_path, key):
    """inclusionAI's configuration: the whole head rotates, base 600,000, 8 groups, scaling 1."""
    source, _ = _ling(tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
    stated = LayerStream(open_model(source), np.full((1, 4), 5)).skeleton.module.config
    found = {
        "partial_rotary_factor": stated.rope_parameters["partial_rotary_factor"],
        "rope_theta": stated.rope_parameters["rope_theta"],
        "n_group": stated.n_group,
        "routed_scaling_factor": stated.routed_scaling_factor,
    }
    assert found[key] == {"partial_rotary_factor": 1.0, "rope_theta": 600000.0, "n_group": 8}.get(key, 1.0)


@pytest.mark.parametrize("key", ["score_function", "moe_router_enable_expert_bias", "use_bias"])
def test_a_setting_of_ling_2_that_no_class_here_has_is_refused(tmp_path, cli, key):
    source, _ = _ling(tmp_path)
    edit_json(source / "config.json", **{key: "softmax" if key == "score_function" else key == "use_bias"})
    refused = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert refused.code == 3 and key in refused.json["error"]["message"], refused.out
