"""Run the commands that README.md and docs/ show and put their real output into the text, so that they cannot drift.

    python docs/refresh.py [--measured] [--only WORD] [FILE ...]

A block is a comment `<!-- run: COMMAND -->` and the fenced text after it; `<!-- measured: COMMAND -->` marks one whose
output holds times or trained figures, made anew only when asked for. Commands run in one scratch directory, in the
order of the file; $DEMO there is the folder of the data that ships with moeconv.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"<!-- (?P<kind>run|measured): (?P<command>.+?) -->\n```text\n(?P<text>.*?)```", re.DOTALL)


def environment() -> dict[str, str]:
    """A terminal of 110 columns without colours, the interpreter's own commands first on PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    demo = str(ROOT / "moeconv" / "demo_data")
    # rich and typer look at these to decide whether and how wide to draw
    return os.environ | {"PATH": path, "COLUMNS": "110", "TERMINAL_WIDTH": "110", "NO_COLOR": "1", "TERM": "dumb",
                         "DEMO": demo, "HF_HUB_OFFLINE": "1"}  # fmt: skip


def run(command: str, folder: str) -> str:
    """What a command prints on stdout. A failure ends the refresh."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{command}\nended with {done.returncode}:\n{done.stderr}")
    lines = done.stdout.replace(f"{folder}/", "").splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def refreshed(text: str, *, folder: str, only: str = "", measured: bool = False) -> str:
    """The text with the output of every block made anew whose command holds `only`."""

    def replace(match: re.Match[str]) -> str:
        command = match["command"]
        if only not in command or (match["kind"] == "measured" and not measured):
            return match[0]
        return f"<!-- {match['kind']}: {command} -->\n```text\n{run(command, folder)}```"

    return _BLOCK.sub(replace, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--only", default="", help="refresh only commands that hold this word")
    parser.add_argument("--measured", action="store_true", help="also blocks with times or trained figures")
    given = parser.parse_args()
    for file in given.files:
        with tempfile.TemporaryDirectory(prefix="moeconv-docs-") as folder:
            file.write_text(refreshed(file.read_text(), folder=folder, only=given.only, measured=given.measured))


if __name__ == "__main__":
    main()
