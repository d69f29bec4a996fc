"""A tiny word tokenizer and text for tests that run a model on data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = tuple(f"w{i}" for i in range(60))
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def add_tokenizer(path: Path, *, words: tuple[str, ...] = WORDS, chat: bool = False) -> Path:
    """Put a whitespace tokenizer of 4 special tokens and `words` into a checkpoint directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def text(tokens: int, *, seed: int = 0, words: tuple[str, ...] = WORDS) -> str:
    """`tokens` random words; words near the list's front are more frequent."""
    rng = np.random.default_rng(seed)
    share = 1.0 / np.arange(1, len(words) + 1)
    return " ".join(rng.choice(words, size=tokens, p=share / share.sum()))
