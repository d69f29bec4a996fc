"""Which dense family can become which Mixture-of-Experts family: the row of a pair, or the reason why there is none.

What follows from the rows of the two families (tensor names, fused and packed tensors, rotary order, norm offsets,
rotary parameters and sliding windows) is not repeated in a pair, which lists only config keys and folds.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeconv.errors import InputError, closest, escape
from moeconv.families.refused import IMPOSSIBLE
from moeconv.families.registry import tables
from moeconv.families.spec import Family, Pair


def find_pair(source: Family, to: str | None, *, shared: bool = False) -> Pair:
    """The row of the pair of `source` and the target `to`; None stands for the default target.

    With `shared`, the default target is one that has a shared expert. Raises InputError, with the possible targets, if
    there is no such pair.
    """
    if source.kind != "dense":
        raise InputError(
            f"{source.model_type} is already a Mixture-of-Experts family",
            hint="upcycle takes a dense checkpoint; see `moeconv families`.",
        )
    mine = [pair for pair in tables().pairs if pair.source == source.model_type]
    found = _default(mine, shared=shared) if to is None else next((p for p in mine if p.target == to), None)
    if found is None:
        raise _why_none(source, to, mine)
    return found


def _default(mine: Sequence[Pair], *, shared: bool) -> Pair | None:
    """The default of a source's pairs.

    With `shared` it is the pair marked `with_shared`, or else the first one, among those whose target has a shared
    expert.
    """
    usual = next((pair for pair in mine if pair.default), None)
    moe = tables().moe
    if usual is None or not shared or moe[usual.target].experts.shared_width:
        return usual
    able = [pair for pair in mine if moe[pair.target].experts.shared_width]
    return next((pair for pair in able if pair.with_shared), able[0] if able else usual)


def _why_none(source: Family, to: str | None, mine: Sequence[Pair]) -> InputError:
    if to is None:
        return InputError(
            f"no Mixture-of-Experts family is known that computes what {source.model_type} computes",
            hint="`moeconv families` lists the conversions; CONTRIBUTING.md says how to add one.",
        )
    can = ", ".join(pair.target for pair in mine) or "nothing yet"
    moe = tables().moe
    if to not in moe:
        targets = {pair.target: moe[pair.target] for pair in tables().pairs}  # suggest only families with a pair
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
