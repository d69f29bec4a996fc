"""Memory is known before a weight is read: what a run takes, where its parts go, what is refused and in which words."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from words import add_tokenizer, text

from moeconv.calibrate.run import calibrate
from moeconv.errors import InputError, UsageError
from moeconv.evaluate.run import evaluate
from moeconv.families.model import open_model
from moeconv.plan.memory import free_memory
from moeconv.prune.need import pruned_workload
from moeconv.quantize.gptq.need import TENSOR_BYTES, codes_bytes, gptq_workload
from moeconv.quantize.planner import plan_quantize
from moeconv.stream import need
from moeconv.stream.need import MemoryPlacement, Need, Workload, choose_placement, need_of

pytestmark = pytest.mark.usefixtures("one_thread")

GB = 10**9
NEED = Need(ends=GB, layer=GB // 2, held=4 * GB, read=GB // 2, activations=2 * GB, kept=0)


def test_what_is_short_goes_to_the_disk_activations_first() -> None:
    full, file, read = (NEED.peak(held=h, in_file=f) for h, f in ((True, False), (True, True), (False, True)))
    assert full == file + 2 * GB and read < file
    assert choose_placement(NEED, budget=None, free=full) == MemoryPlacement(full, full, True, None)
    assert choose_placement(NEED, budget=None, free=full - 1) == MemoryPlacement(file, full - 1, True, 0)
    assert choose_placement(NEED, budget=file - 1, free=full) == MemoryPlacement(read, full, False, 0)
    assert choose_placement(NEED, budget=full, free=1).held, "a budget overrules what is free"


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    with pytest.raises(InputError, match=r"calibrate takes at least 1.4 GB of memory, and 1.0 GB are free") as told:
        choose_placement(NEED, budget=None, free=GB, what="calibrate")
    assert "--batch-size" in told.value.hint and "--max-memory" in told.value.hint
    with pytest.raises(UsageError, match=r"--max-memory 1.0 GB: this takes at least 1.4 GB"):
        choose_placement(NEED, budget=GB, free=100 * GB)


@pytest.mark.slow
def test_a_layer_counts_as_it_is_stored(tmp_path: Path) -> None:
    """Held experts take their bytes on disk, experts in place their widened ones; what is read takes a few."""
    path = tiny.make_moe(
        tmp_path / "moe", "qwen3_moe", experts=64, hidden=256, intermediate=1024, layers=1, head_dim=64
    )
    model = open_model(path)
    experts = sum(model.checkpoint.tensors[n].nbytes for n, role in model.roles.items() if role.group == "expert")
    assert 2 * experts > need.GROUP_BYTES
    stored, placed = (need_of(model, Workload(64, 64, 1, copies=copies)) for copies in (0, 3))
    one = experts // 64 * 2  # widened
    group = need.GROUP_BYTES // one * one
    assert placed.held - stored.held == pytest.approx(5 * experts - group, rel=0.02)
    assert stored.held - stored.read == experts - group // 2 - 4 * group // 3, "what is read is joined anew"
    assert stored.activations == 64 * 256 * 4


def test_what_a_refit_adds_is_in_memory_in_any_case(tmp_path: Path) -> None:
    """Its copies of all activations are never in a file, so that the least memory grows with the tokens."""
    model = open_model(tiny.make_moe(tmp_path / "moe", "qwen3_moe", hidden=32))
    plain, refit = (
        [need_of(model, Workload(tokens, 16, 1, **pruned_workload(model, refitted=n))) for tokens in (64, 6400)]
        for n in (0, 2)
    )
    assert plain[0].least == plain[1].least
    assert refit[1].least - refit[0].least == 4 * (6400 - 64) * 32 * 4
    assert refit[1].activations == plain[1].activations == 2 * 6400 * 32 * 4


def test_codes_are_chosen_with_the_experts_in_memory_once(tmp_path: Path) -> None:
    """Beside them the packed ones, and per job one group of experts that is coded."""
    path = tiny.make_moe(tmp_path / "moe", "qwen3_moe", experts=8, top_k=2, hidden=256, intermediate=128, layers=1)
    model, tokens = open_model(path), 640
    needs = {}
    for bits, jobs in ((4, 1), (8, 1), (8, 2)):
        items = [i for i in plan_quantize(model, bits=bits, method="gptq").items() if i.changed == "expert"]
        packed = sum(spec.nbytes for item in items for spec in item.outputs)
        asks = gptq_workload(model, items, tokens=tokens, seq_len=16, jobs=jobs)
        needs[bits, jobs] = need_of(model, replace(Workload(tokens, 16, 1), **asks)), packed
    (four, of_four), (eight, of_eight), (both, _) = needs.values()
    assert eight.kept - four.kept == of_eight - of_four > 0
    together = 8 * codes_bytes(2 * 128, 256)  # all of them: below CODED_BYTES
    held, pool = (tokens // 16) * 256 * 4, 8 * 256 * 256
    assert eight.kept == of_eight + held + pool + TENSOR_BYTES * 72, "three matrices of eight experts in three parts"
    work = eight.held - 4 * 8 * 3 * 128 * 256
    assert together <= work < 1.25 * together, "or what the experts compute for the codes of their down projections"
    assert both.held == eight.held, "one group: a second job has nothing to do"
    assert eight.read < eight.held and eight.activations == 2 * tokens * 256 * 4


@pytest.mark.slow
def test_commands_refuse_before_they_read_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    path = add_tokenizer(tiny.make_moe(tmp_path / "moe", "qwen3_moe"))
    (tmp_path / "text").write_text(text(100))
    data = ("--data", tmp_path / "text", "--seq-len", 16, "--device", "cpu", "--json")
    monkeypatch.setattr(need, "free_memory", lambda: 123_000_000)
    monkeypatch.setattr("moeconv.tensors.read_parts", lambda *_a: pytest.fail("a weight was read"))
    for words in (
        ("calibrate", path, tmp_path / "stats", *data),
        ("evaluate", path, *data),
        ("tune", path, tmp_path / "tuned", "--objective", "lm", "--steps", 2, *data),
        ("quantize", path, tmp_path / "codes", "--method", "gptq", "--scheme", "int8", *data),
        ("prune", path, tmp_path / "pruned", "--keep", 2, "--criterion", "aimer", "--refit", *data),
    ):
        done = cli(*words)
        assert done.code == 3, (words, done.out)
        assert "123.0 MB are free" in done.json["error"]["message"], done.json
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"moe", "text"}


def test_a_dry_run_tells_it_and_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    path = add_tokenizer(tiny.make_moe(tmp_path / "moe", "qwen3_moe"))
    (tmp_path / "text").write_text(text(100))
    data = ("--data", tmp_path / "text", "--dry-run", "--json")
    for words in (
        ("calibrate", path, tmp_path / "o", *data),
        ("evaluate", path, *data),
        ("evaluate", path, "--reference", path, *data),
        ("tune", path, tmp_path / "o", "--teacher", path, *data),
        ("tune", path, tmp_path / "o", "--objective", "lm", *data),
        ("quantize", path, tmp_path / "o", "--method", "gptq", "--scheme", "int8", *data),
        ("prune", path, tmp_path / "o", "--keep", 2, "--refit", *data),
    ):
        for free, warned in ((10 * GB, False), (GB // 10, True)):
            monkeypatch.setattr("moeconv.runner.run.free_memory", lambda free=free: free)
            done = cli(*words)
            assert done.code == 0 and done.json["memory"]["free_bytes"] == free, done.out
            assert done.json["memory"]["peak_bytes"] >= done.json["memory"]["least_bytes"] > GB // 10
            assert any("measuring takes at least" in w for w in done.json["warnings"]) == warned
            assert done.json["dry_run"] and not (tmp_path / "o").exists()
            assert cli(*(word for word in words if word != "--json")).code == 0, "its table"


def test_both_measuring_commands_say_what_they_take(tmp_path: Path) -> None:
    path = add_tokenizer(tiny.make_moe(tmp_path / "moe", "qwen3_moe"))
    (tmp_path / "text").write_text(text(100))
    data = [str(tmp_path / "text")]
    one = calibrate(path, tmp_path / "stats", data=data, seq_len=16, device="cpu")["memory"]
    other = evaluate(path, data=data, seq_len=16, device="cpu", max_memory="900MB")["memory"]
    for told in (one, other):
        assert (told["experts"], told["activations"]) == ("memory", "memory")
        assert 400e6 < told["peak_bytes"] < 700e6 and told["free_bytes"] > told["peak_bytes"]


def test_looking_ahead_imports_no_torch(tmp_path: Path) -> None:
    path = tiny.make_moe(tmp_path / "moe")
    code = (
        "import sys; from moeconv.families.model import open_model; from moeconv.stream.need import *;"
        f"n = need_of(open_model({str(path)!r}), Workload(64, 16, 1)); print(n.least, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(found[0]) > 0 and found[1] == "False"


def test_free_memory_heeds_control_groups_and_limits(tmp_path: Path) -> None:
    def put(name: str, content: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    put("proc/meminfo", "MemTotal: 99 kB\nMemAvailable: 8000000 kB\n")
    assert free_memory(tmp_path) == 8_192_000_000
    put("proc/self/cgroup", "0::/a/b\n")
    put("sys/fs/cgroup/a/memory.max", "5000000000\n")
    put("sys/fs/cgroup/a/memory.current", "4000000000\n")
    put("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 500000000\nactive_file 250000000\n")
    put("sys/fs/cgroup/a/b/memory.max", "max\n")
    assert free_memory(tmp_path) == 1_750_000_000, "of the group above, with the pages that it can give back"
    put("proc/self/cgroup", "4:memory:/c\n")
    put("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "3000000000")
    put("sys/fs/cgroup/memory/c/memory.usage_in_bytes", "1000000000")
    assert free_memory(tmp_path) == 2_000_000_000


def test_free_memory_heeds_ulimit() -> None:
    code = "from moeconv.plan.memory import free_memory; print(free_memory())"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 * GB, 2 * GB))

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limited, check=True)
    assert 0 < json.loads(done.stdout) < 2 * GB


@pytest.mark.parametrize("command", [("calibrate", "s.safetensors"), ("evaluate",), ("prune", "out", "--ratio", "0.5")])
def test_a_dry_run_refuses_sequences_that_the_run_refuses(command, tmp_path, cli):
    tiny.make_moe(tmp_path / "moe", max_position_embeddings=64)
    verb, *rest = command
    words = [tmp_path / word if word in ("s.safetensors", "out") else word for word in rest]
    done = cli(verb, tmp_path / "moe", *words, "--data", tmp_path / "text", "--seq-len", 65, "--dry-run", "--json")
    assert done.code == 2 and "more than the model's 64 positions" in done.json["error"]["message"]
