"""Paths of a checkpoint's files: none leads out of its directory, unless links are followed on request."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from moeconv.errors import InputError, escape

HUB_NAME = re.compile(r"^hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?$")
_HUB_CACHE = re.compile(r"models--([\w.-]+)--([\w.-]+)$")

_following: ContextVar[bool] = ContextVar("following", default=False)


@contextmanager
def follow_links(allowed: bool = True) -> Iterator[None]:
    """Accept links that leave the directory in checkpoints that are opened in this block.

    Old downloads into a local directory have such links. With `allowed` false the block changes nothing.
    """
    token = _following.set(allowed or _following.get())
    try:
        yield
    finally:
        _following.reset(token)


def links_are_followed() -> bool:
    """Whether this code runs in a block of `follow_links`."""
    return _following.get()


def allowed_root(directory: Path) -> Path:
    """The directory that links of a checkpoint may lead to: its own, or that of its repository in the hub's cache."""
    real = Path(os.path.realpath(directory))
    if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir():
        return real.parent.parent
    return real


def confined(directory: Path, root: Path | None, name: str, *, what: str) -> Path:
    """The path of a file that a checkpoint names.

    Raises InputError unless it is a plain name inside `directory`, and for a link that leads out of `root` (None: links
    may lead anywhere).
    """
    plain = name and name not in (".", "..") and not any(c in name for c in "/\\\0") and name.isprintable()
    if not plain:
        raise InputError(
            f"{what} names {escape(name)!r}, which is not a plain file name in the checkpoint's own directory",
            hint="Nothing outside the checkpoint is read; the index is damaged or hostile.",
        )
    path = directory / name
    real = Path(os.path.realpath(path))
    if root is not None and real != root / real.name and root not in real.parents:
        raise InputError(
            f"{escape(name)} is a link that leaves the checkpoint's directory, to {escape(real)}",
            hint="Pass --follow-links (follow_links in Python and recipes) if you trust where it leads, or copy the "
            "file into the directory.",
        )
    if os.path.islink(path) and not os.path.exists(path):
        raise InputError(
            f"{escape(name)} is a link to {escape(real)}, where nothing is",
            hint="Download the checkpoint again: what the link led to is gone.",
        )
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{escape(name)} is not a regular file", hint="The checkpoint is damaged or hostile.")
    return path


def on_hub(name: str) -> str:
    """How to write a name such as meta-llama/Llama-3.2-1B so that it is taken from the hub."""
    found = f"hf://{name}"
    return found if HUB_NAME.match(found) and not name.startswith(".") else "hf://OWNER/NAME"


def hub_name(path: Path) -> str | None:
    """OWNER/NAME of a snapshot in the hub's cache; None for any other directory."""
    for part in path.absolute().parts:
        if match := _HUB_CACHE.match(part):
            return f"{match[1]}/{match[2]}"
    return None
