"""The small files of an output, as bytes: config, index, companions, and the manifest with the provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from moeconv import __version__
from moeconv.checkpoint.companions import Companions
from moeconv.checkpoint.reader import INDEX_NAME, Checkpoint
from moeconv.plan.plan import Plan
from moeconv.types import JsonObject


def json_bytes(value: object, *, constants: bool = False) -> bytes:
    """A JSON file. With `constants`, Infinity and NaN are written as transformers writes and reads them."""
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=constants) + "\n").encode()


def small_files(plan: Plan, companions: Companions) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every file beside the shards, without the manifest."""
    yield from ((name, text.encode()) for name, text in plan.texts.items())
    if plan.gguf:
        yield from companions.read()
        return
    yield "config.json", json_bytes(plan.config, constants=True)
    if len(plan.shards) > 1:
        weight_map = {spec.name: s.name for s in plan.shards for i in s.items for spec in i.outputs}
        total = sum(item.nbytes for item in plan.items())
        yield INDEX_NAME, json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})
    yield from companions.read()


def manifest_of(plan: Plan, source: Checkpoint, files: Mapping[str, Mapping[str, object]]) -> JsonObject:
    """The manifest: the steps that made the checkpoint, and the hash and size of every file. It has no times and no
    paths, so that the same plan gives the same manifest everywhere."""
    steps: list[JsonObject] = []
    identity = plan.identity
    for done in (*plan.earlier, plan):
        steps.append(
            {
                "moeconv": __version__,
                "command": done.command,
                "parameters": dict(done.parameters),
                "plan_id": done.plan_id,
                "source": identity,
                "changed": dict(sorted(done.changed.items())),
                "total_parameters": done.params_total,
                "active_parameters": done.params_active,
            }
        )
        identity = done.plan_id  # the source of the next step was never written
    history = (source.manifest or {}).get("steps", [])
    return {"manifest_version": 1, "steps": [*(history if isinstance(history, list) else []), *steps], "files": files}
