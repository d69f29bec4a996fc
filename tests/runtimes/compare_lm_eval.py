"""The choices that `moeconv evaluate --tasks` and lm-evaluation-harness pick on the same questions, compared.

    python tests/runtimes/compare_lm_eval.py MODEL QUIZ.jsonl --lm-eval PYTHON

QUIZ.jsonl has questions with choices in moeconv's layout (one context per question); PYTHON is the interpreter of an
environment with lm-eval. Both take the model in float32. Prints both accuracies, the largest difference between the
log-probabilities, and the questions on which another choice is picked; ends with 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_TASK = """
task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {quiz}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
_SCRIPT = """
import json, sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model, folder, out = sys.argv[1:]
lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=8)
found = lm_eval.simple_evaluate(
    lm, tasks=["quiz"], task_manager=TaskManager(include_path=folder, include_defaults=False), log_samples=True,
    bootstrap_iters=0,
)
samples = sorted(found["samples"]["quiz"], key=lambda s: s["doc_id"])
json.dump({"logs": [[float(r[0]) for r in s["filtered_resps"]] for s in samples],
           "acc": found["results"]["quiz"]["acc,none"]}, open(out, "w"))
"""


def theirs(python: str, model: Path, quiz: Path) -> dict[str, Any]:
    """The log-probability of every choice, and the accuracy, from lm-evaluation-harness."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "quiz.yaml").write_text(_TASK.format(quiz=quiz))
        out = Path(folder) / "out.json"
        subprocess.run([python, "-c", _SCRIPT, str(model), folder, str(out)], check=True, stdout=sys.stderr)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def ours(model: Path, quiz: Path) -> tuple[list[list[float]], float]:
    """The same from moeconv."""
    from moeconv.data.tasks import read_tasks
    from moeconv.data.tokenizer import load_tokenizer
    from moeconv.evaluate.accuracy import grade
    from moeconv.evaluate.answers import answers_of
    from moeconv.evaluate.encode import encode
    from moeconv.families.model import open_model
    from moeconv.stream.layers import LayerStream

    opened, tasks = open_model(model), read_tasks([str(quiz)])
    longest = opened.value("max_position_embeddings")
    asked = encode(tasks, load_tokenizer(model), longest=longest, batch_size=8)
    found = answers_of(LayerStream(opened, asked.inputs).run(), asked)
    counts = np.cumsum([len(q.choices) for q in tasks[0].questions])[:-1]
    accuracy = float(grade(tasks, asked, found)[0].values["accuracy"].mean())
    return [list(map(float, part)) for part in np.split(found.logs, counts)], accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("quiz", type=Path)
    parser.add_argument("--lm-eval", required=True, metavar="PYTHON")
    given = parser.parse_args()
    mine, accuracy = ours(given.model.absolute(), given.quiz.absolute())
    found = theirs(given.lm_eval, given.model.absolute(), given.quiz.absolute())
    most = max(abs(a - b) for one, other in zip(mine, found["logs"], strict=True) for a, b in zip(one, other))
    other = [i for i, (a, b) in enumerate(zip(mine, found["logs"])) if np.argmax(a) != np.argmax(b)]
    print(f"{len(mine)} questions: accuracy {accuracy:.4f}, lm-eval {found['acc']:.4f}")
    print(f"largest difference of a log-probability {most:.1e}; other choices picked in {other or 'no question'}")
    sys.exit(bool(other))


if __name__ == "__main__":
    main()
