"""Contract: LoRA adapters of one base, as the peft library saves them, become the experts of a Mixture-of-Experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import edit_json
from transformers import AutoModelForCausalLM

from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.plan.kernels.arrays import to_float32
from moeconv.upcycle.planner import plan_upcycle
from tests.contract.stock import DENSE_CASES, load, save_stock
from tests.contract.test_upcycle_added import add, overlay_of

torch.set_num_threads(1)
FFN = ["gate_proj", "up_proj", "down_proj"]


def adapter(base: Path, path: Path, *, seed: int = 0, targets: list[str] | None = None, **config: object) -> Path:
    """An adapter of `base`, saved by peft, whose factors are all other than zero."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets or FFN, **config}),
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    return path


def merged(base: Path, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the base with the adapter merged by peft."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), path)
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("case", "targets", "config"),
    [
        ("llama", FFN, {}),
        pytest.param("llama", ["down_proj"], {"use_rslora": True, "r": 3}, marks=pytest.mark.slow),
        pytest.param(
            "llama",
            FFN,
            {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.0.mlp.gate_proj": 32}},
            marks=pytest.mark.slow,
        ),
        pytest.param("phi3", ["gate_up_proj", "down_proj"], {}, marks=pytest.mark.slow),
    ],
    ids=["plain", "rslora of one matrix", "patterns", "fused gate and up"],
)
def test_an_expert_is_the_ffn_that_peft_merges(tmp_path, cli, case, targets, config):
    base = save_stock(tmp_path / "base", *DENSE_CASES[case], dtype=torch.float32)
    paths = [adapter(base, tmp_path / f"a{i}", seed=i, targets=targets, **config) for i in range(2)]
    flags = [word for path in (*paths, base) for word in ("--experts-from", path)]
    done = cli("upcycle", base, tmp_path / "moe", *flags, "--to", "mixtral", "--json")
    assert done.code == 0, done.out
    assert done.json["upcycle"]["num_experts"] == 3 and done.json["upcycle"]["equivalence"]["checked"]
    written = load(tmp_path / "moe").state_dict()
    for expert, path in enumerate(paths):
        want = merged(base, path)
        for layer in range(load(base).config.num_hidden_layers):
            stem = f"model.layers.{layer}.mlp."
            fused = want.get(f"{stem}gate_up_proj.weight")
            both = fused if fused is not None else torch.cat([want[f"{stem}{n}_proj.weight"] for n in ("gate", "up")])
            found = written[f"{stem}experts.gate_up_proj"][expert]
            torch.testing.assert_close(found, both, rtol=1e-5, atol=1e-6)
            down = written[f"{stem}experts.down_proj"][expert]
            torch.testing.assert_close(down, want[f"{stem}down_proj.weight"], rtol=1e-5, atol=1e-6)
    steps = json.loads((tmp_path / "moe" / "moeconv_manifest.json").read_text())["steps"]
    assert len(set(steps[-1]["parameters"]["experts_from"])) == 3


@pytest.mark.slow
def test_factors_outside_the_ffns_are_refused_or_left_out_by_choice(tmp_path, cli):
    base = save_stock(tmp_path / "base", *DENSE_CASES["llama"], dtype=torch.float32)
    whole = adapter(base, tmp_path / "whole", targets=[*FFN, "q_proj"])
    alone = tmp_path / "alone"
    shutil.copytree(whole, alone)
    kept = {name: t for name, t in load_file(whole / "adapter_model.safetensors").items() if "q_proj" not in name}
    save_file(kept, alone / "adapter_model.safetensors")
    flags = ("--experts-from", base, "--experts-from")
    done = cli("upcycle", base, tmp_path / "no", *flags, whole, "--json")
    assert done.code == 3 and "3 modules outside the FFNs" in done.json["error"]["message"]
    assert "--ffn-only" in done.json["error"]["hint"] and not (tmp_path / "no").exists()
    done = cli("upcycle", base, tmp_path / "some", *flags, whole, "--ffn-only", "--json")
    assert done.code == 0 and any("3 modules outside the FFNs are left out" in text for text in done.json["warnings"])
    assert cli("upcycle", base, tmp_path / "all", *flags, alone, "--json").code == 0
    some, every = (load(tmp_path / name).state_dict() for name in ("some", "all"))
    assert all(torch.equal(tensor, every[name]) for name, tensor in some.items())


def _without_b(path: Path) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, path / "adapter_model.safetensors")


def _cut(path: Path) -> None:
    whole = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(whole[:-8])


