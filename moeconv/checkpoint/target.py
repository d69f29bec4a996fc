"""Checks of where an output may be written: it must not be, contain or be inside anything that the command reads.

A directory is replaced only if it is empty, an output of moeconv, or a single checkpoint with nothing else in it. A
file is replaced only by a file of the same kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from moeconv.checkpoint.card import CARD_NAME
from moeconv.checkpoint.companions import TEMPLATES, is_companion_name
from moeconv.checkpoint.paths import allowed_root
from moeconv.checkpoint.reader import INDEX_NAME, MANIFEST_NAME, SINGLE_NAME
from moeconv.checkpoint.staging import staging_of
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.errors import InputError, OutputError, escape
from moeconv.types import JsonObject

Inputs = Iterable[tuple[str, str | os.PathLike[str]]]  # (argument or option, such as SOURCE or --teacher; its path)
_BESIDE = (CARD_NAME, "README", ".gitattributes", ".gitignore")  # files of a repository besides those of the model
_READ = 1 << 24  # bytes of a file that are searched for its marks
_NAMED = 5  # files that a message names at most


def check_apart(out: str | os.PathLike[str], reads: Inputs, *, staging: bool = False) -> None:
    """Raises OutputError if OUT is, contains or is inside anything that the command reads.

    With `staging`, the same is checked for the staging directory beside OUT, which is removed at the end.
    """
    path = Path(os.path.abspath(out))
    ours = [(f"OUT {escape(out)}", path)]
    if staging:
        ours.append((f"the staging directory of OUT {escape(out)}", staging_of(path)))
    for word, read in reads:
        for where, is_directory in _places(Path(read)):
            for name, place in ours:
                how = _relation(Path(os.path.realpath(place)), where, is_directory=is_directory)
                if how:
                    raise OutputError(
                        f"{name} {how} {word} {escape(read)}",
                        hint="What a command reads is never replaced: choose another OUT.",
                    )


def _relation(out: Path, read: Path, *, is_directory: bool) -> str:
    """The relation of OUT to a path that is read, worded for the message; "" if they are apart.

    Symbolic links must be resolved in both paths.
    """
    if out == read:
        return "is"
    if out in read.parents:
        return "holds"
    return "lies in" if is_directory and read in out.parents else ""


def _places(read: Path) -> Iterator[tuple[Path, bool]]:
    """Every path whose loss would damage `read`, as (path with symbolic links resolved, whether it is a directory).

    These are the place of its name, the place that the name leads to if it is a link, and the places that a
    checkpoint's files lead to if they are links (into the hub's cache, for example).
    """
    named = Path(os.path.abspath(read))
    yield Path(os.path.realpath(named.parent)) / named.name, False
    if not os.path.isdir(read):
        yield Path(os.path.realpath(read)), not os.path.exists(read)  # a path to come may be a directory
        return
    yield allowed_root(read), True
    yield Path(os.path.realpath(read)), True
    try:
        with os.scandir(read) as entries:
            links = [entry.path for entry in entries if entry.is_symlink()]
    except OSError:
        return
    yield from ((Path(os.path.realpath(link)), os.path.isdir(link)) for link in links)


# -- directories -------------------------------------------------------------------------------------------------------


def check_target(out: Path, *, reads: Inputs, overwrite: bool) -> None:
    """Raises OutputError for an OUT directory that cannot be written or replaced without loss.

    OUT must be apart from what is read, must not be a symbolic link, and may exist only with `overwrite` and only if
    `check_swap` allows it.
    """
    check_apart(out, reads)
    place = Path(os.path.abspath(out))  # messages show the path as the user wrote it
    if os.path.islink(place):
        raise OutputError(f"OUT {escape(out)} is a symbolic link", hint="Give the directory that it should become.")
    if os.path.exists(place):
        if not os.path.isdir(place):
            raise OutputError(f"OUT {escape(out)} exists and is not a directory", hint="Choose another OUT.")
        if not overwrite:
            raise OutputError(f"OUT {escape(out)} exists already", hint="Choose another OUT, or pass --overwrite.")
        check_swap(out)
    if not os.path.isdir(place.parent):
        raise OutputError(f"{escape(place.parent)} does not exist", hint="Create it first.")


def check_swap(out: Path) -> None:
    """Raises OutputError if a directory contains more than an output of moeconv or a single checkpoint.

    The message names the files that replacing the directory would delete.
    """
    try:
        lost = strangers(Path(os.path.abspath(out)))
    except OSError as error:
        raise OutputError(f"cannot list OUT {escape(out)}: {error.strerror}", hint="Check its permissions.") from None
    if lost:
        names = ", ".join(escape(name) for name in lost[:_NAMED])
        more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
        raise OutputError(
            f"OUT {escape(out)} contains files that --overwrite would delete: {names}{more}",
            hint="--overwrite replaces an empty directory, an output of moeconv, or a single checkpoint with nothing "
            "else in it. Move these files away, or choose another OUT.",
        )


def strangers(directory: Path) -> list[str]:
    """The entries of a directory that belong neither to an output of moeconv nor to a single checkpoint, sorted.

    A folder's name ends in a slash. In a directory that is neither of the two, these are all entries.
    """
    ours = _manifest_files(directory)
    known = _checkpoint_files(directory) if ours is None else ours
    return list(_unknown(directory, "", known, companions=ours is None and bool(known)))


def _unknown(directory: Path, prefix: str, known: frozenset[str], *, companions: bool) -> Iterator[str]:
    with os.scandir(directory / prefix) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    for entry in entries:
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            inside = any(k.startswith(f"{name}/") for k in known) or (companions and name == TEMPLATES)
            yield from _unknown(directory, f"{name}/", known, companions=companions) if inside else (f"{name}/",)
        elif name not in known and not (companions and is_companion_name(name)):
            yield name


def _manifest_files(directory: Path) -> frozenset[str] | None:
    """The files of an output of moeconv according to its manifest; None for a directory without a manifest."""
    files = _json(directory / MANIFEST_NAME).get("files")
    if not isinstance(files, dict) or not files:
        return None
    return frozenset({*map(str, files), MANIFEST_NAME, CARD_NAME})


def _checkpoint_files(directory: Path) -> frozenset[str]:
    """The files of the checkpoint in a directory; empty if the directory is not a checkpoint."""
    shards = shards_of(directory)
    if not shards or not os.path.isfile(directory / "config.json"):
        return frozenset()
    return frozenset({"config.json", INDEX_NAME, *shards, *_BESIDE})


def shards_of(directory: Path) -> frozenset[str]:
    """The names of a checkpoint's weight files: those in its index, or the single file if there is no index."""
    weight_map = _json(directory / INDEX_NAME).get("weight_map")
    if isinstance(weight_map, dict):
        return frozenset(name for name in weight_map.values() if isinstance(name, str))
    return frozenset({SINGLE_NAME} if os.path.isfile(directory / SINGLE_NAME) else ())


