"""A family whose class is code in its checkpoints, as the dense family of transformers that computes the same.

The model is made in memory, one tensor at a time, so that it can be run and compared where the code never is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeconv.families.model import Model
from moeconv.families.registry import tables
from moeconv.families.target import draft_target, whole_config
from moeconv.options import PlanOptions, UpcycleOptions
from moeconv.plan.arrange import arrange
from moeconv.plan.plan import Plan
from moeconv.plan.planned import planned_model
from moeconv.upcycle.cut import Cut
from moeconv.upcycle.layout import Assembly


def plan_stock(model: Model) -> Plan:
    """The plan that rewrites a model as a model of the family that `runs_as` of its row names."""
    pair = model.family.runs_as
    assert pair is not None
    target = tables().dense[pair.target]
    draft = draft_target(model, pair, target)
    cut = Cut(model.ffn_width, 1, model.ffn_width)
    items = Assembly(model, draft, UpcycleOptions(), cut, frozenset(), None, 0).items()
    config = whole_config(model, target, draft.config, dtype=None)
    return Plan(
        command="upcycle",
        parameters={},
        identity=model.identity,
        config=config,
        shards=arrange(items, PlanOptions(), target),
        params_total=0,
        params_active=0,
    )


@contextmanager
def stock_model(model: Model) -> Iterator[Model]:
    """The model itself where transformers has its class, and otherwise the one that runs in its place."""
    if model.family.runs_as is None:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="moeconv-") as folder:
        plan = plan_stock(model)
        (Path(folder) / "config.json").write_text(json.dumps(dict(plan.config)))
        yield planned_model(plan, companions=Path(folder), origins={"source": model.checkpoint})
