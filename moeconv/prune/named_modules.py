"""Experts that a quantization_config names by number (`ignore`, `modules_to_not_convert`, `targets`), renumbered.

An entry is matched against the checkpoint's modules as its reader matches it. One that means the same under the new
numbers stays word for word; any other becomes the explicit names of what it stood for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.module_groups import Groups, groups_of, matching
from moeconv.families.names import module_names
from moeconv.families.packed import weight_of
from moeconv.families.spec import with_expert

Keep = Mapping[int, Sequence[int]]

# keys of the libraries' configs that hold lists of modules: compressed-tensors, transformers, ModelOpt, Quark, HQQ
_LISTS = (
    "ignore", "targets", "modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers", "exclude_modules",
    "exclude", "skip_modules",
)  # fmt: skip
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
_LITERAL = re.compile(r"[\w.-]+")
_NUMBERED = re.compile(r"experts?(?:\\?[._]|\[)\d")
_HINT = "Prune the unquantized checkpoint, and quantize the result."


@dataclass(frozen=True)
class _Names:
    """Modules of the experts: {name: its name after the prune, None where its expert goes}, and all others' names;
    and, where config.json has them, the `groups` that modules belong to."""

    experts: Mapping[str, str | None]
    containers: frozenset[str]
    others: tuple[str, ...]
    joined: str
    groups: Groups | None = None

    @property
    def left(self) -> frozenset[str]:
        return frozenset(new for new in self.experts.values() if new is not None)


def renumbered(model: Model, quantization: Mapping[str, Any], keep: Keep) -> dict[str, Any]:
    """The quantization_config of the model that keeps the experts `keep` {layer: ids, in their new order}.

    Raises InputError for an entry that names experts of no tensor, for names outside the known lists, and where groups
    of experts cannot be told apart under the new numbers.
    """
    names = _names(model, keep)
    matches = _MATCHES.get(str(quantization.get("quant_method")), _matches_part)
    if quantization.get("config_groups"):
        names = replace(names, groups=groups_of(quantization))
    made = {key: _walked(value, f"quantization_config.{key}", key, names, matches)
            for key, value in quantization.items()}  # fmt: skip
    if names.groups is not None:
        _check_groups(names, names.groups, groups_of(made))
    return made


def _check_groups(names: _Names, before: Groups, after: Groups) -> None:
    """Raises InputError for an expert that would be of another group than it was."""
    for old, new in names.experts.items():
        if new is None or old in names.containers:
            continue
        was, now = before.group_of(old), after.group_of(new)
        if was != now:
            raise InputError(
                f"config.json: quantization_config.config_groups tells experts apart by numbers ({escape(old)} is of "
                f"{escape(was)}), in a way that cannot be kept under new ones",
                hint=_HINT,
            )


def check_renumbering(model: Model, quantization: Mapping[str, Any]) -> None:
    """Raises InputError where no prune could renumber the config: tried with every number moved."""
    moved = [*range(1, model.num_experts), 0]
    renumbered(model, quantization, dict.fromkeys((*model.moe_layers, *model.mtp_layers), moved))


def _names(model: Model, keep: Keep) -> _Names:
    position = {layer: {e: i for i, e in enumerate(kept)} for layer, kept in keep.items()}
    experts: dict[str, str | None] = {}
    containers: set[str] = set()
    others: dict[str, None] = {}
    for tensor in model.checkpoint.tensors:
        role = model.roles.get(tensor)
        for module in module_names(weight_of(tensor), model.family):
            if role is None or role.group != "expert" or role.expert is None or role.layer is None:
                others[module] = None
                continue
            new = position[role.layer].get(role.expert)
            mark = f"experts.{role.expert}"
            container = module[: module.index(mark) + len(mark)] if f"{mark}." in module else module
            containers.add(container)
            for name in (container, module):
                moved = None if new is None else with_expert(f"{name}.", role.expert, new)[:-1]
                experts[name] = moved
    return _Names(experts, frozenset(containers), tuple(others), "\n".join(experts))


_Matcher = Callable[[str], Callable[[str], bool]]


def _walked(value: Any, path: str, key: str, names: _Names, matches: _Matcher, group: str = "") -> Any:
    """A value of the config with the lists in it renumbered; any other string that names an expert is refused. `group`
    is the key of the config group that the value is a part of."""
    if isinstance(value, Mapping):
        for inner in value:
            _refuse_numbers(str(inner), path, names)
        grouped = path == "quantization_config.config_groups"
        made = {k: _walked(v, f"{path}.{k}", str(k), names, matches, str(k) if grouped else group)
                for k, v in value.items()}  # fmt: skip
        return {k: v for k, v in made.items() if not _emptied(value[k], v)}
    if key in _LISTS and isinstance(value, list) and all(isinstance(word, str) for word in value):
        return list(dict.fromkeys(new for word in value for new in _entry(word, path, names, matches, group)))
    if isinstance(value, list):
        return [_walked(item, path, "", names, matches, group) for item in value]
    if isinstance(value, str):
        _refuse_numbers(value, path, names)
    return value


def _emptied(old: Any, new: Any) -> bool:
    """Whether a group's targets were experts that are all gone: it would then be a group of nothing."""
    was = old.get("targets") if isinstance(old, Mapping) else None
    return bool(was) and new.get("targets") == []


