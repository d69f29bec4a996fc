"""Records of a data set -> texts: a string, or a chat for the tokenizer's template (OpenAI's and ShareGPT's words)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from moeconv.errors import InputError, escape

TEXT_FIELD = "text"
CHAT_FIELDS = ("messages", "conversations", "conversation")
# ShareGPT's `from` -> the roles that chat templates know
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """The messages of one record, `role` and `content` each, and the file and line that they came from."""

    messages: list[dict[str, Any]]
    where: str


Text = str | Chat


def fields_of(text_field: str) -> tuple[str, ...]:
    """The fields that may hold a record's text, in order: with the default name also those of chats."""
    return (TEXT_FIELD, *CHAT_FIELDS) if text_field == TEXT_FIELD else (text_field,)


def text_of(record: Mapping[str, Any], where: str, text_field: str) -> Text:
    """The text of one record. Raises InputError where the field holds neither text nor messages."""
    field = next((name for name in fields_of(text_field) if name in record), text_field)
    value = record.get(field)
    if isinstance(value, str) and field in CHAT_FIELDS and value.lstrip().startswith("["):
        value = _unwrapped(value, where, field)
    if isinstance(value, str):
        return value
    if is_chat(value):
        return chat_of(value, where, system=record.get("system"))
    fields = ", ".join(escape(key) for key in list(record)[:8]) or "none"
    raise InputError(
        f"{where}: no text in field {escape(text_field)!r} (fields: {fields})",
        hint="Name the field with --text-field.",
    )


def is_chat(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a value is a list of messages: {"role": ...} each, or {"from": ..., "value": ...}."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and _speaker(m) for m in value)


def chat_of(messages: list[dict[str, Any]], where: str, *, system: object = None) -> Chat:
    """A list of messages as a chat; a record's `system` text goes before ShareGPT's turns. Raises InputError for a
    `from` that stands for no role."""
    turns = [m if "role" in m else _turn(m, where) for m in messages]
    if isinstance(system, str) and system.strip() and "role" not in messages[0] and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return Chat(turns, where)


def _speaker(message: Mapping[str, Any]) -> bool:
    return "role" in message or ("from" in message and "value" in message)


def _turn(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = _ROLES.get(str(message["from"]).lower())
    if role is None:
        known = ", ".join(_ROLES)
        raise InputError(
            f"{where}: no role is known for `from`: {escape(str(message['from'])[:60])!r}",
            hint=f"Known are {known}. Write the record as messages with `role` and `content`.",
        )
    return {"role": role, "content": message["value"]}


def _unwrapped(value: str, where: str, field: str) -> Any:
    """Messages that were written as a string into a table's cell."""
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        messages = None
    if not is_chat(messages):
        raise InputError(
            f"{where}: field {escape(field)!r} holds a string that looks like a list of messages and is not JSON",
            hint="Write the records as JSON lines, with a list in that field.",
        )
    return messages
