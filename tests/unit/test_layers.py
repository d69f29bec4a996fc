"""Who may know whom, read from the imports; and that looking and planning never load torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import make_dense, make_moe

import moeconv
from moeconv.families.registry import tables
from moeconv.prune.criteria import CRITERIA
from moeconv.quantize.formats import FORMATS
from moeconv.upcycle.methods import METHODS

ROOT = Path(moeconv.__file__).parent
FILES = {
    ".".join(("moeconv", *f.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): f
    for f in ROOT.rglob("*.py")
}

ABOVE_FAMILIES = ("plan.arrange", "plan.build", "plan.planned")  # what the planners share; the loop must not know it
EVERY_ROOM = {"types", "contract", "units"}  # types, and numbers in words
# room -> rooms that it may know beside itself and those
DECIDE = {
    "callable_package",
    "errors",
    "options",
    "checkpoint",
    "families",
    "matching",
    "plan",
    "plugins",
    "randomness",
}
STREAM = DECIDE | {"tensors", "stream", "data", "world", "callable_package"}
MEASURE = STREAM | {"calibrate"}
STEP = MEASURE | {"runner", "requests"}  # a verb from start to end
MAY_KNOW: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "world": {"errors"},
    "units": set(),
    "versions": set(),
    "plugins": {"errors"},
    "matching": set(),
    "randomness": set(),
    "callable_package": set(),
    "api": {"checkpoint", "families", "plan", "prune", "quantize", "tune", "upcycle", "verbs"},
    "verbs": {"checkpoint", "errors", "options", "plan", "requests", "result", "steps"},
    "result": set(),
    "checkpoint": {"errors"},
    "families": {"errors", "checkpoint", "plugins"},
    "options": {"errors"},
    "requests": {"options"},
    "contract": {"errors"},
    "plan": {"errors", "checkpoint", "randomness"},
    "plan.arrange": {"errors", "options", "checkpoint", "families"},
    "plan.build": {"errors", "checkpoint", "families"},
    "plan.planned": {"errors", "checkpoint", "families"},
    "plan.kernels": {"errors", "checkpoint", "randomness"},
    "tensors": {"errors", "checkpoint", "families", "plan"},
    "stream": {"errors", "families", "plan", "tensors", "world"},
    "data": {"errors", "checkpoint", "families", "plan", "randomness", "stream"},
    "calibrate": STREAM,
    "upcycle": DECIDE,
    "prune": DECIDE,
    "quantize": DECIDE,
    "arrangement": DECIDE | {"prune"},
    "collapsing": DECIDE | {"upcycle"},
    "tune": MEASURE,
    "evaluate": MEASURE,
    "importing": DECIDE | {"quantize"},
    "importing.step": STEP,
    "inspect": DECIDE | {"callable_package", "importing"},
    "verify": MEASURE | {"hf", "inspect"},
    "hf": {"errors", "plan", "versions"},
    "runner": MEASURE | {"report", "requests"},
    "report": DECIDE | {"calibrate", "inspect", "quantize", "tensors", "upcycle"},
    "recipe": STEP | {"collapsing", "importing", "steps", "upcycle", "tune", "prune", "quantize", "evaluate", "report"},
    "steps": {"requests", "plan"},
    "demo": {"errors", "plan", "recipe"},
    "cli": STEP
    | {
        "upcycle",
        "tune",
        "prune",
        "quantize",
        "evaluate",
        "inspect",
        "verify",
        "report",
        "recipe",
        "demo",
        "steps",
        "versions",
    },
    "__main__": {"cli"},
}
# Files that measure, or that take a verb from start to end, in the rooms that decide. Every other file there
# decides: it loads no torch, reads no tensor bytes, and knows none of these.
MEASURING: dict[str, set[str]] = {
    "upcycle.step": STEP,
    "upcycle.check": STEP | {"verify"},
    "upcycle.extend": STEP | {"evaluate"},
    "upcycle.added_rows": MEASURE,
    "upcycle.measured_split": MEASURE | {"requests"},
    "upcycle.router": MEASURE,
    "upcycle.partition": MEASURE,
    "upcycle.ffn_split": DECIDE,
    "upcycle.linear_router": DECIDE,
    "upcycle.grouping": DECIDE,
    "upcycle.centroids": DECIDE,
    "upcycle.relatedness": DECIDE,
    "prune.step": STEP,
    "prune.curve": STEP,
    "prune.evidence": STEP,
    "prune.gates": MEASURE | {"requests"},
    "prune.mix": MEASURE | {"requests"},
    "prune.repairs": STEP | {"tune"},
    "prune.windows": MEASURE | {"requests"},
    "prune.need": DECIDE | {"stream"},
    "prune.scores": MEASURE | {"evaluate"},
    "prune.repair": MEASURE | {"tune"},
    "quantize.step": STEP,
    "quantize.gptq": MEASURE,
    "quantize.gguf.measure_imatrix": MEASURE,
    "quantize.proof": DECIDE | {"tensors"},
    "quantize.awq_factors": DECIDE | {"tensors"},
    "calibrate.step": STEP | {"quantize"},
    "arrangement.step": STEP | {"prune"},
    "collapsing.step": STEP,
    "collapsing.need": DECIDE | {"stream"},
    "collapsing.fit": MEASURE | {"prune"},
    "tune.step": STEP,
    "evaluate.step": STEP,
    "inspect.step": STEP,
    "verify.step": STEP,
    "report.step": STEP | {"evaluate"},
}
DECIDING = ("upcycle", "prune", "quantize", "arrangement", "collapsing")
TRANSFORMERS = (
    "stream",
    "data",
    "calibrate",
    "tune",
    "evaluate",
    "verify",
    "hf",
    "upcycle.check",
    "upcycle.router",
    "upcycle.partition",
    "upcycle.ffn_split",
    "upcycle.linear_router",
    "upcycle.grouping",
    "upcycle.centroids",
    "prune.repair",
    "prune.repairs",
    "prune.scores",
    "collapsing.fit",
    "quantize.gptq",
    "quantize.gguf.measure_imatrix",
)
TORCH_AT_IMPORT = (
    *TRANSFORMERS,
    "tensors",
    "plan.kernels.pack",
    "plan.kernels.quantized",
    "plan.kernels.compressed",
    "plan.kernels.stored",
    "plan.kernels.decode",
)


def room(module: str) -> str:
    """moeconv.plan.kernels.draw -> plan.kernels: the longest name in the tables."""
    parts = module.split(".")[1:]
    while parts and ".".join(parts) not in MAY_KNOW | MEASURING:
        parts.pop()
    return ".".join(parts)


def inside(module: str, rooms: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"moeconv.{r}.") for r in rooms)


def imports(tree: ast.AST, *, at_import_only: bool = False) -> Iterator[str]:
    """Names of the modules that a file imports, in functions too unless `at_import_only`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, at_import_only=at_import_only)


