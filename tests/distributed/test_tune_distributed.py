"""Two processes train what one trains: the same batches, shared, give the same router."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from distributed.launch import launch
from words import add_tokenizer, text

from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.tune.run import tune
from moeconv.upcycle.planner import plan_upcycle

# several runs in one start of the processes: starting costs more than training
WORKER = """
import json, sys, torch
torch.set_num_threads(1)
from moeconv import world
from moeconv.errors import UsageError
from moeconv.tune.run import tune
world.join()
for name, (model, parameters) in json.loads(sys.argv[1]).items():
    block = tune(model, name, **parameters)
    if world.current().leads:
        print(json.dumps([name, block]))
try:
    tune(model, "refused", **(parameters | {"batch_size": 1}))
except UsageError as error:
    assert "cannot be shared by 2 processes" in error.message
    assert world.end_together(error).exit_code == 2
"""
COMMON: dict[str, Any] = {"seq_len": 16, "batch_size": 5, "steps": 6, "learning_rate": 3e-3}
RUNS: dict[str, dict[str, Any]] = {
    "layerwise": {"objective": "layerwise", "z_loss": 1e-3},
    "layerwise, experts": {"objective": "layerwise", "train": "router,experts", "router_noise": 0.1},
    "distill": {"objective": "distill", "balance": 0.05},
    "distill, all": {"objective": "distill", "train": "router,experts,norms", "straight_through": True},
    "lm": {
        "objective": "lm",
        "train": "router,experts",
        "z_loss": 1e-3,
        "router_noise": 0.5,
        "temperature": 2.0,
    },
}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = add_tokenizer(tiny.make_dense(tmp_path / "dense", "llama", dtype="F32"))
    tensors = tiny.read_tensors(path)
    for name, (dtype, shape, data) in tensors.items():
        if len(shape) == 2:
            tensors[name] = (dtype, shape, tiny.encode(tiny.decode(data, dtype, shape) * 5, dtype))
    tiny.write_shards(path, tensors)
    (tmp_path / "text.txt").write_text(text(700))
    return path


def upcycled(dense: Path, out: Path, **parameters: Any) -> Path:
    model = open_model(dense)
    execute(plan_upcycle(model, method="drop", top_k=2, **parameters), source=model.checkpoint, out=out)
    return out


@pytest.mark.slow
def test_two_processes_train_the_router_of_one(dense, tmp_path):
    model = upcycled(dense, tmp_path / "moe", experts=4)
    biased = upcycled(dense, tmp_path / "biased", experts=3, to="glm4_moe")  # 3 rows for 2 processes
    runs = {name: (model, COMMON | parameters) for name, parameters in RUNS.items()}
    runs["bias"] = (biased, COMMON | {"objective": "distill", "bias_update": 0.01})
    shared = tiny.make_moe(tmp_path / "shared", "qwen2_moe", dtype="F32", norm_topk_prob=True)  # a gate of one row
    runs["shared"] = (add_tokenizer(shared), COMMON | {"objective": "lm", "train": "router,shared"})
    for _, parameters in runs.values():
        parameters |= {"data": [str(tmp_path / "text.txt")]}
        parameters |= {} if parameters["objective"] == "lm" else {"teacher": str(dense)}
    one = {name: tune(path, tmp_path / f"one {name}", **parameters) for name, (path, parameters) in runs.items()}
    asked = {str(tmp_path / f"two {name}"): (str(path), parameters) for name, (path, parameters) in runs.items()}
    done = launch("-c", WORKER, json.dumps(asked))
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    assert not done[1].out
    two = {Path(name).name.removeprefix("two "): block for name, block in map(json.loads, done[0].out.splitlines())}
    for name, block in one.items():
        a, b = (SafetensorsFile(tmp_path / f"{which} {name}") for which in ("one", "two"))
        assert block["improved"] and a.tensors.keys() == b.tensors.keys(), name
        for tensor, info in a.tensors.items():
            x, y = (tiny.decode(bytes(file.read(tensor)), info.dtype, info.shape) for file in (a, b))
            # the gradients are summed in another order, and AdamW divides by their size
            assert np.abs(x - y).max() < 5e-4, (name, tensor)
        for key in ("loss_after", "kl_after", "error_after"):
            if block.get(key) is not None:
                assert two[name][key] == pytest.approx(block[key], rel=1e-4), (name, key)
        assert two[name]["layers"][0]["load"] == pytest.approx(block["layers"][0]["load"], abs=2e-2)


@pytest.mark.slow
def test_the_command_writes_once(dense, tmp_path):
    model = upcycled(dense, tmp_path / "moe", experts=4)
    arguments = (
        "-m", "moeconv", "tune", model, tmp_path / "out", "--teacher", dense, "--data", tmp_path / "text.txt",
        "--seq-len", 16, "--steps", 2, "--objective", "distill",
    )  # fmt: skip
    done = launch(*arguments, "--json")
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    assert done[0].json["output"] == str(tmp_path / "out") and (done[1].out, done[1].err) == ("", "")
    assert open_model(tmp_path / "out").num_experts == 4
