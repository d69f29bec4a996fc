"""An option that changes nothing is refused: whatever else a command is given, no option is ignored silently."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny import make_dense, make_moe

from moeconv.options import PruneOptions, QuantizeOptions, UpcycleOptions, flag_of

# option -> another value than the default, as words of the command line; True for a flag
QUANTIZE: dict[str, object] = {
    "format": "bitsandbytes", "scheme": "int8", "bits": 8, "group_size": 32, "method": "mse", "average_bits": 5,
    "among": "int4,int8", "max_bytes": "1GB", "stats": "{file}", "split_size": "1GB", "file_name": "mine",
    "modelfile": True, "imatrix": "{file}", "damping": 0.1, "actorder": "none", "scope": "all-linear", "rest": "int8",
    "self_contained": True, "double_quant": True,
}  # fmt: skip
PRUNE: dict[str, object] = {
    "keep": 3, "ratio": 0.25, "max_bytes": "20KB", "width": 16, "width_ratio": 0.5, "shared_width": 16, "mix": "auto",
    "multiple": 8, "max_loss_increase": 0.1, "threshold": 0.5, "criterion": "magnitude", "similarity": "raw",
    "stats": "{file}", "refit": True, "refit_strength": 0.5, "refit_sweeps": 3, "heal": 2, "rescale": True,
    "sequential": True, "merge": True, "distill": 2, "top_k": 1, "curve": True, "protect_coverage": 0.5,
    "protect": "*:0,*:1,*:2",
}  # fmt: skip
UPCYCLE: dict[str, object] = {
    "experts": 4, "top_k": 1, "keep_top_k": True, "copy_scale": 0.25,
    "method": "drop", "experts_from": "{model}",
    "add_experts_from": "{model}", "sibling_expert": 1, "ffn_only": True, "to": "qwen2_moe",
    "text_only": True, "layers": "0", "granularity": 2, "shared_experts": "full", "router": "hidden",
    "router_std": 0.1, "drop_ratio": 0.25, "noise_scale": 0.1, "noise_fraction": 0.25, "clustering": "random",
    "stats": "{file}",
}  # fmt: skip
# option -> what it acts on, without which the run itself is refused and not the dry run
BY_DATA = {"refit", "heal", "sequential", "distill", "router"}
# values of random rows, which no size depends on: tests of what an upcycle draws use them
VALUES = {"router_std"}
# given in the words before, or the default of a Mixture-of-Experts
TWICE = {"keep_top_k", "experts"}
# what only checks or permits, and changes no plan
CHECKS = {"target", "requantize"}
NOT_COMPARED = ("plan_id", "seconds", "phases", "peak_rss_bytes", "warnings")


@pytest.mark.parametrize(
    ("options", "words"), [(QuantizeOptions, QUANTIZE), (PruneOptions, PRUNE), (UpcycleOptions, UPCYCLE)]
)
def test_every_option_is_tried(options: type, words: dict[str, object]) -> None:
    assert {field.name for field in dataclasses.fields(options)} == words.keys() | (CHECKS & _names(options))


def _names(options: type) -> set[str]:
    return {field.name for field in dataclasses.fields(options)}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room = tmp_path_factory.mktemp("options")
    (room / "file").write_text("no statistics")
    return {
        "moe": make_moe(room / "moe", "qwen3_moe", experts=4, hidden=128, intermediate=256, layers=2),
        "model": make_dense(room / "dense", layers=2),
        "file": room / "file",
    }


CASES = [
    *(("quantize", "moe", (), name, value) for name, value in QUANTIZE.items()),
    *(("prune", "moe", ("--keep", 2), name, value) for name, value in PRUNE.items()),
    *(("upcycle", "model", ("--experts", 2), name, value) for name, value in UPCYCLE.items() if name not in VALUES),
    *(("upcycle", "moe", (), name, value) for name, value in UPCYCLE.items() if name != "experts"),
    *(("upcycle", "moe", ("--keep-top-k",), name, value) for name, value in UPCYCLE.items() if name not in TWICE),
]


@pytest.mark.parametrize(("command", "source", "base", "name", "value"), CASES, ids=lambda value: str(value))
def test_an_option_changes_the_plan_or_is_refused(
    places: dict[str, Path], tmp_path: Path, cli: Any, command: str, source: str, base: tuple[object, ...], name: str,
    value: object,
) -> None:  # fmt: skip
    words = [flag_of(name)] if value is True else [flag_of(name), str(value).format(**places)]
    usual = [] if base[:1] == (flag_of(name),) else base
    plain = cli(command, places[source], tmp_path / "out", *base, "--dry-run", "--json")
    dry = [] if name in BY_DATA else ["--dry-run"]
    done = cli(command, places[source], tmp_path / "out", *usual, *words, *dry, "--json")
    assert plain.code == 0, plain.out
    if done.code:
        assert done.code in (2, 3) and done.json["error"]["hint"], done.out
        return
    before, after = ({k: v for k, v in one.json.items() if k not in NOT_COMPARED} for one in (plain, done))
    assert before != after, f"{flag_of(name)} is ignored"
