"""Which dense family becomes which Mixture-of-Experts family: the row of a pair, or why there is none.

Everything that two families' own rows say (tensor names, fused and packed tensors, rotary order, norm offsets, rope and
sliding windows) is derived from them; a pair adds config keys and names the folds that it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeconv.errors import InputError, closest, escape
from moeconv.families.refused import IMPOSSIBLE
from moeconv.families.registry import tables
from moeconv.families.spec import Family, Pair


def find_pair(source: Family, to: str | None, *, shared: bool = False) -> Pair:
    """The row for `source` and the target named `to`; None is the default target, with `shared` one that has a shared
    expert. Raises InputError."""
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
    """The default of a source's pairs; with `shared` the default among those whose target has a shared expert, or the
    first of them."""
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
        targets = {pair.target: moe[pair.target] for pair in tables().pairs}  # no other family helps the user
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
    """(largest difference of logits in float32 that the pair's arithmetic allows, in units of their spread, 0 without a
    row; the weights for which the pair is not exact)."""
    found = ((p.tolerance, p.unless) for p in tables().pairs if (p.source, p.target) == (source, target))
    return next(found, (0.0, ""))
