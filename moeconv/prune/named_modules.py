"""Renumbers the experts that a quantization_config names (in `ignore`, `modules_to_not_convert`, `targets`, ...).

Each entry is matched against the modules of the checkpoint in the way of the library that reads the config. An entry
that matches the same modules under the new numbers stays as it is; any other is replaced by the names of the modules
that it matched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.module_groups import Groups, groups_of, matching
from moeconv.families.names import module_names
from moeconv.families.packed import weight_of
from moeconv.families.spec import with_expert
from moeconv.types import Config, JsonObject

Keep = Mapping[int, Sequence[int]]

# the config keys with lists of modules: of compressed-tensors, transformers, ModelOpt, Quark and HQQ
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
    """The modules of a checkpoint. `experts` {name: the name after the prune, None if the expert is removed};
    `containers` are those that hold a whole expert; `others` are all modules outside the experts; `joined` is the text
    of all names in `experts`, for a quick search; `groups` are the config groups that modules belong to, if config.json
    has such."""

    experts: Mapping[str, str | None]
    containers: frozenset[str]
    others: tuple[str, ...]
    joined: str
    groups: Groups | None = None

    @property
    def left(self) -> frozenset[str]:
        return frozenset(new for new in self.experts.values() if new is not None)


def renumbered(model: Model, quantization: Config, keep: Keep) -> JsonObject:
    """The quantization_config of the model that keeps the experts `keep` {layer: ids, in their new order}.

    Raises InputError for an entry with an expert that has no tensor, for names of experts outside the known lists, and
    where groups of experts cannot be distinguished under the new numbers.
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


def check_renumbering(model: Model, quantization: Config) -> None:
    """Raises InputError if a prune could not renumber the config. This is tried with a new number for every expert."""
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


def _walked(value: object, path: str, key: str, names: _Names, matches: _Matcher, group: str = "") -> object:
    """A value of the config with its lists renumbered. `group` is the key of the config group that the value belongs
    to. Raises InputError for any other string that names an expert."""
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


def _emptied(old: object, new: object) -> bool:
    """Whether all targets of a group were experts that are removed, so that the group must be removed too."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return False
    return bool(old.get("targets")) and new.get("targets") == []


def _refuse_numbers(word: str, path: str, names: _Names) -> None:
    """Raises InputError for a string outside the known lists that matches experts by their numbers in any library."""
    if not _NUMBERED.search(word) and not word.startswith("re:"):
        return
    for matches in (matching, _matches_part):
        test = matches(word.removeprefix("+:").removeprefix("-:"))
        if _NUMBERED.search(word) or _images(test, names) != {n for n in names.left if test(n)}:
            raise InputError(
                f"config.json: {path} names single experts ({escape(word)[:80]}) at a place that cannot be renumbered",
                hint=_HINT,
            )


def _images(test: Callable[[str], bool], names: _Names) -> set[str]:
    """The new names of the modules of kept experts that an entry matches."""
    return {new for old, new in names.experts.items() if new is not None and test(old)}


def _entry(word: str, path: str, names: _Names, matches: _Matcher, group: str) -> list[str]:
    """The entries that replace one entry of a list."""

    def belongs(name: str) -> bool:  # a full name precedes a pattern, so that each is listed only in its own group
        return not group or names.groups is None or names.groups.group_of(name) == group

    if _LITERAL.fullmatch(word) and word not in names.joined:
        found: set[str] = set()  # most entries match no expert
    else:
        test = matches(word)
        found = {old for old in names.experts if test(old)}
    if not found:
        if _NUMBERED.search(word):
            raise InputError(
                f"config.json: {path} names an expert that has no tensor ({escape(word)[:80]}), so that it cannot be "
                "renumbered",
                hint=f"Remove the entry if it is outdated. {_HINT}",
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
    """As transformers matches: an expression for the first components of a name, the end of a name, or (in version 4)
    components in its middle."""
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