_DAMAGE = {
    "dora": (lambda path: edit_json(path / "adapter_config.json", use_dora=True), "use_dora = True"),
    "pissa": (lambda path: edit_json(path / "adapter_config.json", init_lora_weights="pissa"), "pissa"),
    "ia3": (lambda path: edit_json(path / "adapter_config.json", peft_type="IA3"), "peft_type = IA3"),
    "trained head": (lambda path: edit_json(path / "adapter_config.json", modules_to_save=["lm_head"]), "lm_head"),
    "another rank": (lambda path: edit_json(path / "adapter_config.json", r=5), "r = 5 need"),
    "rank of words": (lambda path: edit_json(path / "adapter_config.json", r="x"), "needs numbers"),
    "pattern": (lambda path: edit_json(path / "adapter_config.json", rank_pattern={"(": 4}), "not a valid pattern"),
    **{
        f"{key} {str(value)[:8]}": (
            lambda path, key=key, value=value: edit_json(path / "adapter_config.json", **{key: value}),
            words,
        )
        for key, value, words in (
            ("alora_invocation_tokens", [3, 4], "alora_invocation_tokens = [3, 4]"),
            ("arrow_config", {"top_k": 2}, "arrow"),
            ("kasa_config", {"beta": 1}, "kasa_config"),
            ("use_bdlora", {"nblocks": 2}, "use_bdlora"),
            ("velora_config", {"rank": 1}, "velora_config"),
            ("monteclora_config", {"a": 1}, "monteclora_config"),
            ("use_qalora", True, "use_qalora"),
            ("of_a_later_version", True, "of_a_later_version = True"),
            ("use_rslora", 1, "use_rslora"),
            ("lora_alpha", 10**400, "needs numbers"),
            ("r", 4.9, "needs numbers"),
            ("r", 0, "needs numbers"),
            ("rank_pattern", [1], "rank_pattern must be an object"),
            ("alpha_pattern", {"up_proj": 10**400}, "up_proj in alpha_pattern has no number"),
        )
    },
    "a model beside it": (
        lambda path: [
            shutil.copy(file, path)
            for file in (path.parent / "base").iterdir()
            if file.suffix in (".json", ".safetensors")
        ],
        "holds a model and an adapter",
    ),
    "half of a pair": (_without_b, "only one of its two factors"),
    "truncated": (_cut, "adapter_model.safetensors"),
    "pickled": (lambda path: (path / "adapter_model.safetensors").rename(path / "adapter_model.bin"), "has no adapter"),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_what_is_no_plain_adapter_is_rejected(tmp_path, cli, damage):
    base = save_stock(tmp_path / "base", *DENSE_CASES["llama"], dtype=torch.float32)
    path = adapter(base, tmp_path / "adapter")
    change, words = _DAMAGE[damage]
    change(path)
    done = cli("upcycle", base, tmp_path / "moe", "--experts-from", base, "--experts-from", path, "--json")
    assert (done.code, words in done.json["error"]["message"]) == (3, True), done.out
    assert not (tmp_path / "moe").exists()


def test_the_adapter_of_another_base_is_rejected(tmp_path, cli):
    base = save_stock(tmp_path / "base", *DENSE_CASES["llama"], dtype=torch.float32)
    name, config = DENSE_CASES["llama"]
    other = save_stock(tmp_path / "other", name, {**config, "intermediate_size": 48}, dtype=torch.float32)
    path = adapter(other, tmp_path / "adapter")
    done = cli("upcycle", base, tmp_path / "moe", "--experts-from", base, "--experts-from", path, "--json")
    assert (done.code, "SOURCE and r = 4 need" in done.json["error"]["message"]) == (3, True), done.out
    done = cli(
        "upcycle", base, tmp_path / "moe", "--experts-from", base, "--experts-from", base, "--ffn-only", "--json"
    )
    assert (done.code, "is for LoRA adapters" in done.json["error"]["message"]) == (2, True), done.out


@pytest.mark.slow
def test_an_adapter_of_the_dense_base_is_added_to_a_mixture(tmp_path, cli):
    """Its FFN is the one that peft merges, behind the experts that are there."""
    base = save_stock(tmp_path / "base", *DENSE_CASES["llama"], dtype=torch.float32)
    lora = adapter(base, tmp_path / "lora")
    edit_json(lora / "adapter_config.json", base_model_name_or_path=str(base))
    plan = plan_upcycle(open_model(base), to="mixtral", experts=4)
    execute(plan, source=open_model(base).checkpoint, out=tmp_path / "moe", jobs=1)
    model = open_model(tmp_path / "moe")
    overlay = overlay_of(model, tmp_path / "rows", rows=np.zeros((1, model.hidden_size)))
    add(tmp_path / "moe", tmp_path / "more", overlay, add_experts_from=(str(lora),))
    made, expected = open_model(tmp_path / "more"), merged(base, lora)
    for part, word in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        name = f"model.layers.1.block_sparse_moe.experts.4.{word}.weight"
        ref = made.checkpoint.tensors[name]
        found = torch.from_numpy(to_float32(made.checkpoint.read(name), ref.dtype, ref.shape))
        assert torch.allclose(found, expected[f"model.layers.1.mlp.{part}_proj.weight"], atol=1e-6)
    edit_json(lora / "adapter_config.json", base_model_name_or_path="nowhere")
    done = cli("upcycle", tmp_path / "moe", tmp_path / "none", "--add-experts-from", lora, "--dry-run", "--json")
    assert done.code == 3 and "is not a directory here" in done.json["error"]["message"]
