"""A head of its own under a tied config (PEFT's modules_to_save): every verb carries it, as transformers 5 runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.families import folds
from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.plan.execute import execute
from moeconv.plan.overlay import ORIGIN
from moeconv.stream.layers import LayerStream
from moeconv.tune.planner import plan_overlay
from tests.contract.stock import DENSE_CASES, MOE_CASES, load, logits, relative_difference, save_stock
from tests.unit.test_tune import overlay_of, write_overlay

torch.set_num_threads(1)
_ON_THE_EMBEDDING = {
    folds.embedding_root, folds.granite_multipliers, folds.minicpm_multipliers, folds.centred_residual,
    folds.untied_head,
}  # fmt: skip
# families whose class is code in their checkpoints: tests/contract/test_remote_code.py
FOLDED = [(p.source, p.target) for p in tables().pairs if _ON_THE_EMBEDDING & set(p.folds) and p.source in DENSE_CASES]
PLAIN = [("llama", "mixtral"), ("lfm2", "lfm2_moe"), ("cohere2", "cohere2_moe"), ("gemma4_text", "gemma4_text")]


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def with_head(path: Path, *, equal: bool = False) -> Path:
    """The saved model with tie_word_embeddings true and output embeddings in the file."""
    state = state_of(path)
    tokens = next(t for name, t in state.items() if name.endswith("embed_tokens.weight"))
    torch.manual_seed(1)
    state["lm_head.weight"] = tokens.clone() if equal else torch.randn_like(tokens.float()).to(tokens.dtype) * 0.3
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return path


def dense(tmp_path: Path, model_type: str, *, equal: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    kind, config = DENSE_CASES[model_type]
    path = save_stock(tmp_path / "dense", kind, config | {"tie_word_embeddings": True}, dtype=dtype)
    return with_head(path, equal=equal)


@pytest.mark.parametrize(("source", "target"), FOLDED + PLAIN)
def test_an_upcycle_keeps_the_stored_head(tmp_path, cli, source, target):
    path = dense(tmp_path, source)
    before = logits(load(path))
    assert open_model(path).own_head
    done = cli("upcycle", path, tmp_path / "moe", "--experts", 4, "--to", target, "--no-check", "--json").json
    assert any("stored ones differ" in text for text in done["warnings"])
    tolerance = next(p.tolerance for p in tables().pairs if (p.source, p.target) == (source, target))
    assert relative_difference(before, logits(load(tmp_path / "moe"))) <= tolerance
    assert not open_model(tmp_path / "moe").own_head
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "tie_embedding" not in config


def test_the_stream_runs_the_head_that_transformers_runs(tmp_path):
    path = dense(tmp_path, "gemma")
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        expected = load(path)(ids).logits
    found = torch.cat([part for _, part in LayerStream(open_model(path), ids).run().logits()])
    assert relative_difference(expected, found) <= 1e-5


def test_a_stored_copy_of_the_embedding_is_simply_tied(tmp_path, cli):
    path = dense(tmp_path, "gemma", equal=True)
    before = logits(load(path))
    done = cli("upcycle", path, tmp_path / "moe", "--experts", 4, "--no-check", "--json").json
    assert not any("stored ones differ" in text for text in done["warnings"])
    assert relative_difference(before, logits(load(tmp_path / "moe"))) <= 1e-5
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["tie_word_embeddings"] is True


def test_siblings_take_the_head_of_the_source(tmp_path, cli):
    path = dense(tmp_path, "gemma")
    other = save_stock(tmp_path / "other", *DENSE_CASES["gemma"], dtype=torch.float32)
    for name, first in (("own", path), ("tied", other)):
        arguments = ("--experts-from", path, "--experts-from", other, "--no-check", "-q")
        assert cli("upcycle", first, tmp_path / name, *arguments).code == 0
    head = state_of(path)["lm_head.weight"]
    assert torch.equal(state_of(tmp_path / "own")["lm_head.weight"], head)
    assert "lm_head.weight" not in state_of(tmp_path / "tied")


STEPS = {
    "upcycle": ("upcycle",),
    "prune": ("prune", "--keep", 4, "--criterion", "random"),
    "quantize": ("quantize", "--scheme", "int8", "--group-size", 32),
    "prune and quantize": None,
    "tune": None,
}


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("step", STEPS)
def test_every_other_step_keeps_it_and_says_that_it_is_not_tied(tmp_path, cli, case, step):
    kind, config = MOE_CASES[case]
    tied = config | {"tie_word_embeddings": True}
    path = with_head(save_stock(tmp_path / "moe", kind, tied, dtype=torch.bfloat16))
    out, told = tmp_path / "out", None
    if step == "tune":
        model = open_model(path)
        router = model.router_name(0)
        write_overlay(tmp_path / "overlay", model, **{router: ("BF16", (8, 64), bytes(8 * 64 * 2))})
        overlay = overlay_of(tmp_path / "overlay")
        plan = plan_overlay(model, overlay)
        execute(plan, source=model.checkpoint, out=out, origins={ORIGIN: overlay})
        told = plan.warnings
    elif step == "prune and quantize":
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"name: both\nsteps:\n"
            f"  - {{step: prune, from: {path}, to: {tmp_path}/p, with: {{keep: 4, criterion: random}}}}\n"
            f'  - {{step: quantize, from: {tmp_path}/p, to: {out}, with: {{scheme: int8, group_size: "32"}}}}\n'
        )
        done = cli("run", recipe, "--json")
        assert done.code == 0, done.out + done.err
    else:
        command, *flags = STEPS[step]
        done = cli(command, path, out, *flags, "--no-check", "--json")
        assert done.code == 0, done.out
        told = done.json["warnings"]
    assert told is None or any("stored ones differ" in text for text in told)
    written, source = state_of(out), state_of(path)
    assert torch.equal(written["lm_head.weight"], source["lm_head.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_inspect_says_it(tmp_path, cli):
    path = dense(tmp_path, "llama")
    assert any("stored ones differ" in text for text in cli("inspect", path, "--json").json["warnings"])
    assert not any("the result" in text for text in cli("inspect", path, "--json").json["warnings"])
