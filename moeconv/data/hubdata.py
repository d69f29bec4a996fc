"""`hf://datasets/OWNER/NAME[:CONFIG[:SPLIT]]`: records of a data set on the hub, read by the optional package
`datasets`.

Records are streamed in the order of the data set, and only as many are fetched as are needed.
"""

from __future__ import annotations

import hashlib
import json
import re

from moeconv.errors import InputError, UsageError, escape, first_line
from moeconv.types import JsonObject

_PREFIX = "hf://datasets/"
_VALUE = re.compile(r"^hf://datasets/([\w.-]+/[\w.-]+)(?::([\w./-]*))?(?::([\w.-]+))?$")


def read_hub(value: str, *, limit: int | None) -> tuple[str, str, list[JsonObject]]:
    """(name, sha256 of the records as JSON lines, the first records until their JSON has `limit` bytes; None: all).

    Without a config, the data set's default config is read; without a split, the split `train`. Raises UsageError for a
    value of another form, InputError if the package is not installed or cannot fetch the data set.
    """
    match = _VALUE.match(value)
    if not match:
        raise UsageError(
            f"--data {escape(value)} is not {_PREFIX}OWNER/NAME[:CONFIG[:SPLIT]]",
            hint=f"Example: {_PREFIX}allenai/c4:en:validation.",
        )
    name, config, split = match[1], match[2] or None, match[3] or "train"
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"--data {escape(value)} needs the package `datasets`, which is not installed",
            hint="Run pip install 'moeconv[datasets]' (or pip install datasets).",
        ) from None
    digest, size = hashlib.sha256(), 0
    records: list[JsonObject] = []
    try:
        for record in datasets.load_dataset(name, config, split=split, streaming=True):
            line = json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"
            digest.update(line)
            records.append(dict(record))
            size += len(line)
            if limit is not None and size >= limit:
                break
    except Exception as error:
        # The network, the hub or the files of a data set can make the package raise anything; all of it is about the
        # input.
        raise InputError(
            f"cannot read {escape(value)}: {first_line(error)}",
            hint="Check the name, config and split, the network, and HF_TOKEN for gated data sets.",
        ) from error
    if not records:
        raise InputError(f"{escape(value)} has no records", hint="Name another split or data set.")
    return value.removeprefix(_PREFIX), digest.hexdigest(), records
