"""CPU seconds of the packers alone, as GB of bf16 weights per second and core, beside that of INT4 in the same run.

    python benchmarks/packers.py [--only NAME ...] [--rounds 6]

Every packer has the same matrix of 1536 x 2048. A round calls each of them once, so that other processes on the machine
disturb all alike; the figure is that of the fastest round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moeconv.plan.kernels.pack import eightbit, fp4, integer, mlx

Packer = Callable[[Tensor], dict[str, Tensor]]
INT4 = "int4"
PACKERS: dict[str, Packer] = {
    **{f"int{bits}": partial(integer.pack_int, bits=bits, group_size=128) for bits in (4, 2, 3, 8)},
    "fp8": eightbit.pack_float8,
    "fp8-block": partial(eightbit.pack_float8_blocks, block=128),
    "w8a8": eightbit.pack_int8_rows,
    "mxfp8": eightbit.pack_mxfp8,
    "nvfp4": fp4.pack_nvfp4,
    "mxfp4": fp4.pack_mxfp4,
    **{f"mlx affine{bits}": partial(mlx.pack_mlx, mode="affine", bits=bits, group_size=64) for bits in (2, 3, 4, 6, 8)},
    "mlx mxfp4": partial(mlx.pack_mlx, mode="mxfp4", bits=4, group_size=32),
    "mlx nvfp4": partial(mlx.pack_mlx, mode="nvfp4", bits=4, group_size=16),
    "mlx mxfp8": partial(mlx.pack_mlx, mode="mxfp8", bits=8, group_size=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    weight = (torch.randn(1536, 2048, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    names = [name for name in PACKERS if name == INT4 or not given.only or name in given.only]
    best = dict.fromkeys(names, float("inf"))
    for _ in range(given.rounds):
        for name in names:
            start = time.thread_time()
            PACKERS[name](weight)
            best[name] = min(best[name], time.thread_time() - start)
    print(f"{'':14}{'GB/s':>6}{'of int4':>9}")
    for name, seconds in best.items():
        print(f"{name:14}{weight.nbytes / seconds / 1e9:>6.2f}{best[INT4] / seconds:>9.2f}")


if __name__ == "__main__":
    main()