def parsed(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


MODULES = pytest.mark.parametrize("module", sorted(FILES))


def test_every_room_has_its_rule():
    assert {m for m in FILES if m != "moeconv" and not room(m)} == set()
    assert {r for r in MAY_KNOW | MEASURING if not any(inside(m, (r,)) for m in FILES)} == set()


@MODULES
def test_layers(module):
    mine = room(module)
    own = mine.partition(".")[0]
    may_know = (MAY_KNOW | MEASURING).get(mine, set())
    for name in imports(parsed(module)):
        if name in FILES and name != "moeconv" and mine:
            theirs = room(name)
            same_room = theirs.partition(".")[0] == own and not (mine == "plan" and theirs in ABOVE_FAMILIES)
            assert same_room or theirs.partition(".")[0] in may_know | EVERY_ROOM, f"{module} imports {name}"


@MODULES
def test_transformers_is_for_the_rooms_that_run_models(module):
    found = [n for n in imports(parsed(module)) if n.partition(".")[0] == "transformers"]
    assert not found or inside(module, TRANSFORMERS), found


@MODULES
def test_torch_is_not_imported_by_importing(module):
    heavy = ("torch", "transformers", "bitsandbytes", "compressed_tensors")
    found = [n for n in imports(parsed(module), at_import_only=True) if n.partition(".")[0] in heavy]
    assert not found or inside(module, TORCH_AT_IMPORT), found


@pytest.mark.parametrize("module", sorted(m for m in FILES if room(m) in DECIDING))
def test_deciding_never_reaches_for_torch_or_bytes(module):
    tree = parsed(module)
    names = list(imports(tree))
    assert not [n for n in names if n.partition(".")[0] in ("torch", "transformers")]
    assert not [n for n in names if n in FILES and room(n) in MEASURING], "a file that decides knows one that measures"
    reads = {"read", "read_into", "read_at"}
    assert not [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in reads]


def test_the_verbs_rooms_decide_unless_named():
    """A new file in these rooms is held to the strict rule by itself."""
    for verb in DECIDING:
        assert room(f"moeconv.{verb}.new_file") == verb and any(room(m) == verb for m in FILES)


def compared(tree: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """(source, words) of every comparison, call of startswith or endswith, and case of a match."""
    for node in ast.walk(tree):
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("swith"):
            operands = list(node.args)
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        words = [c.value for o in operands for c in ast.walk(o) if isinstance(c, ast.Constant)]
        if operands:
            yield ast.unparse(node), {word for word in words if isinstance(word, str)}


@MODULES
def test_no_file_branches_on_a_models_name(module):
    """A family is a row of data."""
    rows = [*tables().families.values(), *(row for rows in tables().wrapped.values() for row in rows.values())]
    names = {f.model_type for f in rows} | {f.architecture for f in rows}
    for source, words in compared(parsed(module)):
        assert not names & words, f"{module}: {source}"


# What reads or computes the numbers of a stored form has that form's own words: the readers of quantization_config, the
# loader that `import moeconv.hf` registers, and the kernels.
SPEAKS = ("families.methods", "families.encodings", "hf", "plan.kernels")
OWN_FILES = {(f.make or f.shard).__module__ for f in FORMATS.values()}  # type: ignore[union-attr]
OWN_FILES |= {"moeconv.prune.criteria", "moeconv.upcycle.methods"}
# (names, what a comparison must speak of where a name is a word for other things too)
REGISTERED = {
    "format": ({*FORMATS, *(scheme.name for f in FORMATS.values() for scheme in f.schemes)}, ()),
    "criterion": (set(CRITERIA) - {"random", "magnitude"}, ()),
    "criterion or other": ({"random", "magnitude"}, ("criterion",)),
    "method": (set(METHODS) - {"copy", "split", "drop", "noise", "shuffle"}, ()),
    "method or other": ({"copy", "split", "drop", "noise", "shuffle"}, ("method",)),
}


@MODULES
def test_no_file_branches_on_the_name_of_what_is_registered(module):
    """A format, a criterion and an upcycling method are each one record: what depends on one stands in its fields."""
    if module in OWN_FILES:
        return
    for kind, (names, about) in REGISTERED.items():
        if kind == "format" and inside(module, SPEAKS):
            continue
        for source, words in compared(parsed(module)):
            found = names & words
            assert not found or (about and not any(a in source for a in about)), f"{module}: {source} asks for {found}"


@MODULES
def test_code_of_a_checkpoint_is_never_trusted(module):
    """Wherever transformers is asked, it is told so; nothing unpickles."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, module
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
            raise AssertionError(f"{module} unpickles")


@pytest.mark.slow
def test_something_is_told_not_to_trust():
    told = [
        m for m in FILES for n in ast.walk(parsed(m)) if isinstance(n, ast.keyword) and n.arg == "trust_remote_code"
    ]
    assert {room(m) for m in told} <= set(TRANSFORMERS) and len(told) >= 3


@pytest.mark.parametrize("module", ["moeconv.plan.execute", "moeconv.plan.flow", "moeconv.plan.plan"])
def test_the_loop_knows_no_verb(module):
    words = FILES[module].read_text().lower()
    assert not [v for v in ("upcycle", "prune", "quantize", "calibrate", "expert", "router") if v in words]


SCRIPT = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
heavy = ("torch", "transformers", "bitsandbytes", "compressed_tensors")
loaded = lambda: [m for m in heavy if m in sys.modules]
import moeconv
found = [["import moeconv", 0, loaded(), ""]]
from moeconv.cli.app import run
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(words)
    found.append([" ".join(words), code, loaded(), out.getvalue() + err.getvalue()])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_looking_and_planning_never_load_torch(tmp_path):
    dense, moe = str(make_dense(tmp_path / "dense")), str(make_moe(tmp_path / "moe", hidden=64, intermediate=128))
    out = str(tmp_path / "out")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"steps": [
        {"step": "upcycle", "from": "dense", "to": "a", "with": {"experts": 4}},
        {"step": "prune", "from": "a", "to": "b", "with": {"keep": 2}},
        {"step": "quantize", "from": "b", "to": "c", "with": {"format": "bitsandbytes"}},
    ]}))  # fmt: skip
    commands = [
        ["--help"], ["--version"], ["inspect", "--help"], ["upcycle", "--help"], ["calibrate", "--help"],
        ["evaluate", "--help"], ["tune", "--help"], ["prune", "--help"],
        ["quantize", "--help"], ["families"], ["formats"], ["inspect", dense],
        ["inspect", moe, "--json"], ["verify", dense],
        ["upcycle", dense, out, "--dry-run"], ["upcycle", dense, out, "--method", "drop", "--dry-run"],
        ["prune", moe, out, "--keep", "2", "--dry-run"], ["prune", moe, out, "--max-bytes", "1MB", "--dry-run"],
        ["quantize", moe, out, "--dry-run"], ["quantize", moe, out, "--bits", "8", "--dry-run", "--json"],
        ["run", str(recipe), "--dry-run"],
        ["upcycle", dense, str(tmp_path / "real"), "--no-check"],
        ["prune", moe, str(tmp_path / "real2"), "--keep", "2"],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert len(found) == len(commands) + 1
    for words, code, heavy, said in found:
        assert code == 0, f"{words}: {said}"
        assert heavy == [], words
    assert not (tmp_path / "out").exists()


def test_no_two_classes_share_a_name():
    """A name in a message, a traceback or a search leads to one class."""
    places: dict[str, list[str]] = {}
    for module in FILES:
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}
