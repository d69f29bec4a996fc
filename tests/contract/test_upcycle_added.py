"""Contract: an expert that is added to a Mixture-of-Experts leaves every token alone that does not choose it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.writer import writing_artifact
from moeconv.errors import InputError, UsageError
from moeconv.families.model import open_model
from moeconv.options import PlanOptions, UpcycleOptions
from moeconv.plan.execute import execute
from moeconv.plan.kernels.arrays import raw_bytes, to_float32
from moeconv.plan.overlay import ORIGIN
from moeconv.upcycle.added import origins_of_added, router_entries
from moeconv.upcycle.added_sources import open_added
from moeconv.upcycle.planner import plan_upcycle, upcycle_plan
from tests.contract.stock import (
    DENSE_CASES,
    MOE_CASES,
    load,
    logits,
    save_stock,
    skip_where_stock_is_broken,
)

torch.set_num_threads(1)
DEMO = Path(__file__).parents[2] / "moeconv" / "demo_data"
# cases whose config or router cannot hold one more expert, by a word of the refusal
_REFUSED = {
    "axk1": "groups", "axk2-groups": "groups", "deepseek_v3": "groups", "deepseek_v32": "groups",
    "dots3_note_text": "groups", "exaone_moe": "groups", "glm4_moe": "groups", "glm4_moe_lite": "groups",
    "glm4v_moe": "groups", "beam": "groups", "deepseek_v2-groups": "groups",
    "bailing_hybrid": "groups", "llama4": "inputs", "llama4-vision": "inputs",
}  # fmt: skip


def overlay_of(model, path, *, rows):
    """An overlay with the rows [count, H] in every layer, and 0 in the other tensors of the routers."""
    entries = router_entries(model, len(rows))
    specs = [(name, "F32", shape) for of in entries.values() for _, name, shape in of.values()]
    metadata = artifact_metadata("overlay", identity=model.identity)
    with writing_artifact(path, specs, metadata=metadata, overwrite=False) as writer:
        for of in entries.values():
            for key, (_, name, shape) in of.items():
                made = rows if key == "router.weight" else np.full(shape, 1.0 if key == "router.scale" else 0.0)
                writer.write(name, raw_bytes(np.asarray(made, np.float32).reshape(shape)))
    return SafetensorsFile(path)


def add(source, out, overlay, **options):
    model = open_model(source)
    asked = UpcycleOptions(**options)
    added = open_added(model, asked)
    plan = upcycle_plan(model, asked, PlanOptions(), added=added, overlay=overlay)
    origins = {ORIGIN: overlay, **origins_of_added(added)}
    execute(plan, source=model.checkpoint, out=out, origins=origins, jobs=1)
    assert plan.changed == plan.promise
    return plan


@pytest.mark.parametrize("case", sorted(_REFUSED))
def test_a_router_that_cannot_hold_one_more_is_refused(tmp_path, case):
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    with pytest.raises(InputError, match=_REFUSED[case]):
        plan_upcycle(open_model(source), add_experts_from=(str(source),), sibling_expert=0)


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("case", sorted(MOE_CASES.keys() - _REFUSED.keys()))
def test_an_expert_is_added_behind_the_others(tmp_path, case):
    """Its own tensors keep their bits in every layout, the new one has those of expert 1, and the class runs."""
    skip_where_stock_is_broken(case)
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    model = open_model(source)
    width = np.prod(model.checkpoint.tensors[model.router_name(model.moe_layers[0])].shape) // model.num_experts
    overlay = overlay_of(model, tmp_path / "rows", rows=np.zeros((1, int(width))))
    plan = add(source, tmp_path / "more", overlay, add_experts_from=(str(source),), sibling_expert=1)
    assert plan.block["num_experts"] == model.num_experts + 1 and plan.block["top_k"] == model.top_k
    made = open_model(tmp_path / "more")
    theirs = {(role.key, role.layer, role.expert): name for name, role in made.roles.items()}
    for name, role in model.roles.items():
        ref, old = model.checkpoint.tensors[name], model.checkpoint.read(name)
        new = made.checkpoint.read(theirs[role.key, role.layer, role.expert])
        assert new[: len(old)] == old, "all its own tensors keep their bits"
        each = ref.nbytes // model.num_experts
        if role.expert == 1:
            assert made.checkpoint.read(theirs[role.key, role.layer, model.num_experts]) == old
        elif role.group == "expert" and role.expert is None:
            assert new[len(old) :] == old[each : 2 * each]
    assert torch.isfinite(logits(load(tmp_path / "more"))).all()


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("case", "bits"), [("mixtral", False), ("qwen3_moe", False), ("granitemoe", True), ("minimax_m2", True)]
)
def test_tokens_that_do_not_choose_it_keep_their_bits(tmp_path, case, bits):
    """Rows that no token chooses: logits are the old ones, bit for bit where the softmax is over the chosen logits or
    there is none. Where a softmax over all experts is renormalised, they are equal up to its float32 rounding."""
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    model = open_model(source)
    row = to_float32(
        model.checkpoint.read(model.router_name(0)), "F32", (model.num_experts, model.hidden_size)
    ).mean(0)  # fmt: skip
    overlay = overlay_of(model, tmp_path / "rows", rows=row[None])  # the mean logit is never among the best of many
    add(source, tmp_path / "more", overlay, add_experts_from=(str(source),), sibling_expert=0)
    before, after = load(source).double(), load(tmp_path / "more").double()
    found = (logits(after) - logits(before)).abs()
    unchosen = found.amax(-1) == 0 if bits else found.amax(-1) < 1e-5
    chosen = []
    for module in after.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(
                lambda _m, args: chosen.append((args[1] == model.num_experts).any().item())
            )
    logits(after)
    assert chosen and (any(chosen) or unchosen.all())
    assert unchosen.float().mean() > 0.2, "many tokens choose others"


def _dense_and_moe(tmp_path, target):
    """A dense model, the Mixture-of-Experts that it becomes, and a fine-tuned copy of it."""
    dense = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    plan = plan_upcycle(open_model(dense), to=target, experts=4, method="drop", router_std=0.5)
    execute(plan, source=open_model(dense).checkpoint, out=tmp_path / "moe", jobs=1)
    tuned = save_stock(tmp_path / "tuned", *DENSE_CASES["llama"], dtype=torch.float32, seed=1)
    return dense, tmp_path / "moe", tuned


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("target", ["mixtral", "granitemoe", "gpt_oss", "qwen2_moe", "ernie4_5_moe"])
def test_a_fine_tuned_dense_base_becomes_an_expert(tmp_path, target):
    """Its FFN has the bytes that an upcycle of it gives, in the layout of the family."""
    _, source, tuned = _dense_and_moe(tmp_path, target)
    model = open_model(source)
    overlay = overlay_of(model, tmp_path / "rows", rows=np.zeros((1, model.hidden_size)))
    add(source, tmp_path / "more", overlay, add_experts_from=(str(tuned),))
    plan = plan_upcycle(open_model(tuned), to=target, experts=2, top_k=2)
    execute(plan, source=open_model(tuned).checkpoint, out=tmp_path / "theirs", jobs=1)
    made, theirs = open_model(tmp_path / "more"), open_model(tmp_path / "theirs")
    compared = 0
    for name, role in theirs.roles.items():
        data = theirs.checkpoint.read(name)
        if role.expert == 0:
            new = name.replace("experts.0.", "experts.4.")
            assert made.checkpoint.read(new) == data
        elif role.group == "expert" and role.expert is None:
            assert made.checkpoint.read(name)[-len(data) // 2 :] == data[: len(data) // 2]
        compared += role.group == "expert"
    assert compared
    assert torch.isfinite(logits(load(tmp_path / "more"))).all()


def test_what_does_not_fit_is_refused(tmp_path):
    dense, source, tuned = _dense_and_moe(tmp_path, "mixtral")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    model = open_model(source)
    with pytest.raises(InputError, match="rms_norm_eps"):
        plan_upcycle(model, add_experts_from=(str(tuned),))
    wide = save_stock(
        tmp_path / "wide", "llama", DENSE_CASES["llama"][1] | {"intermediate_size": 128}, dtype=torch.float32
    )
    with pytest.raises(InputError, match="an expert has"):
        plan_upcycle(model, add_experts_from=(str(wide),))
    with pytest.raises(UsageError, match="of which one becomes"):
        plan_upcycle(model, add_experts_from=(str(source),))
    with pytest.raises(UsageError, match="0 to 3"):
        plan_upcycle(model, add_experts_from=(str(source),), sibling_expert=4)
    with pytest.raises(UsageError, match="none is given"):
        plan_upcycle(model, add_experts_from=(str(dense),), sibling_expert=0)
    with pytest.raises(UsageError, match="exclude each other"):
        plan_upcycle(model, add_experts_from=(str(dense),), keep_top_k=True)


@pytest.mark.slow
def test_the_command_fits_a_row_to_the_text(tmp_path, cli):
    """The share of tokens that choose the expert is larger on its own text; a second run gives the same bytes."""
    base = DEMO / "model"
    assert cli("upcycle", base, tmp_path / "moe", "--method", "drop", "--router-std", 0.5, "--no-check").code == 0
    words = ["--add-experts-from", base, "--data", DEMO / "heldout.txt", "--data", DEMO / "calibration.txt"]
    words += ["--tokens", 2048, "--seq-len", 64]
    dry = cli("upcycle", tmp_path / "moe", tmp_path / "more", *words, "--dry-run", "--json")
    done = cli("upcycle", tmp_path / "moe", tmp_path / "more", *words, "--json")
    assert done.code == 0, done.out
    assert (done.json["bytes"], done.json["changed"]) == (dry.json["bytes"], dry.json["changed"])
    block = done.json["upcycle"]
    assert block["equivalence"]["counterpart"]["relative"] <= 1e-5
    own, other = (np.mean([layer["picked"][i][0] for layer in block["rows"]]) for i in (0, 1))
    assert own > other
    assert [s["name"] for s in block["measured"]["sources"]] == ["heldout.txt", "calibration.txt"]
    again = cli("upcycle", tmp_path / "moe", tmp_path / "again", *words, "--json", "--no-check")
    assert again.json["files"] == done.json["files"]
    lacks = cli("upcycle", tmp_path / "moe", tmp_path / "none", *words[:2], "--json")
    assert lacks.code == 2 and "needs the text of each new expert" in lacks.json["error"]["message"]
    shutil.rmtree(tmp_path / "again")
