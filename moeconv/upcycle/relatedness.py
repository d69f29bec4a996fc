"""Do checkpoints of equal shape descend from one base? Checked before their FFNs become the experts of one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moeconv.checkpoint.strictjson import parse_json
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.plan.kernels.arrays import to_float32
from moeconv.upcycle.siblings import Sibling, checkpoints

_SAMPLE = 1 << 16  # bytes of one FFN matrix that are compared
_SAME_WORDS = 0.9  # the share of the smaller vocabulary that both must have
_NAMED = 3  # tokens that a warning lists
_RELATED = 0.3  # the cosine of fine-tunes of one base is near 1, that of unrelated models near 0


def check_related(model: Model, siblings: Sequence[Sibling]) -> list[str]:
    """Warnings about siblings whose weights are not related to the source's, or whose vocabulary differs a little.

    Raises InputError where a sibling's tokenizer.json gives other ids to the same tokens.
    """
    warnings: list[str] = []
    for sibling in checkpoints(siblings):  # an adapter has no tokens, and names its base
        where = escape(sibling.checkpoint.path)
        warnings += check_vocabulary(model, sibling, where)
        cosine = _cosine(model, sibling)
        if abs(cosine) < _RELATED:
            warnings.append(
                f"{where} does not look like a sibling of SOURCE: their first FFN weights have a cosine of {cosine:.2f}"
                " (fine-tunes of one base have 0.9 and more); its experts will not fit the other layers"
            )
    return warnings


def check_vocabulary(model: Model, other: Model, where: str) -> list[str]:
    """The warning about another vocabulary. Raises what `check_related` raises."""
    ours, theirs = _vocabulary(model), _vocabulary(other)
    differs = ours is not None and theirs is not None and ours != theirs
    return [_compare_vocabularies(where, ours, theirs)] if differs and ours and theirs else []


def _compare_vocabularies(where: str, ours: dict[str, object], theirs: dict[str, object]) -> str:
    """The warning about tokens that were added, removed or renamed. Raises InputError for another vocabulary."""
    shared = ours.keys() & theirs.keys()
    odd = next((word for word in sorted(shared) if ours[word] != theirs[word]), None)
    if odd is not None or len(shared) < _SAME_WORDS * min(len(ours), len(theirs)):
        what = f"token {escape(odd)!r} has id {theirs[odd]}, in SOURCE {ours[odd]}" if odd else "too few tokens agree"
        raise InputError(
            f"{where} has another vocabulary than SOURCE: {what}",
            hint="The experts read SOURCE's embeddings. Choose siblings that were trained with its tokenizer.",
        )
    parts = [
        f"{what} {len(words)} ({', '.join(map(escape, words[:_NAMED]))}{', ...' * (len(words) > _NAMED)})"
        for what, words in (("has", sorted(theirs.keys() - shared)), ("lacks", sorted(ours.keys() - shared)))
        if words
    ]
    return (
        f"{where} {' and '.join(parts)} tokens compared with SOURCE: the result has SOURCE's tokenizer and embeddings, "
        "and only the FFNs of its siblings"
    )


def _vocabulary(model: Model) -> dict[str, object] | None:
    """The ids of a model's tokens; None where its tokenizer.json does not have them."""
    path = Path(model.checkpoint.path) / "tokenizer.json"
    if not path.is_file():
        return None
    value = parse_json(path.read_bytes(), what=f"{escape(path)}")
    words = value.get("model", {}).get("vocab") if isinstance(value, dict) else None
    if not isinstance(words, dict):
        return None
    added = value.get("added_tokens") or []
    return words | {t["content"]: t.get("id") for t in added if isinstance(t, dict) and "content" in t}


def _cosine(one: Model, other: Model) -> float:
    """The cosine between the first values of the first FFN matrices."""
    name = next(n for n, role in one.roles.items() if role.group == "ffn")
    its = {(r.key, r.layer): n for n, r in other.roles.items()}
    a, b = (_start(m, n) for m, n in ((one, name), (other, its[one.roles[name].key, one.roles[name].layer])))
    count = min(len(a), len(b))
    a, b = a[:count].astype(np.float64), b[:count].astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 1.0


def _start(model: Model, name: str) -> np.ndarray:
    """The first values of a tensor, float32."""
    ref = model.checkpoint.tensors[name]
    width = ref.nbytes // max(1, int(np.prod(ref.shape)))
    size = min(ref.nbytes, _SAMPLE) // width * width
    data = bytearray(size)
    model.checkpoint.read_into(name, memoryview(data))
    return to_float32(data, ref.dtype, (size // width,))
