"""Which dense family becomes which Mixture-of-Experts family: the row of a pair, or why there is none.

Everything that two families' own rows say (tensor names, fused and packed tensors, rotary order, norm offsets, rope and
sliding windows) is derived from them; a pair adds config keys and names the folds that it takes.
"""

from __future__ import annotations

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
    targets = tables().moe
    mine = [p for p in tables().pairs if p.source == source.model_type]
    rows = [p for p in mine if (p.default if to is None else p.target == to)]
    if to is None and shared and rows and not targets[rows[0].target].experts.shared_width:
        able = [p for p in mine if targets[p.target].experts.shared_width]
        rows = [p for p in able if p.with_shared] or able or rows
    if rows:
        return rows[0]
    can = ", ".join(p.target for p in mine) or "nothing yet"
    if to is not None and to not in targets:
        become = {pair.target: targets[pair.target] for pair in tables().pairs}  # the others are no help to the user
        named = {word: name for name, row in become.items() for word in (name, row.architecture)}
        close = closest(to, named)
        meant = f"Did you mean {named[close]}? " if close else ""
        raise InputError(
            f"--to {escape(to)}: no such Mixture-of-Experts family",
            hint=f"{meant}{source.model_type} can become: {can}.",
        )
    why = IMPOSSIBLE.get((source.model_type, to or ""), f"no exact mapping from {source.model_type} to it is known")
    raise InputError(f"cannot write {source.model_type} as {escape(to)}: {why}", hint=f"It can become: {can}.")


def promise(source: str, target: str) -> tuple[float, str]:
    """(of the logits' spread in float32, what the pair's arithmetic allows, 0 where no row says it; of which weights it
    is not exact)."""
    found = ((p.tolerance, p.unless) for p in tables().pairs if (p.source, p.target) == (source, target))
    return next(found, (0.0, ""))
