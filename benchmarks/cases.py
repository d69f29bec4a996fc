"""Small inputs from real bug reports, each with its right answer: what the commands make of them.

    python benchmarks/cases.py CASES CHECKPOINTS WORK [NAME ...] [--transformers4 PYTHON]

CASES holds make.py, which makes the inputs from CHECKPOINTS (llama-8m, qwen3moe-12m, text/). Prints one table; exits
with 1 when a case is not right. PYTHON is an interpreter with transformers 4.57, for the case that asks what it reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Done:
    """What a command did: exit code, its JSON, and both streams as text."""

    code: int
    json: dict
    text: str


@dataclass(frozen=True)
class Place:
    """Where the inputs and outputs of the cases lie."""

    cases: Path
    checkpoints: Path
    work: Path
    transformers4: str | None

    def out(self, name: str) -> Path:
        return self.work / "out" / name

    def text(self) -> Path:
        return self.checkpoints / "text" / "heldout.python.txt"

    def run(self, *words: object) -> Done:
        """A command of moeconv with --json."""
        command = [sys.executable, "-m", "moeconv", *map(str, words), "--json"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        try:
            found = json.loads(done.stdout)
        except ValueError:
            found = {}
        return Done(done.returncode, found if isinstance(found, dict) else {}, done.stdout + done.stderr)


Answer = tuple[bool, str]  # right, and what was seen


def says(done: Done, *words: str) -> bool:
    """Whether every word stands in what the command printed."""
    return all(word.lower() in done.text.lower() for word in words)


def message(done: Done) -> str:
    """The error's message, or the first warning."""
    error = done.json.get("error")
    found = error["message"] if isinstance(error, dict) else next(iter(done.json.get("warnings", [])), "")
    return f"exit {done.code}" + (f": {found[:150]}" if found else "")


def exact(done: Done) -> bool:
    figures = done.json.get("upcycle", {}).get("equivalence", {})
    return done.code == 0 and figures.get("checked") is True and figures["relative"] <= 1e-5


def tied_with_a_head_of_its_own(at: Place, case: Path) -> Answer:
    done = at.run("upcycle", case, at.out("tied"), "--experts", 4)
    return exact(done) and says(done, "output embeddings", "older runtimes"), message(done)


def tied_head_gemma(at: Place, case: Path) -> Answer:
    done = at.run("upcycle", case, at.out("gemma"), "--experts", 4)
    config = json.loads((at.out("gemma") / "config.json").read_text()) if done.code == 0 else {}
    return exact(done) and config.get("tie_word_embeddings") is False, message(done)


def two_wordings(at: Place, case: Path) -> Answer:
    siblings = [word for name in ("old", "new") for word in ("--experts-from", case / name)]
    done = at.run("upcycle", case / "old", at.out("wordings"), *siblings)
    return done.code == 0, message(done)


_READS = """
import json, sys, torch
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1])
print(json.dumps({"rope_theta": config.rope_theta}))
"""


def only_rope_parameters(at: Place, case: Path) -> Answer:
    done = at.run("upcycle", case, at.out("rope"), "--experts", 4)
    if done.code:
        return False, message(done)
    config = json.loads((at.out("rope") / "config.json").read_text())
    both = config.get("rope_theta") == 10000.0 and config.get("rope_parameters", {}).get("rope_theta") == 10000.0
    if at.transformers4 is None:
        return both, f"rope_theta {config.get('rope_theta')} in both wordings"
    read = subprocess.run([at.transformers4, "-c", _READS, str(at.out("rope"))], capture_output=True, text=True)
    theta = json.loads(read.stdout or "{}").get("rope_theta")
    return both and theta == 10000.0, f"transformers 4.57 reads rope_theta {theta}"


def index_and_single_file(at: Place, case: Path) -> Answer:
    done = at.run("upcycle", case, at.out("both"))
    return done.code == 3 and says(done, "model.safetensors"), message(done)


def stale_vocabulary(at: Place, case: Path) -> Answer:
    done, whole = at.run("upcycle", case, at.out("stale")), at.run("verify", case)
    right = done.code == 3 and says(done, "vocab_size") and not at.out("stale").exists() and whole.code == 5
    return right, f"upcycle {message(done)}; verify exit {whole.code}: {whole.json.get('problems', ['-'])[0][:120]}"


def other_tokenizer_files(at: Place, case: Path) -> Answer:
    done = at.run("upcycle", case, at.out("files"), "--no-check")
    names = ("additional_chat_templates/tool_use.jinja", "tekken.json")
    missing = [name for name in names if not (at.out("files") / name).is_file()]
    return done.code == 0 and not missing, message(done) + f", left behind: {missing or 'nothing'}"


