"""Weights that are stored in the form already that a plan packs them in: their bytes pass, without a second rounding.

Codes of a block are not unique: those that decode to the same numbers may differ from what packing would choose.
"""

from __future__ import annotations

from dataclasses import replace

from moeconv.plan.plan import Item, Plan
from moeconv.quantize.formats import kernel_of


def untouched(plan: Plan) -> Plan:
    """The plan with the items marked that decode a weight and pack all of it in the form that it was stored in."""
    shards = tuple(replace(shard, items=tuple(map(_marked, shard.items))) for shard in plan.shards)
    return replace(plan, shards=shards)


def _marked(item: Item) -> Item:
    if item.kernel != "chain":
        return item
    first, then = item.params["first"], item.params["then"]
    kernel = kernel_of(then["kernel"])
    if first["kernel"] != "decode" or kernel is None or not kernel.encodes:
        return item
    same = first["params"]["how"]["form"] == kernel.encodes and first["params"]["parts"] == then["params"]["parts"]
    whole = [ref.nbytes for ref in item.inputs] == [spec.nbytes for spec in item.outputs]
    return replace(item, params={**item.params, "untouched": True}) if same and whole else item
