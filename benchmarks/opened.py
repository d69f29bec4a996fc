"""Can what each format would write of a published model be opened again? Headers and index against the reader's limits.

    python benchmarks/opened.py WORK CHECKPOINT [CHECKPOINT ...] [--formats bitsandbytes:nf4-double] [--write]

CHECKPOINT is a directory; holes in place of weights are enough, since nothing but headers is read. Every output is
planned with the default options (a source that is quantized with --requantize), and the largest header and the index
are compared with what the reader accepts. --write makes each output of holes below WORK, in which headers, index and
config.json are those of the real one, and opens it: a plan of 563,444 tensors takes 100 MB of disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from moeconv.checkpoint.header import header_limits, serialise_header
from moeconv.checkpoint.reader import CONFIG_NAME, INDEX_NAME
from moeconv.checkpoint.strictjson import index_limits
from moeconv.errors import MoeconvError
from moeconv.families.model import Model, open_model
from moeconv.inspect.run import inspect
from moeconv.plan.limits import check_limits, index_cost
from moeconv.plan.memory import configure_collector
from moeconv.plan.plan import Plan
from moeconv.quantize.formats import in_place
from moeconv.quantize.step import plan_packing
from moeconv.requests import QuantizeRequest, request


def _forms() -> dict[str, dict[str, object]]:
    """The options for every scheme of every format that writes safetensors files."""
    found: dict[str, dict[str, object]] = {}
    for format in in_place():
        for scheme in format.schemes:
            options: dict[str, object] = {"format": format.name, "scheme": scheme.name}
            found[f"{format.name}:{scheme.name}"] = options
            if scheme.nests:
                found[f"{format.name}:{scheme.name}-double"] = options | {"double_quant": True}
    return found


FORMS = _forms()


def planned(model: Model, name: str) -> Plan:
    """The plan of `moeconv quantize` with the defaults of a format."""
    values = {"model": str(model.checkpoint.path), "out": "out", **FORMS[name]}
    return plan_packing(model, request(QuantizeRequest, values | {"requantize": bool(model.quantization)})).plan


def row(plan: Plan) -> str:
    """Tensors, shards, and the shares of the reader's limits that the fullest header and the index take."""
    check_limits(plan)
    most = 0.0
    for shard in plan.shards:
        length, values, size = shard.cost
        limits = header_limits(size)
        most = max(most, length / limits.bytes, values / limits.values)
    length, values = index_cost(plan)
    limits = index_limits(plan.nbytes)
    share = max(length / limits.bytes, values / limits.values)
    size = f"{plan.tensors:>8,} {len(plan.shards):>5} {plan.nbytes / 1e9:>7.0f} GB"
    return f"{size} {most:>7.0%} {length / 1e6:>6.0f} MB {share:>6.0%}"


def write(plan: Plan, out: Path) -> None:
    """The output of a plan, with holes in place of the tensors' bytes."""
    out.mkdir()
    weight_map: dict[str, str] = {}
    for shard in plan.shards:
        layout = shard.layout()
        header, _ = serialise_header((s.name, s.dtype, s.shape) for s in layout)
        with open(out / shard.name, "wb") as file:
            file.write(header)
            file.truncate(shard.nbytes)
        weight_map |= {spec.name: shard.name for spec in layout}
    if len(plan.shards) > 1:
        (out / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    (out / CONFIG_NAME).write_text(json.dumps(dict(plan.config)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--formats", nargs="*", choices=FORMS, default=list(FORMS))
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args()
    configure_collector()
    print(f"{'':24} {'':28} {'tensors':>8} {'files':>5} {'':>10} {'header':>7} {'index':>9} {'':>6}  opened")
    for path in a.checkpoints:
        for name in a.formats:
            print(f"{path.name:24} {name:28} ", end="", flush=True)
            try:
                plan = planned(open_model(path), name)
                print(row(plan), end="", flush=True)
            except MoeconvError as error:
                print(error.message)
                continue
            if a.write:
                out = a.work / f"{path.name}-{name.replace(':', '-')}"
                write(plan, out)
                began = time.process_time()
                found = inspect(out)
                assert (found["tensors"], found["bytes"]) == (plan.tensors, sum(i.nbytes for i in plan.items()))
                print(f"  {time.process_time() - began:.1f} s", end="")
                shutil.rmtree(out)
            print(flush=True)
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
