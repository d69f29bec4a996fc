"""The texts that a prune runs the model on, and the stream over its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeconv.families.model import Model
from moeconv.options import SEQ_LEN, TOKENS, DataOptions, MeasureOptions, PlanOptions, PruneOptions, parse_size, take
from moeconv.plan.meter import Meter
from moeconv.stream.need import PRUNED


def read_windows(model: Model, values: Mapping[str, Any]) -> Any:
    """The windows of --data, as calibration draws them."""
    from moeconv.data.windows import load_tokens, sequence_length

    measure = take(MeasureOptions, values)
    return load_tokens(
        take(DataOptions, values).data, model.checkpoint.path, tokens=measure.tokens or TOKENS,
        seq_len=sequence_length(model, measure.seq_len, default=SEQ_LEN), seed=take(PlanOptions, values).seed,
        text_field=measure.text_field,
    )  # fmt: skip


def stream_of(model: Model, windows: np.ndarray, measure: MeasureOptions, *, meter: Meter) -> Any:
    """The stream of the model that the pruned variants run beside, within the memory that was granted."""
    from moeconv.stream.layers import pick_device, start_meter, stream_within

    start_meter(meter, model)
    limit = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    return stream_within(
        model, windows, device=pick_device(measure.device), batch_size=measure.batch_size, budget=limit, meter=meter,
        what="running the pruned model beside the model", **PRUNED,
    )  # fmt: skip


def refit_of(options: PruneOptions) -> Any:
    """How the experts that stay are refitted."""
    from moeconv.prune.repair.refit import Refit

    return Refit(options.refit_strength, options.refit_sweeps)
