"""Which layers choose the tokens that sparse attention reads, and which read those that an earlier layer chose."""

from __future__ import annotations

from moeconv.families.per_layer import one_per_layer
from moeconv.families.placement import Get

_LETTERS = {"F": "full", "S": "shared"}


def indexer_types(get: Get, layers: int) -> list[str]:
    """ "full" or "shared" per layer, as the classes of GLM-5 and Mistral Large 4 derive it.

    Raises InputError for a list of another length or with other words.
    """
    words: object = get("indexer_types")
    if words is None and (pattern := get("index_topk_pattern")) is not None:
        words = [_LETTERS.get(str(word), word) for word in pattern] if isinstance(pattern, str | list) else pattern
    if words is None:
        every, first = max(get("index_topk_freq") or 1, 1), get("index_skip_topk_offset") or 0
        words = ["shared" if max(i - first + 1, 0) % every else "full" for i in range(layers)]
    return checked_types(words, layers, "indexer_types (or index_topk_pattern)")


def checked_types(words: object, layers: int, key: str) -> list[str]:
    """`words`, the value of config key `key`. Raises InputError unless they are "full" or "shared" per layer."""
    return one_per_layer(words, layers, key, allowed=tuple(_LETTERS.values()))
