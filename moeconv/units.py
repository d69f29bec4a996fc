"""Bytes, counts and seconds as text for people, and a number with its noun."""

from __future__ import annotations


def human_bytes(n: float) -> str:
    """1234567 -> 1.2 MB"""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def human_count(n: float) -> str:
    """12345678 -> 12.35M"""
    for unit in ("", "k", "M", "B"):
        if abs(n) < 1000:
            return f"{n:.0f}" if not unit else f"{n:.2f}{unit}"
        n /= 1000
    return f"{n:.2f}T"


def human_seconds(seconds: float) -> str:
    """190.2 -> 3m10s"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def counted(n: int, one: str, more: str | None = None) -> str:
    """(1, "expert is", "experts are") -> 1 expert is; (2, "expert") -> 2 experts. `more` is `one` + s."""
    return f"{n} {one if n == 1 else more or one + 's'}"
