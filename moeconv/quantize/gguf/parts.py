"""A GGUF file as several: `model-00001-of-00003.gguf` and so on, as llama.cpp's gguf-split writes them.

The first file has all metadata, and every file `split.no`, `split.count` and `split.tensors.count`. A tensor lies in
one file. llama.cpp opens the others beside the first one.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence

from moeconv.checkpoint.gguf import GgufHead, Stack, encoded_pair
from moeconv.errors import UsageError, escape
from moeconv.plan.plan import Item, Shard

_NAME = re.compile(r"\w[\w.+-]*")
_PART = re.compile(r"-\d{5}-of-\d{5}$")  # what gguf-split puts at the end of a name
_UINT16, _INT32 = (2, "<H"), (5, "<i")
_MOST = 65535  # files


def split(
    stacks: Sequence[Stack],
    items: Mapping[str, Sequence[Item]],
    *,
    metadata: bytes,
    count: int,
    size: int,
    stem: str,
) -> tuple[Shard, ...]:
    """The files, each with tensors of at most `size` bytes, in order; a larger tensor has a file of its own. `items`
    has those of each stack, by its name; `metadata` are `count` encoded key-value pairs; `stem` is the name of a file
    without .gguf. Raises UsageError for a size below 1."""
    if size < 1:
        raise UsageError("--split-size must be at least 1 byte", hint="Try --split-size 50GB.")
    bins: list[list[Stack]] = [[]]
    filled = 0
    for stack in stacks:
        if bins[-1] and filled + stack.nbytes > size:
            bins.append([])
            filled = 0
        bins[-1].append(stack)
        filled += stack.nbytes
    if len(bins) > _MOST:
        raise UsageError(f"--split-size makes {len(bins)} files, more than {_MOST}", hint="Give a larger size.")
    shards = []
    for no, some in enumerate(bins):
        name, data, pairs = f"{stem}.gguf", metadata, count
        if len(bins) > 1:
            about = _about(no, len(bins), len(stacks))
            name = f"{stem}-{no + 1:05d}-of-{len(bins):05d}.gguf"
            data, pairs = (b"" if no else metadata) + about, (0 if no else count) + 3
        shards.append(Shard(name, tuple(i for s in some for i in items[s.name]), GgufHead(data, pairs, tuple(some))))
    return tuple(shards)


def stem_of(name: str, scheme: str) -> str:
    """The name of a file without .gguf, with the scheme in the place of {type}. Raises UsageError for what is no name
    of a file, and for one that ends like a part of several files."""
    stem = name.removesuffix(".gguf").replace("{type}", scheme.upper())
    if not _NAME.fullmatch(stem) or _PART.search(stem):
        raise UsageError(
            f"--file-name {escape(name)} is no name of one file",
            hint="Use letters, digits, dots and hyphens, such as --file-name mine-{type}.",
        )
    return stem


def _about(no: int, count: int, tensors: int) -> bytes:
    """The three keys of a file of several."""
    values = {"split.no": (no, _UINT16), "split.count": (count, _UINT16), "split.tensors.count": (tensors, _INT32)}
    return b"".join(encoded_pair(key, kind, struct.pack(form, n)) for key, (n, (kind, form)) in values.items())
