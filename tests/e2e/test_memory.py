"""Peak memory does not grow with the checkpoint: the same bounds hold for 150 MB and for 600 MB of weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEGABYTE = 1_000_000


@pytest.fixture(scope="session")
def torch_rss_bytes() -> int:
    """Peak resident memory of a process that imports torch and does nothing: it differs between builds and machines."""
    script = "import resource, torch; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def _synthetic(path: Path, family: str, gigabytes: float) -> Path:
    script = ROOT / "benchmarks" / "synthetic.py"
    words = [sys.executable, script, path, "--family", family, "--gigabytes", gigabytes, "--shards", 3]
    subprocess.run([str(w) for w in words], check=True, capture_output=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [0.15, 0.6])
def test_copies_need_no_torch_and_under_100_mb(tmp_path, command, gigabytes):
    source = _synthetic(tmp_path / "dense", "llama", gigabytes)
    done = command("upcycle", source, tmp_path / "out", "--experts", 2, "--no-check", "--json")
    assert done.code == 0, done.err
    assert done.json["peak_rss_bytes"] < 100 * MEGABYTE


@pytest.mark.slow
def test_eight_files_at_once_stay_under_it_too(tmp_path, command):
    source = _synthetic(tmp_path / "dense", "llama", 0.15)
    done = command("upcycle", source, tmp_path / "out", "--experts", 8, "--shard-by", "expert", "--no-check", "--json")
    assert done.code == 0, done.err
    assert done.json["shards"] == 9 and done.json["peak_rss_bytes"] < 100 * MEGABYTE


@pytest.mark.slow
def test_pruning_stays_under_130_mb(tmp_path, command):
    source = _synthetic(tmp_path / "moe", "qwen3_moe", 0.6)
    done = command("prune", source, tmp_path / "out", "--ratio", 0.5, "--json")
    assert done.code == 0, done.err
    assert done.json["peak_rss_bytes"] < 130 * MEGABYTE


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--scheme", "int4"), ("--format", "bitsandbytes")], ids="-".join)
def test_packing_needs_at_most_100_mb_beside_torch(tmp_path, command, torch_rss_bytes, flags):
    source = _synthetic(tmp_path / "moe", "qwen3_moe", 0.6)
    done = command("quantize", source, tmp_path / "out", *flags, "--json")
    assert done.code == 0, done.err
    assert done.json["peak_rss_bytes"] < torch_rss_bytes + 100 * MEGABYTE
