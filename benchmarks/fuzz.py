"""Coverage-guided fuzzing of everything that reads a stranger's bytes: headers, indices and configs.

    python -m venv FUZZ && FUZZ/bin/pip install atheris numpy
    FUZZ/bin/python benchmarks/fuzz.py header|index|config CORPUS [--executions N] [--seconds S]

Inputs that reached new code stay in the folder CORPUS. The exit status is 0 when N executions raised nothing but
typed errors; one that takes more than 2 seconds counts as a crash. `--minimise FROM` merges a corpus into CORPUS,
leaving out what adds no coverage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import atheris

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

with atheris.instrument_imports(include=["moeconv", "json"]):
    from attacks import targets

JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 2**31, 2**63 - 1, 2**63, 2**70, 0.5, 1e308, "", "x", "..", "../x", "/etc/passwd",
    "\0", "\x1b[2J", "\ud83d", "é\U0001f600", [], [0], [None], [[1]], {}, {"a": {}}, "BF16", "F4", "mixtral", "llama",
    "model.safetensors", "model-00001-of-00002.safetensors", "a\\b", "x" * 300, [0, 4], [4, 0], 1e-320,
    "full_attention",
)  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += _paths(child, (*path, key))
    return found


def _edit(value: Any, rng: random.Random) -> Any:
    """One place of a JSON value replaced, removed, copied or renamed."""
    path = rng.choice(_paths(value))
    if not path:
        return rng.choice(JUNK) if rng.random() < 0.05 else value
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, how = path[-1], rng.randrange(6)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice((f"{key}x", "", "\0", "__metadata__", "weight_map", "rope_parameters"))] = parent[key]
    elif how == 2 and isinstance(parent[key], int):
        parent[key] += rng.choice((-1, 1, 8, -8, 2**32))
    elif how == 3:
        other = rng.choice(_paths(value))
        found = value
        for step in other:
            found = found[step]
        parent[key] = json.loads(json.dumps(found))
    else:
        parent[key] = rng.choice(JUNK)
    return value


def _mutate_json(text: bytes, rng: random.Random) -> bytes | None:
    try:
        value = json.loads(text)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            value = _edit(value, rng)
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None


def mutator(target: str):
    """Half of the time the JSON is edited as a value, else its bytes are mutated as libFuzzer does."""

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return atheris.Mutate(data, max_size)
        if target == "header" and len(data) > 8:
            (length,) = struct.unpack("<Q", data[:8])
            text, rest = data[8 : 8 + length], data[8 + length :]
            made = _mutate_json(text, rng) or atheris.Mutate(text, max(1, max_size - len(rest) - 8))
            result = struct.pack("<Q", len(made)) + made + rest
        elif target == "config" and data:
            result = data[:1] + (_mutate_json(data[1:], rng) or atheris.Mutate(data[1:], max_size - 1))
        else:
            result = _mutate_json(data, rng) or atheris.Mutate(data, max_size)
        return result if len(result) <= max_size else atheris.Mutate(data, max_size)

    return mutate


def minimise(target: targets.Target, source: Path, corpus: Path) -> None:
    """Take over, smallest first, the inputs that run a step from one line to another which no smaller one runs."""
    seen: set[tuple[str, int, int]] = set()
    for path in sorted(source.iterdir(), key=lambda p: (p.stat().st_size, p.name)):
        found: set[tuple[str, int, int]] = set()
        before: dict[Any, int] = {}

        def line(frame: Any, event: str, _: Any, found: Any = found, before: Any = before) -> Any:
            if "moeconv" not in frame.f_code.co_filename:
                return None
            if event == "line":
                found.add((frame.f_code.co_filename, before.get(frame, 0), frame.f_lineno))
                before[frame] = frame.f_lineno
            return line

        data = path.read_bytes()
        sys.settrace(line)
        try:
            target(data)
        finally:
            sys.settrace(None)
        if found - seen:
            seen |= found
            (corpus / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("header", "index", "config"))
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--executions", type=int, default=300_000)
    parser.add_argument("--seconds", type=int, default=0, help="stop after this long (0: never)")
    parser.add_argument("--minimise", type=Path, help="take over what adds coverage from this folder")
    a = parser.parse_args()
    a.corpus.mkdir(parents=True, exist_ok=True)
    folder = targets.Folder()
    if a.minimise:
        return minimise(targets.targets(folder)[a.target], a.minimise, a.corpus)
    for i, seed in enumerate(folder.seeds()[a.target]):
        (a.corpus / f"seed{i}").write_bytes(seed)
    words = [
        sys.argv[0],
        f"-runs={a.executions}",
        "-timeout=2",
        "-rss_limit_mb=1024",
        "-max_len=16384",
        "-print_final_stats=1",
    ]
    words += [f"-max_total_time={a.seconds}"] if a.seconds else []
    words.append(str(a.corpus))
    atheris.Setup(words, targets.targets(folder)[a.target], custom_mutator=mutator(a.target))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
