"""The step inspect."""

from __future__ import annotations

from typing import Any

from moeconv.checkpoint.hub import resolve
from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import Unsupported
from moeconv.families.model import open_model
from moeconv.inspect.run import inspect as look
from moeconv.inspect.unknown import inspect_unknown
from moeconv.requests import InspectRequest


def inspect(request: InspectRequest) -> dict[str, Any]:
    """What a checkpoint is, from its headers; of one that no step takes, what these alone say."""
    checkpoint = Checkpoint(resolve(request.model))
    try:
        return look(open_model(checkpoint))
    except Unsupported as why:
        return inspect_unknown(checkpoint, why)
