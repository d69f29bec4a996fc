"""Turns records of a data set into texts: strings, or chats for the template of the tokenizer (OpenAI, ShareGPT)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypeGuard

from moeconv.errors import InputError, escape
from moeconv.types import Config, JsonObject

TEXT_FIELD = "text"
CHAT_FIELDS = ("messages", "conversations", "conversation")
# ShareGPT's `from` -> the roles that chat templates know
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """The messages of one record, each with `role` and `content`, and the file and line of the record for messages."""

    messages: list[JsonObject]
    where: str


Text = str | Chat


def fields_of(text_field: str) -> tuple[str, ...]:
    """The fields that may have the text of a record, in order. With the default name, the fields of chats are
    included."""
    return (TEXT_FIELD, *CHAT_FIELDS) if text_field == TEXT_FIELD else (text_field,)


def text_of(record: Config, where: str, text_field: str) -> Text:
    """The text of one record. Raises InputError if the field has neither text nor messages."""
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
        f"{where}: no text in the field {escape(text_field)!r} (fields: {fields})",
        hint="Name the field with the text by --text-field.",
    )


def is_chat(value: object) -> TypeGuard[list[JsonObject]]:
    """Whether a value is a list of messages, {"role": ...} or {"from": ..., "value": ...}."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and _has_speaker(m) for m in value)


def chat_of(messages: list[JsonObject], where: str, *, system: object = None) -> Chat:
    """A list of messages as a chat. The `system` text of a ShareGPT record becomes its first message. Raises InputError
    for a `from` with no known role."""
    turns = [m if "role" in m else _turn(m, where) for m in messages]
    if isinstance(system, str) and system.strip() and "role" not in messages[0] and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return Chat(turns, where)


def _has_speaker(message: Config) -> bool:
    return "role" in message or ("from" in message and "value" in message)


def _turn(message: Config, where: str) -> JsonObject:
    """A message of ShareGPT with the keys of chat templates."""
    role = _ROLES.get(str(message["from"]).lower())
    if role is None:
        known = ", ".join(_ROLES)
        raise InputError(
            f"{where}: `from` is no known role: {escape(str(message['from'])[:60])!r}",
            hint=f"Known roles are {known}. Write the record as messages with `role` and `content`.",
        )
    return {"role": role, "content": message["value"]}


def _unwrapped(value: str, where: str, field: str) -> list[JsonObject]:
    """Messages that were written as a string, into a cell of a table. Raises InputError if they are not JSON."""
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        messages = None
    if not is_chat(messages):
        raise InputError(
            f"{where}: the string in the field {escape(field)!r} begins like a list of messages, and is not valid JSON",
            hint="Write the records as JSON lines, with a list in that field.",
        )
    return messages