def _refuse_numbers(word: str, path: str, names: _Names) -> None:
    """Raises InputError for a string outside the known lists that depends on experts' numbers under any reading."""
    if not _NUMBERED.search(word) and not word.startswith("re:"):
        return
    for matches in (matching, _matches_part):
        test = matches(word.removeprefix("+:").removeprefix("-:"))
        if _NUMBERED.search(word) or _images(test, names) != {n for n in names.left if test(n)}:
            raise InputError(
                f"config.json: {path} names single experts ({escape(word)[:80]}), which are renumbered", hint=_HINT
            )


def _images(test: Callable[[str], bool], names: _Names) -> set[str]:
    """The new names of the experts' modules that stay and that an entry matches."""
    return {new for old, new in names.experts.items() if new is not None and test(old)}


def _entry(word: str, path: str, names: _Names, matches: _Matcher, group: str) -> list[str]:
    """What takes the place of one entry of a list."""

    def belongs(name: str) -> bool:  # a name in full beats a pattern, so that each is listed in its own group alone
        return not group or names.groups is None or names.groups.group_of(name) == group

    if _LITERAL.fullmatch(word) and word not in names.joined:
        found: set[str] = set()  # most entries: other modules, or none
    else:
        test = matches(word)
        found = {old for old in names.experts if test(old)}
    if not found:
        if _NUMBERED.search(word):
            raise InputError(
                f"config.json: {path} names an expert that no tensor belongs to ({escape(word)[:80]}), and experts are "
                "renumbered",
                hint=f"Remove the entry where it is stale. {_HINT}",
            )
        return [word]
    wanted = {new for old in found if (new := names.experts[old]) is not None}
    if wanted == {new for new in names.left if test(new)}:
        return [word] if wanted or any(test(name) for name in names.others) else []
    modules = found - names.containers or found
    kept = sorted({new for old in modules if (new := names.experts[old]) is not None and belongs(old)}, key=_natural)
    return [*(name for name in names.others if test(name) and belongs(name)), *kept]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _matches_part(word: str) -> Callable[[str], bool]:
    """transformers: an expression for the first components of a name, a name's end, or (version 4) components in its
    middle."""
    word = word.removeprefix("re:")

    def literal(name: str) -> bool:
        return name.endswith(word) or name == word or f"{word}." in name

    begins = _compiled(f"(?:{word}){_BOUNDARY}", otherwise=literal)
    return lambda name: literal(name) or begins(name)


def _compiled(pattern: str, *, otherwise: Callable[[str], bool]) -> Callable[[str], bool]:
    try:
        expression = re.compile(pattern)
    except re.error:
        return otherwise
    return lambda name: expression.match(name) is not None


_MATCHES: Mapping[str, _Matcher] = {"compressed-tensors": matching}  # the other methods look for parts of names
