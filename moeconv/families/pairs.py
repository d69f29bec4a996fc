"""Which dense family can become which Mixture-of-Experts family: the row of a pair, or the reason why there is none.

What follows from the rows of the two families (tensor names, fused and packed tensors, rotary order, norm offsets,
rotary parameters and sliding windows) is not repeated in a pair, which lists only config keys and folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeconv.errors import InputError, UsageError, closest, escape
from moeconv.families.refused import IMPOSSIBLE
from moeconv.families.registry import tables
from moeconv.families.spec import Family, Pair


def find_pair(source: Family, to: str | None, *, shared: bool = False, text_only: bool = False) -> Pair:
    """The row of the pair of `source` and the target `to`; None stands for the default target.

    With `shared`, the default target is one that has a shared expert. With `text_only`, the language model of a
    multimodal source becomes a model of its own. Raises InputError, with the possible targets, if there is no such
    pair, and UsageError for `text_only` with a source that is not multimodal.
    """
    if text_only and not source.multimodal.beside:
        raise UsageError(f"--text-only: {source.model_type} is a language model alone", hint="Leave --text-only out.")
    if source.kind != "dense":
        raise InputError(
            f"{source.model_type} is already a Mixture-of-Experts family",
            hint="upcycle takes a dense checkpoint; see `moeconv families`.",
        )
    mine = [pair for pair in tables().pairs if pair.source == _language_model(source)]
    can = _targets(source, text_only=text_only)
    able = [pair for pair in mine if pair.target in can]
    if not able and mine and not text_only:
        raise _no_wrapper(source, mine)
    found = _default(able, can, shared=shared) if to is None else next((p for p in able if p.target == to), None)
    if found is None:
        raise _why_none(source, to, able)
    return found


def find_conversion(
    source: Family, to: str | None, *, shared: bool = False, text_only: bool = False
) -> tuple[Pair, Family]:
    """`find_pair`, and the row of its target: inside the multimodal model that the source becomes, or alone."""
    pair = find_pair(source, to, shared=shared, text_only=text_only)
    return pair, _targets(source, text_only=text_only)[pair.target]


def possible(source: Family) -> list[Family]:
    """The rows that a dense source may become, the default first; of a multimodal source, those of its language model
    alone (--text-only) come last."""
    pairs = sorted((p for p in tables().pairs if p.source == _language_model(source)), key=lambda p: not p.default)
    found: list[Family] = []
    for text_only in (False, True) if source.multimodal.beside else (False,):
        can = _targets(source, text_only=text_only)
        found += [can[pair.target] for pair in pairs if pair.target in can]
    return found


def _language_model(source: Family) -> str:
    return source.multimodal.text or source.model_type


def _targets(source: Family, *, text_only: bool) -> Mapping[str, Family]:
    """The rows with experts that a source may become, by the model_type of the language model."""
    if not source.multimodal.beside or text_only:
        return tables().moe
    inside = tables().wrapped.get(source.multimodal.becomes, {})
    return {name: row for name, row in inside.items() if row.kind == "moe"}


def _no_wrapper(source: Family, mine: Sequence[Pair]) -> InputError:
    alone = next((p.target for p in mine if p.default and p.target in tables().moe), "")
    text = _language_model(source)
    return InputError(
        f"no multimodal model of transformers is {source.model_type} with a Mixture-of-Experts that computes what "
        f"{text} computes",
        hint=f"--text-only writes the language model alone, as {alone}, without the tensors of images or sound."
        if alone
        else "`moeconv families` lists the conversions.",
    )


def target_aliases() -> dict[str, str]:
    """Other words for the families that pairs write -> model_type: the name of the class, with and without its end."""
    found = {pair.target: pair.target for pair in tables().pairs}
    for name, row in ((name, tables().moe[name]) for name in found.copy() if name in tables().moe):
        found |= dict.fromkeys((row.architecture, row.architecture.removesuffix("ForCausalLM")), name)
    return found


def _default(able: Sequence[Pair], can: Mapping[str, Family], *, shared: bool) -> Pair | None:
    """The default of a source's pairs whose targets are in `can`.

    With `shared` it is the pair marked `with_shared`, or else the first one, among those whose target has a shared
    expert.
    """
    usual = next((pair for pair in able if pair.default), None)
    if usual is None or not shared or can[usual.target].experts.shared_width:
        return usual
    sharing = [pair for pair in able if can[pair.target].experts.shared_width]
    return next((pair for pair in sharing if pair.with_shared), sharing[0] if sharing else usual)


def _why_none(source: Family, to: str | None, mine: Sequence[Pair]) -> InputError:
    if to is None:
        return InputError(
            f"no Mixture-of-Experts family is known that computes what {source.model_type} computes",
            hint="`moeconv families` lists the conversions; CONTRIBUTING.md says how to add one.",
        )
    can = ", ".join(pair.target for pair in mine) or "nothing yet"
    moe = tables().moe
    if to not in moe:
        targets = {p.target: moe[p.target] for p in tables().pairs if p.target in moe}  # only families with a pair
        words = {word: name for name, row in targets.items() for word in (name, row.architecture)}
        close = closest(to, words)
        meant = f"Did you mean {words[close]}? " if close else ""
        return InputError(
            f"--to {escape(to)}: no such Mixture-of-Experts family",
            hint=f"{meant}{source.model_type} can become: {can}.",
        )
    why = IMPOSSIBLE.get((source.model_type, to), f"no exact mapping from {source.model_type} to it is known")
    return InputError(f"cannot write {source.model_type} as {escape(to)}: {why}", hint=f"It can become: {can}.")


def promise(source: str, target: str) -> tuple[float, str]:
    """(tolerance, unless) of the pair of two families; (0.0, "") if it has no row.

    The tolerance is the largest difference of logits in float32 that counts as equal, in units of their standard
    deviation; `unless` describes the weights for which the pair is not exact.
    """
    found = ((p.tolerance, p.unless) for p in tables().pairs if (p.source, p.target) == (source, target))
    return next(found, (0.0, ""))
