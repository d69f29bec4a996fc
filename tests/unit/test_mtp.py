"""Multi-token-prediction layers: known, cut and packed with the rest, and out of the way of the stock classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from words import add_tokenizer, text

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.stream.layers import LayerStream
from tests import tiny
from tests.contract.stock import HIDDEN, MOE_CASES, VOCAB, save_stock

torch.set_num_threads(1)
_TAIL = {
    "embed_tokens.weight": (VOCAB, HIDDEN), "enorm.weight": (HIDDEN,), "hnorm.weight": (HIDDEN,),
    "eh_proj.weight": (HIDDEN, 2 * HIDDEN), "shared_head.norm.weight": (HIDDEN,),
    "shared_head.head.weight": (VOCAB, HIDDEN),
}  # fmt: skip
_BESIDE = {
    "pre_fc_norm_embedding.weight": (HIDDEN,), "pre_fc_norm_hidden.weight": (HIDDEN,),
    "fc.weight": (HIDDEN, 2 * HIDDEN), "norm.weight": (HIDDEN,),
}  # fmt: skip


def make(path: Path, case: str, **changes: object) -> tuple[Path, str]:
    """A stock checkpoint of three layers with one multi-token-prediction layer more; and the prefix of its names."""
    kind, config = MOE_CASES[case]
    save_stock(path, kind, {**config, **changes}, dtype=torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    prefix, extra = ("mtp.layers.0.", _BESIDE) if case == "qwen3_next" else ("model.layers.3.", _TAIL)
    like = "model.layers.1." if case == "qwen3_next" else "model.layers.2."
    draw = torch.Generator().manual_seed(1)
    for name in [n for n in tensors if n.startswith(like)]:
        value = torch.randn(tensors[name].shape, generator=draw).to(tensors[name].dtype)
        tensors[prefix + name.removeprefix(like)] = value
    for name, shape in extra.items():
        apart = "model.mtp." if case == "dots3_note_text" and name.startswith("embed") else prefix
        tensors[(apart if extra is _TAIL else "mtp.") + name] = torch.randn(shape, generator=draw).bfloat16()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    tiny.edit_json(path / "config.json", num_nextn_predict_layers=1)
    return path, prefix


def counted_apart(source: Path, found: dict) -> bool:
    """Whether the layer's parameters are in `prediction` and nowhere else."""
    sizes = {n: t.numel() for f in source.glob("*.safetensors") for n, t in load_file(f).items()}
    mine = sum(size for n, size in sizes.items() if n.startswith(("model.layers.3.", "mtp.", "model.mtp.")))
    parameters = found["parameters"]
    assert parameters["prediction"] == mine == found["parameters_by_role"]["prediction"]
    assert parameters["total"] == sum(sizes.values()) - mine
    assert sum(found["parameters_by_role"].values()) == sum(sizes.values())
    return found["flops_per_token"] < 2 * parameters["active"] < 2 * parameters["total"]


CASES = ["glm4_moe", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "qwen3_next", "dots3_note_text"]


