"""`hf://datasets/OWNER/NAME[:CONFIG[:SPLIT]]`: records of a hub data set, by the optional package `datasets`.

Records come in the data set's own order and are streamed: as many are fetched as are needed.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from moeconv.errors import InputError, UsageError, escape, first_line

_PREFIX = "hf://datasets/"
_VALUE = re.compile(r"^hf://datasets/([\w.-]+/[\w.-]+)(?::([\w./-]*))?(?::([\w.-]+))?$")


def read_hub(value: str, *, limit: int | None) -> tuple[str, str, list[dict[str, Any]]]:
    """(name, sha256 of the records as JSON lines, records), the first ones until their JSON holds `limit` bytes.

    The config is the data set's own default and the split `train` where they are not given. Raises UsageError for a
    value of another form, InputError without the package and for whatever it cannot fetch.
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
            hint="pip install 'moeconv[datasets]' (or: pip install datasets).",
        ) from None
    digest, size = hashlib.sha256(), 0
    records: list[dict[str, Any]] = []
    try:
        for record in datasets.load_dataset(name, config, split=split, streaming=True):
            line = json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"
            digest.update(line)
            records.append(dict(record))
            size += len(line)
            if limit is not None and size >= limit:
                break
    except Exception as error:
        # Whatever the network, the hub or a data set's own files make the package raise: it is the input's fault.
        raise InputError(
            f"cannot read {escape(value)}: {first_line(error)}",
            hint="Check the name, config and split, the network, and HF_TOKEN for gated data sets.",
        ) from error
    if not records:
        raise InputError(f"{escape(value)} has no records", hint="Name another split.")
    return value.removeprefix(_PREFIX), digest.hexdigest(), records
