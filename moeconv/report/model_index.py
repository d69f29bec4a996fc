"""The results of `evaluate --tasks` in the model card of a checkpoint: the hub's `model-index`, and a table.

https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from moeconv.checkpoint.card import CARD_NAME
from moeconv.checkpoint.paths import hub_name
from moeconv.checkpoint.writer import replace_file
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.report.json_values import mapping, number, rows
from moeconv.types import JsonObject

_KEY = "model-index"
_BEGIN, _END = "<!-- results: moeconv report --card -->", "<!-- end of results -->"
_FRONT = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_OLD_KEY = re.compile(rf"^{_KEY}:.*\n?(?:(?:[ \t-].*)?\n)*", re.MULTILINE)
_TABLE = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)
# metric of evaluate -> the hub's word for it
_METRICS = {"accuracy_per_char": "acc_norm"}


def add_to_card(model: Model, results: Sequence[Mapping[str, object]], *, title: str) -> str:
    """Write this model's task results, taken from the JSON objects `results` of commands, into its card, and return the
    path of the card.

    Results of the same tasks are replaced; all other text and metadata stay. Raises InputError for a card that cannot
    be read, for a model in the hub's cache, and where no result belongs to this model.
    """
    folder = model.checkpoint.path
    card = folder / CARD_NAME
    if hub_name(folder) is not None:
        raise InputError(f"--card: {escape(folder)} is in the hub's cache", hint="Copy the model to a directory first.")
    found = _tasks_of(folder, results)
    if not found:
        raise InputError(
            f"--card: --results has no task results of {escape(folder)}",
            hint="`moeconv evaluate MODEL --tasks FILE --json` prints them.",
        )
    replace_file(card, _edited(_read(card), found, title=title, card=card).encode())
    return str(card)


def _tasks_of(folder: Path, results: Sequence[Mapping[str, object]]) -> list[JsonObject]:
    """The entries of `model-index` for the evaluations of the model in this directory; a later one replaces an earlier
    one of the same task."""
    found: dict[str, JsonObject] = {}
    for result in results:
        path = result.get("path")
        if isinstance(path, str) and os.path.realpath(path) == os.path.realpath(folder):
            for task in rows(mapping(result.get("tasks")).get("results")):
                if (entry := _entry(task))["metrics"]:
                    found[entry["dataset"]["type"]] = entry
    return list(found.values())


def _entry(task: Mapping[str, object]) -> JsonObject:
    """One task as the hub wants it: its kind, the data, and {type, value} of every metric."""
    name = escape(task.get("name", "")) or "task"
    questions = number(task.get("questions"))
    return {
        "task": {"type": "text-generation"},
        "dataset": {
            "name": name,
            "type": re.sub(r"[^\w.-]+", "-", name),
            "args": {"questions": questions, "sha256": escape(task.get("sha256", ""))},
        },
        "metrics": [
            {"type": _METRICS.get(metric, escape(metric)), "name": escape(metric).replace("_", " "),
             "value": value, "args": {"stderr": number(mapping(figure).get("stderr"))}}
            for metric, figure in mapping(task.get("metrics")).items()
            if (value := number(mapping(figure).get("value"))) is not None
        ],
    }  # fmt: skip


def _read(card: Path) -> str:
    """The text of a card; empty where there is none."""
    try:
        return card.read_bytes().decode() if os.path.lexists(card) else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--card: {escape(card)} cannot be read: {escape(error)}") from None


def _edited(text: str, found: list[JsonObject], *, title: str, card: Path) -> str:
    """The card with the results in its metadata, and in the table of its text."""
    front = _FRONT.match(text)
    written, body = (front[1], text[front.end() :]) if front else ("", text)
    meta = _loaded(written, card)
    results = _merged(meta, found)
    index: list[JsonObject] = [{"name": title, "results": results}]
    table = f"{_BEGIN}\n## Results on tasks\n\n{_table(results)}\n{_END}\n"
    if _TABLE.search(body):
        body = _TABLE.sub(lambda _: table, body, count=1)
    else:
        body = f"{body.rstrip()}\n\n{table}" if body.strip() else f"\n{table}"
    return f"---\n{_with_index(written, meta, index)}---\n{body}"


def _loaded(written: str, card: Path) -> JsonObject:
    import yaml

    try:
        meta = yaml.safe_load(written)
    except (yaml.YAMLError, RecursionError, ValueError):
        meta = ()
    if meta is None:
        return {}
    if not isinstance(meta, dict):
        raise InputError(f"--card: the metadata of {escape(card)} is not YAML", hint="Correct the lines between `---`.")
    return meta


def _merged(meta: JsonObject, found: list[JsonObject]) -> list[Mapping[str, object]]:
    """The results in the card for other data, then the new ones."""
    kinds = {entry["dataset"]["type"] for entry in found}
    old = [entry for row in rows(meta.get(_KEY)) for entry in rows(row.get("results"))]
    return [entry for entry in old if mapping(entry.get("dataset")).get("type") not in kinds] + found


def _with_index(written: str, meta: JsonObject, index: list[JsonObject]) -> str:
    """The metadata as it is written, with a new `model-index`: comments and the order of keys stay."""
    import yaml

    wanted = {key: value for key, value in meta.items() if key != _KEY} | {_KEY: index}
    block = yaml.safe_dump({_KEY: index}, sort_keys=False, allow_unicode=True)
    text = _OLD_KEY.sub("", written) + block
    try:
        if yaml.safe_load(text) == wanted:
            return text
    except (yaml.YAMLError, RecursionError, ValueError):
        pass
    return yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)


def _table(results: Sequence[Mapping[str, object]]) -> str:
    lines = ["| task | questions | metric | value | standard error |", "|---|---|---|---|---|"]
    for entry in results:
        data = mapping(entry.get("dataset"))
        for metric in rows(entry.get("metrics")):
            figures = (metric.get("value"), mapping(metric.get("args")).get("stderr"))
            value, error = ("" if (n := number(figure)) is None else f"{n:.4f}" for figure in figures)
            words = (data.get("name", ""), mapping(data.get("args")).get("questions", ""), metric.get("name", ""))
            lines.append("| " + " | ".join([*(escape(word).replace("|", "/") for word in words), value, error]) + " |")
    return "\n".join(lines)