@pytest.mark.parametrize("case", CASES)
def test_prune_cuts_it_like_the_last_layer(tmp_path: Path, cli, case: str) -> None:
    source, prefix = make(tmp_path / "moe", case)
    found = cli("inspect", source, "--json").json
    assert found["mtp_layers"] == [3] and 3 not in found["moe_layers"]
    assert counted_apart(source, found)
    promised = cli("prune", source, tmp_path / "out", "--keep", 4, "--dry-run", "--json").json
    done = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert done.code == 0, done.out
    assert promised["bytes"] == done.json["bytes"]
    assert any("multi-token-prediction" in w for w in done.json["warnings"])
    kept = done.json["prune"]["keep"]["2"]
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "out"))
    assert torch.equal(after[prefix + "mlp.gate.weight"], before[prefix + "mlp.gate.weight"][kept])
    assert not any(n.startswith(prefix + "mlp.experts.4.") for n in after)
    for new, old in enumerate(kept):
        for part in ("gate", "up", "down"):
            name = prefix + "mlp.experts.{}." + part + "_proj.weight"
            assert torch.equal(after[name.format(new)], before[name.format(old)])
    if prefix + "mlp.gate.e_score_correction_bias" in before:
        bias = prefix + "mlp.gate.e_score_correction_bias"
        assert torch.equal(after[bias], before[bias][kept])
    assert open_model(tmp_path / "out").mtp_layers == (3,)


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen3_next"])
def test_it_is_packed_with_the_rest_and_not_run(tmp_path: Path, cli, case: str) -> None:
    source, prefix = make(tmp_path / "moe", case)
    ids = np.random.default_rng(0).integers(3, 128, (1, 8))
    LayerStream(open_model(source), ids).run()
    done = cli("quantize", source, tmp_path / "out", "--scheme", "int4", "--json")
    assert done.code == 0, done.out
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert prefix + "mlp.experts.7.down_proj.weight_packed" in after
    assert prefix + "mlp.experts.7.down_proj.weight" not in after
    ignored = open_model(tmp_path / "out").quantization["ignore"]
    assert prefix + "mlp.gate" in ignored


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    source, prefix = make(tmp_path / "moe", "glm4_moe")
    tensors = load_file(source / "model.safetensors")
    del tensors[prefix + "mlp.experts.5.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="multi-token-prediction layer 3 lacks an expert"):
        open_model(source)
    tiny.edit_json(source / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(InputError, match="is not part of a glm4_moe model"):
        open_model(source)


_DENSE = {  # case -> name of what a decoder layer has too, and the names of what is beside it
    "exaone_moe": ("mtp.layers.0.{}", {f"mtp.{name}": shape for name, shape in _BESIDE.items()}),
    "ernie4_5_moe": (
        "model.mtp_block.0.{}",
        {"model.mtp_emb_norm.0.weight": (HIDDEN,), "model.mtp_hidden_norm.0.weight": (HIDDEN,),
         "model.mtp_linear_proj.0.weight": (HIDDEN, 2 * HIDDEN)},
    ),
    "mimo_v2_flash": (
        "model.mtp.layers.0.{}",
        {f"model.mtp.layers.0.{name}.weight": (HIDDEN,)
         for name in ("enorm", "hnorm", "pre_mlp_layernorm", "final_layernorm")}
        | {"model.mtp.layers.0.eh_proj.weight": (HIDDEN, 2 * HIDDEN)},
    ),
}  # fmt: skip


def add_dense(source: Path, case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Put a dense prediction layer into a stock checkpoint: (the tensors of the model, those added)."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    template, beside = _DENSE[case]
    added = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in beside.items()}
    for name, tensor in tensors.items():
        # the attention is that of layer 1, which in MiMo's attends through a window; the FFN is the dense layer's
        start = "model.layers.1." if "self_attn" in name else "model.layers.0."
        last = case == "mimo_v2_flash" and "post_attention_layernorm" in name
        if name.startswith(start) and not last:
            added[template.format(name.removeprefix(start))] = tensor.clone()
    save_file(tensors | added, source / "model.safetensors", metadata={"format": "pt"})
    return tensors, added


@pytest.mark.parametrize("case", _DENSE)
def test_a_dense_one_passes_every_step_as_it_is(tmp_path: Path, cli, case: str) -> None:
    """As K-EXAONE, ERNIE 4.5 and MiMo-V2-Flash have them: an FFN in place of experts."""
    source = tmp_path / "moe"
    kind, config = MOE_CASES[case]
    save_stock(source, kind, config, dtype=torch.bfloat16)
    tensors, added = add_dense(source, case)
    found = cli("inspect", source, "--json")
    assert found.code == 0, found.out
    assert found.json["mtp_layers"] == [3] and open_model(source).mtp_layers == ()
    assert found.json["parameters"]["prediction"] == sum(t.numel() for t in added.values())
    assert found.json["parameters"]["total"] == sum(t.numel() for t in tensors.values())
    LayerStream(open_model(source), np.random.default_rng(0).integers(3, 128, (1, 8))).run()
    for out, step in (
        ("pruned", ("prune", "--keep", 4)),
        ("packed", ("quantize", "--format", "bitsandbytes", "--scheme", "int8")),
    ):
        done = cli(step[0], source, tmp_path / out, *step[1:], "--json")
        assert done.code == 0, done.out
        after = load_file(tmp_path / out / "model.safetensors")
        assert all(torch.equal(after[name], tensor) for name, tensor in added.items())
    assert cli("verify", source, "--load").code == 0


def test_a_step_of_two_blocks_is_cut_with_the_model_and_its_latent_space_is_kept(tmp_path: Path, cli) -> None:
    """Nemotron-3: a block of attention and a block of experts predict one token together."""
    source = save_stock(tmp_path / "moe", *MOE_CASES["nemotron_h-latent"], dtype=torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    for new, old in ((0, 2), (1, 3)):  # the last blocks of attention and of experts
        before = f"backbone.layers.{old}."
        tensors |= {f"mtp.layers.{new}.{n.removeprefix(before)}": t.clone() for n, t in tensors.items() if before in n}
    for name in ("0.enorm", "0.hnorm", "1.final_layernorm"):
        tensors[f"mtp.layers.{name}.weight"] = torch.ones(HIDDEN).bfloat16()
    tensors["mtp.layers.0.eh_proj.weight"] = torch.ones(HIDDEN, 2 * HIDDEN).bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    tiny.edit_json(source / "config.json", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    found = cli("inspect", source, "--json").json
    assert found["mtp_layers"] == [4, 5] and counted_apart(source, found)
    done = cli("prune", source, tmp_path / "out", "--keep", 4, "--json")
    assert done.code == 0, done.out
    assert any("because a prediction step is two blocks" in w for w in done.json["warnings"])
    kept, after = done.json["prune"]["keep"]["3"], load_file(tmp_path / "out" / "model.safetensors")
    mixer = "mtp.layers.1.mixer."
    assert torch.equal(after[mixer + "gate.weight"], tensors[mixer + "gate.weight"][kept])
    for name in ("fc1_latent_proj.weight", "fc2_latent_proj.weight"):
        assert torch.equal(after[mixer + name], tensors[mixer + name])
    assert torch.equal(after[mixer + "experts.3.up_proj.weight"], tensors[f"{mixer}experts.{kept[3]}.up_proj.weight"])
    del tensors["backbone.layers.1.mixer.fc1_latent_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="fc1_latent_proj"):
        open_model(source)


def test_mlx_says_that_prediction_layers_are_left_out(tmp_path, cli):
    path, _ = make(tmp_path / "moe", "glm4_moe", moe_intermediate_size=64)
    done = cli("quantize", path, tmp_path / "out", "--format", "mlx", "--json")
    assert done.code == 0, done.out
    assert any("multi-token-prediction layers [3]" in warning for warning in done.json["warnings"]), done.json


def test_no_text_runs_through_it_so_that_its_inputs_have_no_scale(tmp_path: Path, cli) -> None:
    source, _ = make(tmp_path / "moe", "glm4_moe")
    (tmp_path / "text.txt").write_text(text(96, seed=1))
    flags = ("--scheme", "nvfp4-a4", "--data", tmp_path / "text.txt", "--seq-len", 16, "--json")
    done = cli("quantize", add_tokenizer(source), tmp_path / "out", *flags)
    assert done.code == 3 and "is in no layer that runs" in done.json["error"]["message"], done.out
    assert not (tmp_path / "out").exists()
