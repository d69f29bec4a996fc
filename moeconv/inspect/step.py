"""`moeconv inspect` from start to end."""

from __future__ import annotations

from moeconv.checkpoint.hub import resolve
from moeconv.checkpoint.reader import Checkpoint
from moeconv.contract import Inspected
from moeconv.errors import Unsupported
from moeconv.families.model import open_model
from moeconv.inspect.gguf import gguf_file, inspect_gguf
from moeconv.inspect.run import inspect as inspect_model
from moeconv.inspect.unknown import inspect_unknown
from moeconv.plan.meter import Meter
from moeconv.requests import InspectRequest


def inspect(request: InspectRequest, *, meter: Meter) -> Inspected:  # noqa: ARG001 (headers are read at once)
    """The JSON object of `moeconv inspect`; of an unsupported checkpoint, only what its headers and config.json show.
    Raises InputError for a damaged one."""
    if (file := gguf_file(request.model)) is not None:
        return inspect_gguf(request.model, file)
    checkpoint = Checkpoint(resolve(request.model))
    try:
        return inspect_model(open_model(checkpoint))
    except Unsupported as why:
        return inspect_unknown(checkpoint, why)
