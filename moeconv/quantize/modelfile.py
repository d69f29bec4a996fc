"""A Modelfile beside a GGUF file, from which ollama makes a model: https://docs.ollama.com/modelfile

ollama takes the chat template from the file itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moeconv.checkpoint.strictjson import read_json_object
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.plan.plan import Shard
from moeconv.quantize.spec import Format
from moeconv.types import JsonObject

NAME = "Modelfile"
_SETTINGS, _TOKENIZER = "generation_config.json", "tokenizer.json"
# key of generation_config.json -> ollama's name for the parameter
_PARAMETERS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip


def modelfile(model: Model, format: Format, shards: Sequence[Shard]) -> dict[str, str]:
    """{name: text} of the Modelfile: the file, the sampling settings of generation_config.json, and its stop strings.

    Raises UsageError for a format other than GGUF, and for a model in several files, which ollama does not read.
    """
    if format.shard is None:
        raise UsageError(f"--format {format.name} does not use --modelfile", hint="Use --format gguf.")
    if len(shards) > 1:
        raise UsageError(
            f"ollama reads one file, but this model is split into {len(shards)}",
            hint="Give a larger --split-size, or leave out --modelfile.",
        )
    path = model.checkpoint.path / _SETTINGS
    settings: JsonObject = read_json_object(path, what=_SETTINGS) if path.is_file() else {}
    lines = [f"FROM ./{shards[0].name}"]
    for key, word in _PARAMETERS.items():
        value = settings.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            lines.append(f"PARAMETER {word} {value}")
    lines += [f"PARAMETER stop {text}" for text in map(_quoted, _stops(model, settings)) if text is not None]
    return {NAME: "\n".join(lines) + "\n"}


def _stops(model: Model, settings: JsonObject) -> Iterator[str]:
    """The texts that end an answer: the tokens at which generation stops, and its stop strings."""
    ends = settings.get("eos_token_id", model.checkpoint.config.get("eos_token_id"))
    tokenizer = read_json_object(model.checkpoint.path / _TOKENIZER, what=_TOKENIZER)
    words = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or ()}
    yield from (words[i] for i in (ends if isinstance(ends, list) else [ends]) if i in words)
    texts = settings.get("stop_strings")
    yield from (text for text in (texts if isinstance(texts, list) else [texts]) if isinstance(text, str) and text)


def _quoted(text: str) -> str | None:
    """A string as a Modelfile quotes it; None for one that it cannot express."""
    if '"' not in text and "\n" not in text:
        return f'"{text}"'
    return None if '"""' in text or text.endswith('"') else f'"""{text}"""'