def int4_without_a_scale(at: Place, case: Path) -> Answer:
    part = "model.layers.1.mlp.experts.5.up_proj.weight_scale"
    looked = at.run("verify", case, "--load")
    evaluated = at.run("evaluate", case, "--data", at.text(), "--tokens", 1024)
    pruned = at.run("prune", case, at.out("scale"), "--keep", 8, "--criterion", "random")
    codes = [done.code for done in (looked, evaluated, pruned)]
    named = all(says(done, part) for done in (looked, evaluated, pruned))
    return codes == [5, 3, 3] and named, f"exits {codes}, the part is {'named' if named else 'not named'}"


def fp8_blocks_of_64(at: Place, case: Path) -> Answer:
    words = ("--reference", at.checkpoints / "qwen3moe-12m", "--data", at.text(), "--tokens", 4096)
    done = at.run("evaluate", case, *words)
    agreement = done.json.get("top1_agreement", 0.0)
    return done.code == 0 and agreement > 0.9, f"{message(done)}, agreement {agreement:.3f}"


def foreign(at: Place, case: Path) -> Answer:
    seen, right = [], True
    for name in ("gptq", "awq"):
        looked, pruned = at.run("inspect", case / name), at.run("prune", case / name, at.out(name), "--ratio", 0.5)
        right &= looked.code == 0 and pruned.code == 3 and says(pruned, name) and says(looked, name)
        seen.append(f"{name}: inspect exit {looked.code}, prune {message(pruned)}")
    return right, "; ".join(seen)


def code_beside_the_weights(at: Place, case: Path) -> Answer:
    done = at.run("prune", case, at.out("code"), "--ratio", 0.25)
    if done.code:
        return False, message(done)
    load = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1], {})"
    command = [sys.executable, "-c", load.format("trust_remote_code=True"), str(at.out("code"))]
    loaded = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    return loaded.returncode == 0, f"from_pretrained(trust_remote_code=True) exit {loaded.returncode}; {message(done)}"


def one_expert_left_out(at: Place, case: Path) -> Answer:
    halved = at.run("prune", case, at.out("half"), "--ratio", 0.5)
    kept = at.run("prune", case, at.out("kept"), "--ratio", 0.25, "--protect", "*:7")
    codes = [halved.code, kept.code]
    seen = [at.run("verify", at.out("half"), "--load").code, at.run("verify", at.out("kept")).code]
    ignored = json.loads((at.out("kept") / "config.json").read_text())["quantization_config"]["ignore"]
    stale = [name for name in ignored if "experts" in name and not plain_expert(at.out("kept"), name)]
    said = f"exits {codes}, verify {seen} (without the expert: --load), stale names: {stale or 'none'}"
    return codes == [0, 0] and seen == [0, 0] and not stale, said


def plain_expert(folder: Path, module: str) -> bool:
    """Whether the checkpoint holds a module's weight unpacked."""
    from moeconv.api import open_model

    ref = open_model(folder).checkpoint.tensors.get(f"{module}.weight")
    return ref is not None and ref.dtype == "BF16"


CASES: dict[str, Callable[[Place, Path], Answer]] = {
    f.__name__: f
    for f in (
        tied_with_a_head_of_its_own, tied_head_gemma, two_wordings, only_rope_parameters, index_and_single_file,
        stale_vocabulary, other_tokenizer_files, int4_without_a_scale, fp8_blocks_of_64, foreign,
        code_beside_the_weights, one_expert_left_out,
    )
}  # fmt: skip


def answers(at: Place, names: list[str]) -> Iterator[tuple[str, Answer]]:
    """The answer of each case, and that no input was changed by it."""
    for name in names:
        case = at.work / "in" / name
        before = fingerprint(case)
        right, seen = CASES[name](at, case)
        same = fingerprint(case) == before
        yield name, (right and same, seen if same else f"{seen}; THE INPUT WAS CHANGED")


def fingerprint(folder: Path) -> str:
    """Hash of every file's name and bytes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--transformers4", metavar="PYTHON")
    given = parser.parse_args()
    at = Place(given.cases, given.checkpoints, given.work, given.transformers4)
    names = given.names or list(CASES)
    at.out("").mkdir(parents=True, exist_ok=True)
    make = [sys.executable, str(given.cases / "make.py"), str(given.work / "in"), *names]
    made = subprocess.run(make, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    if made.returncode:
        sys.exit(f"the inputs could not be made:\n{made.stderr[-2000:]}")
    print("| case | right | what was seen |\n|---|---|---|")
    wrong = 0
    for name, (right, seen) in answers(at, names):
        wrong += not right
        print(f"| {name} | {'yes' if right else 'NO'} | {seen} |", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
