"""The releases of transformers that moeconv was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

OLDEST_PACKED = (5, 23)  # older converters take neither the model nor other packages' many-to-many operations
NEWEST = (5, 24)  # what constraints.txt installs; the contract tests pass with it


def release(text: str) -> tuple[int, int]:
    """Major and minor number of a version string; (0, 0) where it does not begin with two numbers."""
    try:
        major, minor = (int(part) for part in text.split(".")[:2])
    except ValueError:
        return 0, 0
    return major, minor


def untested_transformers() -> list[str]:
    """One warning if the installed transformers is newer than the newest tested release, else none. Imports nothing."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        return []
    if release(installed) <= NEWEST:
        return []
    newest = ".".join(map(str, NEWEST))
    return [f"transformers {installed} is newer than {newest}, the newest release that moeconv was tested with"]
