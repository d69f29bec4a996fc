"""Seconds per layer of the commands that run a model, on one GPU, beside floors that are measured in the same run.

    python benchmarks/gpu.py [--layers 3] [--device cuda] [--families qwen3_moe mixtral] [--small] [--out FILE.json]

From a bare environment: random checkpoints at real widths (qwen3_moe: 128 experts of 768; mixtral: 8 experts of 14336)
are made in a temporary directory. The floors are: the bytes of a layer read from the page cache, their copy to the
device, and a bf16 matrix product of as many operations as the layer's experts take. At most eight minutes: a command
for which no time is left is not run, and the table says so. The tests that are marked gpu follow. `--small --device
cpu` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from synthetic import make
from timing import warm

from moeconv.calibrate.run import calibrate
from moeconv.evaluate.run import evaluate
from moeconv.families.model import Model, open_model
from moeconv.options import DataOptions, MeasureOptions
from moeconv.plan.meter import SilentMeter
from moeconv.prune.repair.heal import Heal
from moeconv.prune.repair.pruned import pruned_pass
from moeconv.prune.repair.refit import Refit
from moeconv.prune.repair.variant import Variant
from moeconv.quantize.gptq.groups import role_of
from moeconv.quantize.gptq.run import choose_codes
from moeconv.quantize.planner import plan_quantize
from moeconv.stream.layers import LayerStream, fast_experts, layer_bytes

ROOT = Path(__file__).parents[1]
LIMIT = 480.0  # seconds of the whole run
FAMILIES = {
    "qwen3_moe": {"hidden": 2048, "experts": 128, "width": 768},
    "mixtral": {"hidden": 4096, "experts": 8, "width": 14336},
}
SMALL = {"hidden": 256, "experts": 8, "width": 96}


class Layers(SilentMeter):
    """The time at which each layer was done."""

    def __init__(self) -> None:
        super().__init__()
        self.times = [time.monotonic()]

    def part_done(self) -> None:
        self.times.append(time.monotonic())

    def seconds(self) -> tuple[float, float | None]:
        """(seconds of the first layer with everything before it, seconds of each layer behind it)."""
        steps = [b - a for a, b in zip(self.times, self.times[1:])]
        return steps[0], sum(steps[1:]) / len(steps[1:]) if steps[1:] else None


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills the dictionary with what the block took: seconds, processor seconds, device memory and busy share."""
    found: dict[str, float] = {}
    busy, stop = list[int](), threading.Event()

    def sample() -> None:
        while not stop.wait(0.05):
            try:
                busy.append(torch.cuda.utilization(device))
            except Exception:  # without pynvml the share is not known
                return

    watch = threading.Thread(target=sample, daemon=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        watch.start()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    yield found
    after = resource.getrusage(resource.RUSAGE_SELF)
    stop.set()
    found["seconds"] = time.monotonic() - began
    found["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if device.type == "cuda":
        found["device_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        found["busy"] = sum(busy) / len(busy) / 100 if busy else float("nan")


def floors(model: Model, device: torch.device, *, tokens: int) -> dict[str, float]:
    """Seconds per layer that no implementation can go below: reading, copying, and the products of the experts."""
    layer = model.moe_layers[-1]
    names = [name for name, role in model.roles.items() if role.layer == layer]
    began = time.monotonic()
    data = [model.checkpoint.read(name) for name in names]
    read = time.monotonic() - began
    host = torch.frombuffer(bytearray(max(data, key=len)), dtype=torch.uint8)
    host = host.pin_memory() if device.type == "cuda" else host
    nbytes = layer_bytes(model, layer)

    def timed(work: Callable[[], Any]) -> float:
        work()
        _wait(device)
        began = time.monotonic()
        work()
        _wait(device)
        return time.monotonic() - began

    copy = timed(lambda: host.to(device, copy=True)) * nbytes / len(host)
    operations = 6 * tokens * model.top_k * model.hidden_size * model.expert_width
    side = 4096 if device.type == "cuda" else 256
    square = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    product = timed(lambda: square @ square) * operations / (2 * side**3)
    return {"read": read, "copy": copy, "product": product, "layer_gb": nbytes / 1e9}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def commands(path: Path, device: str, *, tokens: int, folder: Path) -> dict[str, Callable[[Layers], object]]:
    """{name: the command, given a meter}. Text is random words of the vocabulary."""
    model, data = open_model(path), str(folder / "text")
    windows = torch.randint(3, 1000, (tokens // 256, 256), generator=torch.Generator().manual_seed(0)).numpy()
    keep = {layer: range(0, model.num_experts, 2) for layer in model.moe_layers}
    kind = torch.device(device)

    def pruned(meter: Layers, heal: Heal | None) -> None:
        dtype = torch.float32 if heal or kind.type == "cpu" else torch.bfloat16
        stream = LayerStream(
            model, windows[: 16384 // 256], dtype=dtype, device=kind, experts=fast_experts(model, dtype), meter=meter,
            in_place=heal is not None,
        )  # fmt: skip
        refit = Refit()
        pruned_pass(stream, [Variant(keep=dict(keep), refit=refit, heal=heal, on_healed=lambda *_: None)])

    def gptq(meter: Layers) -> None:
        plan = plan_quantize(model, scheme="int4", group_size="32", method="rtn")
        packed = [i for shard in plan.shards for i in shard.items if len(i.outputs) > 1]
        items = [i for i in packed if role_of(model, i).group == "expert"]
        measure = MeasureOptions(tokens=16384, seq_len=256, device=device)
        out = folder / f"codes-{time.monotonic_ns()}"
        choose_codes(model, items, out, data=DataOptions(data=(data,)), measure=measure, damping=0.01, meter=meter)

    measured: dict[str, Any] = {"data": [data], "device": device, "seq_len": 256}
    return {
        "calibrate": lambda meter: calibrate(
            path, folder / "stats", tokens=tokens, overwrite=True, save_every=None, meter=meter, **measured
        ),
        "evaluate": lambda meter: evaluate(path, tokens=min(tokens, 16384), meter=meter, **measured),
        "prune --refit": lambda meter: pruned(meter, None),
        "prune --refit --heal 100": lambda meter: pruned(meter, Heal(100 if kind.type == "cuda" else 2)),
        "gptq": gptq,
    }


def add_words(path: Path, folder: Path) -> None:
    """A tokenizer of whole words, and a text in it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    draw = torch.randint(0, 1000, (80_000,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text").write_text(" ".join(f"w{i}" for i in draw))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--small", action="store_true", help="tiny widths and little text, to try the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began, rows, device = time.monotonic(), list[dict[str, Any]](), torch.device(options.device)
    torch.set_num_threads(1)
    print("| model | step | first layer, s | each layer, s | read | copy | product | CPU s | GPU busy | device GB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for family in options.families:
        sizes = SMALL if options.small else FAMILIES[family]
        tokens = 1024 if options.small else 65536
        with tempfile.TemporaryDirectory(prefix="moeconv-gpu-") as name:
            folder, path = Path(name), Path(name) / "model"
            hidden = sizes["hidden"]
            layer = 2 * (3 * sizes["experts"] * sizes["width"] * hidden + 3 * hidden**2)
            ends = 2 * 2 * 32000 * hidden
            make(path, model_type=family, gigabytes=(options.layers * layer + ends) / 1e9, shards=1, random=False,
                 **sizes)  # fmt: skip
            add_words(path, folder)
            warm(path)
            least = floors(open_model(path), device, tokens=tokens)
            for step, work in commands(path, options.device, tokens=tokens, folder=folder).items():
                if time.monotonic() - began > LIMIT * 0.8:
                    print(f"| {family} | {step} | not run: no time was left |", flush=True)
                    continue
                meter = Layers()
                with watched(device) as took:
                    work(meter)
                    _wait(device)
                first, each = meter.seconds()
                rows.append({"family": family, "step": step, "first": first, "each": each} | least | took)
                print(row_of(rows[-1]), flush=True)
    if device.type == "cuda":
        left = max(30.0, LIMIT - (time.monotonic() - began))
        subprocess.run([sys.executable, "-m", "pytest", "--gpu", "tests/unit"], cwd=ROOT, timeout=left, check=False)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


def row_of(row: dict[str, Any]) -> str:
    """One line of the table."""
    shown = [row["family"], row["step"]]
    for key in ("first", "each", "read", "copy", "product", "cpu_seconds", "busy", "device_gb"):
        value = row.get(key)
        shown.append("" if value is None else f"{value:.0%}" if key == "busy" else f"{value:.3g}")
    return "| " + " | ".join(shown) + " |"


if __name__ == "__main__":
    main()
