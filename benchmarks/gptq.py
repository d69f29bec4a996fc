"""CPU seconds of choosing codes for all experts of a layer at once, against one matrix at a time.

    python benchmarks/gptq.py [--experts 128 --hidden 128 --inner 64] [--scheme nf4] [--before FILE] [--alone 8]

`alone` is the same solver, given so many matrices one after the other. FILE is the one-matrix solver of an earlier
version, such as `git show e34d40c:moeconv/gptq/matrix.py > FILE`; its codes are compared too. Weights are random and
in bfloat16, inputs correlated; a layer is its gates and ups, which share their inputs, and its downs.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moeconv.plan.kernels.pack import pack_nf4
from moeconv.plan.kernels.pack.levels import Coded, Grid
from moeconv.quantize.gptq.need import CODED_BYTES, codes_bytes, experts_per_call
from moeconv.quantize.gptq.solve import damped, gptq, loss

INTEGERS = {
    "int4": (torch.arange(-8.0, 8.0), 7.5, torch.bfloat16),
    "int8": (torch.arange(-128.0, 128.0), 127.5, torch.bfloat16),
}


def grid_of(scheme: str) -> tuple[Any, ...]:
    """(levels, top, dtype of the scales) of a scheme."""
    if scheme in INTEGERS:
        return INTEGERS[scheme]
    return pack_nf4(torch.zeros(1, 64), quant_type=scheme)["quant_map"].sort().values, 1.0, torch.float32


def layer(experts: int, hidden: int, inner: int, tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(weights [E, out, in], damped Hessians [E, in, in]) of gate and up, and of down."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, out, width in (("gate and up", 2 * inner, hidden), ("down", hidden, inner)):
        weight = (torch.randn(experts, out, width, generator=draw) * 0.02).bfloat16().float()
        mix = torch.eye(width) + torch.randn(width, width, generator=draw) / width**0.5
        moments = torch.empty(experts, width, width, dtype=torch.float64)
        for e in range(experts):
            x = torch.randn(tokens, width, generator=draw) @ mix
            moments[e] = (x.T @ x).double()
        found[name] = weight, damped(moments, 0.01)
    return found


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and what it returns."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def load(path: Path) -> ModuleType:
    """The solver of an earlier version."""
    spec = importlib.util.spec_from_file_location("before", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["before"] = module
    spec.loader.exec_module(module)
    return module


def together(weight: Tensor, hessian: Tensor, grid: Grid, group: int) -> Coded:
    """The codes of all experts, in groups as the command forms them."""
    _, out, width = weight.shape
    size = max(1, min(experts_per_call(out), CODED_BYTES // codes_bytes(out, width)))
    parts = [gptq(w, h, grid, group=group) for w, h in zip(weight.split(size), hessian.split(size), strict=True)]
    return Coded(torch.cat([p.levels for p in parts]), torch.cat([p.scales for p in parts]))


def each(solve: Callable[..., Any], grid: Any, group: int, given: list[Tensor], hessian: Tensor) -> list[Coded]:
    """What a solver makes of matrices one at a time; those of one expert joined again."""
    found = []
    for e, one in enumerate(hessian):
        made = [solve(part[e], one, grid, group=group) for part in given]
        found.append(Coded(torch.cat([m.levels for m in made]), torch.cat([m.scales for m in made])))
    return found


def batch_of_one(weight: Tensor, hessian: Tensor, grid: Grid, *, group: int) -> Coded:
    """The codes of one matrix by the batched solver."""
    made = gptq(weight[None], hessian[None], grid, group=group)
    return Coded(made.levels[0], made.scales[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--inner", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--scheme", default="nf4", choices=(*INTEGERS, "nf4", "fp4"))
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--alone", type=int, default=8, help="experts that are coded one at a time")
    parser.add_argument("--before", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind, group, some = grid_of(args.scheme), args.group, min(args.alone, args.experts)
    grid, solvers = Grid(*kind), {"alone": (batch_of_one, Grid(*kind))}
    if args.before:
        before = load(args.before)
        solvers["before"] = before.gptq, before.Grid(*kind)
    totals = dict.fromkeys(["together", *solvers], 0.0)
    for name, (weight, hessian) in layer(args.experts, args.hidden, args.inner, args.tokens).items():
        spent, coded = seconds(partial(together, weight, hessian, grid, group))
        totals["together"] += spent
        print(f"{name} {tuple(weight.shape)}: {1e3 * spent / args.experts:.1f} ms an expert", end="")
        given = list(weight[:some].chunk(1 if name == "down" else 2, 1))
        for solver, (solve, of) in solvers.items():
            spent, made = seconds(partial(each, solve, of, group, given, hessian[:some]))
            totals[solver] += spent * args.experts / some
            was = Coded(torch.stack([m.levels for m in made]), torch.stack([m.scales for m in made]))
            now = Coded(coded.levels[:some], coded.scales[:some])
            same = float((was.levels == now.levels).double().mean())
            found, least = (float(loss(weight[:some], hessian[:some], c).sum()) for c in (now, was))
            print(f"; {solver} {1e3 * spent / some:.1f}", end="")
            print(f" ({same:.4%} of its codes, loss {found / least - 1:+.1e})", end="")
        print()
    ratios = [f"{name} {spent:.1f} ({spent / totals['together']:.1f} x)" for name, spent in totals.items()]
    print(
        f"layer of {args.experts} experts {args.hidden} x {args.inner}, {args.scheme}, CPU seconds:", ", ".join(ratios)
    )


if __name__ == "__main__":
    main()
