"""`python -m moeconv` and the `moeconv` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Threads that spin while they wait made training on a shared machine nine times slower, and those of numpy's BLAS
    # took a tenth of a quantize's processor time without being asked for anything: work is parallel over tensors. Read
    # when torch and numpy are loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from moeconv.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # while importing: run has not taken over the signal yet
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
