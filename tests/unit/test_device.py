"""--max-device-memory: what the work on a device takes follows the limit. The device is a fake one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from words import add_tokenizer, text

from moeconv.errors import UsageError
from moeconv.families.model import Model, open_model
from moeconv.prune.need import fitted_bytes, pruned_workload
from moeconv.prune.repair.refit import experts_at_once
from moeconv.quantize.gptq.run import _room
from moeconv.stream import device as devices
from moeconv.stream.device import batch_within, pick_device, room_on
from moeconv.stream.need import Workload, device_need, need_of

GB = 10**9


@dataclass
class Fake:
    """A device of 80 GB, of which other processes use 10 and this one 6 with 2 more in the cache of torch."""

    free: int = 62 * GB
    total: int = 80 * GB
    used: int = 6 * GB
    reserved: int = 8 * GB
    fraction: float = 1.0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()

    def limit(fraction: float, _index: int) -> None:
        found.fraction = fraction

    for name, value in {
        "is_available": lambda: True, "current_device": lambda: 0,
        "mem_get_info": lambda _=None: (found.free, found.total),
        "memory_allocated": lambda _=None: found.used, "memory_reserved": lambda _=None: found.reserved,
        "set_per_process_memory_fraction": limit,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(devices, "_LIMITS", {})
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(tiny.make_moe(tmp_path_factory.mktemp("m") / "model", "qwen3_moe", experts=8, hidden=64))


def test_the_allocator_is_held_to_the_limit(fake: Fake) -> None:
    assert pick_device("auto", 20 * GB).type == "cuda" and fake.fraction == 0.25
    assert room_on(torch.device("cuda")) == 14 * GB  # 20 without the 6 in use
    pick_device("cuda")  # without a limit: what is free, and what torch has in its cache
    assert fake.fraction == 1.0 and room_on(torch.device("cuda")) == 64 * GB
    pick_device("cuda", 100 * GB)
    assert fake.fraction == 1.0
    fake.used = 90 * GB
    assert room_on(torch.device("cuda")) == 0


def test_groups_of_experts_follow_the_limit(fake: Fake) -> None:
    stream: Any = SimpleNamespace(device=torch.device("cuda", 0))
    downs = torch.empty(128, 2048, 768, device="meta")
    each = fitted_bytes(2048, 768)
    for limit in (10, 22):
        pick_device("cuda", limit * GB)
        room = (limit - 6) * GB
        assert _room(stream, 4) == (room // 4, 1)
        assert experts_at_once(downs, each) == room // 4 // each
    pick_device("cuda", 6 * GB + 1)
    assert experts_at_once(downs, each) == 1, "at least one expert"


def test_the_batch_is_the_largest_that_fits(model: Model) -> None:
    run = Workload(1 << 16, 512, 8, width=2)
    needs = [device_need(model, Workload(1 << 16, 512, size, width=2)) for size in range(1, 9)]
    assert needs == sorted(needs) and needs[0] < needs[-1]
    for size, need in enumerate(needs, 1):
        assert batch_within(model, run, need, what="this") == size
    with pytest.raises(UsageError, match=r"this takes at least .* of the device's memory") as told:
        batch_within(model, run, needs[0] - 1, what="this")
    assert "--max-device-memory" in told.value.hint


def test_training_keeps_its_batch(model: Model) -> None:
    asks = pruned_workload(model, refitted=4, healed=4)
    run = Workload(1 << 12, 64, 8, **asks)
    need = device_need(model, run)
    assert run.trains and batch_within(model, run, need, what="this") == 8
    with pytest.raises(UsageError, match="takes at least"):
        batch_within(model, run, need - 1, what="this")


def test_all_experts_of_a_layer_and_no_activations_of_all_tokens_are_on_the_device(model: Model) -> None:
    few, many = (device_need(model, Workload(tokens, 512, 2)) for tokens in (4096, 1 << 20))
    assert few == many < need_of(model, Workload(1 << 20, 512, 2)).activations
    experts = sum(model.numel(ref) for n, ref in model.checkpoint.tensors.items()
                  if (role := model.roles[n]).group == "expert" and role.layer == 0)  # fmt: skip
    assert few > 4 * experts


def test_a_limit_is_refused_where_there_is_no_gpu(tmp_path: Path, cli: Any) -> None:
    path = add_tokenizer(tiny.make_moe(tmp_path / "model", "qwen3_moe"))
    (tmp_path / "text").write_text(text(300))
    for verb, words in {
        "calibrate": [tmp_path / "out"], "prune": [tmp_path / "out", "--keep", 3], "evaluate": [],
        "quantize": [tmp_path / "out", "--scheme", "int4", "--method", "gptq"],
        "tune": [tmp_path / "out", "--objective", "lm"],
    }.items():  # fmt: skip
        done = cli(verb, path, *words, "--data", tmp_path / "text", "--seq-len", 16, "--max-device-memory", "8GB")
        assert done.code == 2 and "runs on the CPU" in done.err, (verb, done.err)
    assert not (tmp_path / "out").exists()
