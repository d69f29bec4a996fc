"""Which config group of compressed-tensors a module belongs to, according to the groups' `targets` and to `ignore`.

The rules are those of apply_quantization_config, match_targets and is_match in compressed-tensors (utils/match.py,
version 0.20). A full name takes precedence over `re:` patterns, and these over names of classes. Of several matching
patterns the first in alphabetical order counts; of several groups with the same target, the last. `ignore` takes
precedence over everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from moeconv.errors import InputError, Unsupported, escape
from moeconv.types import Config

PATTERN = "re:"
_LINEAR = ("Linear", "Module")  # the class of a matrix, and the classes that it inherits from
_EMBEDDING = ("Embedding", "Module")
_CORRECT = "Correct config.json, or download it again."


@lru_cache(maxsize=4096)
def matching(entry: str) -> Callable[[str], bool]:
    """A function that tells whether a module's name matches an entry of `targets` or `ignore`.

    The entry is a full name, or `re:` and a regular expression that matches the beginning of the name. An expression
    that Python cannot parse matches nothing.
    """
    if not entry.startswith(PATTERN):
        return lambda name: name == entry
    try:
        expression = re.compile(entry.removeprefix(PATTERN))
    except re.error:
        return lambda _name: False
    return lambda name: expression.match(name) is not None


@dataclass(frozen=True)
class Groups:
    """`targets`, {target: key of its group} in order of precedence, and `ignore`."""

    targets: Mapping[str, str]
    ignore: tuple[str, ...]

    def group_of(self, module: str, *, embedding: bool = False) -> str | None:
        """The key of the group that a module belongs to; None for a module that is not quantized."""
        classes = _EMBEDDING if embedding else _LINEAR
        if any(entry in classes or matching(entry)(module) for entry in self.ignore):
            return None
        named = (target for target in self.targets if matching(target)(module))
        of_class = (target for target in self.targets if target in classes)
        found = next(named, None) or next(of_class, None)
        return None if found is None else self.targets[found]


def groups_of(quantization: Config) -> Groups:
    """The groups of a quantization_config of compressed-tensors.

    Raises InputError for `targets` or `ignore` that are not lists of names, and Unsupported for an expression that
    Python cannot parse.
    """
    targets: dict[str, str] = {}
    for key, group in (quantization.get("config_groups") or {}).items():
        targets |= dict.fromkeys(_words(group.get("targets"), f"config_groups.{key}.targets"), key)
    ignore = _words(quantization.get("ignore"), "ignore")
    return Groups({t: targets[t] for t in sorted(targets, key=lambda t: (PATTERN in t, t))}, tuple(ignore))


def listed_names(value: object, key: str) -> list[str]:
    """The names in a list of quantization_config; none where it is not stated. Raises InputError for anything else."""
    words = [] if value is None else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise InputError(
            f"config.json: quantization_config.{key} must be a list of names, found {escape(value)[:80]}", hint=_CORRECT
        )
    return words


def _words(value: object, key: str) -> list[str]:
    words = listed_names(value, key)
    for word in words:
        try:
            re.compile(word.removeprefix(PATTERN) if word.startswith(PATTERN) else "")
        except re.error as error:
            raise Unsupported(
                f"config.json: quantization_config.{key} has an expression that cannot be read: {escape(word)[:80]}",
                hint=_CORRECT,
            ) from error
    return words