def _json(path: Path) -> JsonObject:
    """The JSON object in a file; {} if there is none that can be read."""
    try:
        return read_json_object(path, what=path.name)
    except InputError:
        return {}


# -- single files ------------------------------------------------------------------------------------------------------


def check_file_target(
    path: Path, *, what: str, reads: Inputs, overwrite: bool, replaces: Callable[[Path], bool]
) -> None:
    """Raises OutputError, before any work, if a file cannot be written at `path` or would replace something else.

    `what` names the kind of file in messages. What is read and the weights of a model are never replaced; another file
    is replaced only with `overwrite`, and only if `replaces` returns true for it.
    """
    check_apart(path, reads)
    if os.path.isdir(path):
        raise OutputError(f"{escape(path)} is a directory", hint=f"Give the name of the {what} file.")
    if os.path.islink(path):
        raise OutputError(f"{escape(path)} is a symbolic link", hint=f"Give the name of the {what} file itself.")
    directory = path.absolute().parent
    if os.path.isfile(directory / "config.json") and path.name in {SINGLE_NAME, *shards_of(directory)}:
        raise OutputError(
            f"{escape(path)} is a file of the model in {escape(directory)}", hint="Choose another name, elsewhere."
        )
    if os.path.exists(path):
        if not overwrite:
            raise OutputError(f"{escape(path)} exists already", hint="Remove it, or pass --overwrite.")
        if not os.path.isfile(path) or (os.path.getsize(path) and not replaces(path)):
            raise OutputError(
                f"{escape(path)} is not a {what} file of moeconv, and --overwrite replaces no other",
                hint="Remove it yourself, or choose another name.",
            )
    if not os.path.isdir(directory):
        raise OutputError(f"{escape(path.parent)} does not exist", hint="Create it first.")


def starts_with(path: Path, *marks: Sequence[bytes]) -> bool:
    """Whether, for any row of `marks`, a file begins with the first mark of the row and contains the others."""
    try:
        with open(path, "rb") as file:
            data = file.read(_READ)
    except OSError:
        return False
    return any(data.startswith(row[0]) and all(mark in data for mark in row) for row in marks)
