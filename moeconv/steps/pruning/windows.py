"""The texts that a prune runs the model on, and the stream over its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeconv.families.model import Model
from moeconv.options import SEQ_LEN, TOKENS, DataOptions, MeasureOptions, PlanOptions, PruneOptions, parse_size, take
from moeconv.plan.meter import Meter


def read_windows(model: Model, values: Mapping[str, Any]) -> Any:
    """The windows of --data, as calibration draws them."""
    from moeconv.calibrate.run import sequence_length
    from moeconv.data.windows import load_tokens

    measure = take(MeasureOptions, values)
    return load_tokens(
        take(DataOptions, values).data, model.checkpoint.path, tokens=measure.tokens or TOKENS,
        seq_len=sequence_length(model, measure.seq_len, default=SEQ_LEN), seed=take(PlanOptions, values).seed,
        text_field=measure.text_field,
    )  # fmt: skip


def stream_of(model: Model, windows: np.ndarray, measure: MeasureOptions, *, meter: Meter) -> Any:
    from moeconv.stream.layers import LayerStream, pick_device, start_meter

    start_meter(meter, model)
    limit = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    return LayerStream(
        model, windows, device=pick_device(measure.device), batch_size=measure.batch_size, max_memory=limit, meter=meter
    )


def refit_of(options: PruneOptions) -> Any:
    from moeconv.repair.refit import Refit

    return Refit(options.refit_strength, options.refit_sweeps)
