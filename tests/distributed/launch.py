"""Starting several processes of one command: by hand, with the environment that a launcher gives, or by torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from conftest import Outcome

ROOT = Path(__file__).parents[2]


def launch(*arguments: object, processes: int = 2, **environment: str) -> list[Outcome]:
    """Run `python ARGUMENTS...` once per rank, and say what each did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
    } | environment  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Outcome(process.returncode, out, err) for process, (out, err) in zip(started, said)]


def torchrun(*arguments: object, processes: int = 2) -> Outcome:
    """`torchrun --nproc-per-node N -m moeconv ARGUMENTS...`"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, "-m", "moeconv", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=240,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)
