"""`python -m moeconv` and the `moeconv` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Threads that spin while they wait made training on a shared machine nine times slower. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from moeconv.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # while importing: run has not taken over the signal yet
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
