"""The text that a prune runs the model on, and the stream over the model's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moeconv.families.model import Model
from moeconv.options import SEQ_LEN, TOKENS, MeasureOptions, PruneOptions, device_limit, parse_size
from moeconv.plan.meter import Meter
from moeconv.prune.need import pruned_workload
from moeconv.requests import PruneRequest
from moeconv.world import World, current, deal

if TYPE_CHECKING:
    from moeconv.data.windows import TokenData
    from moeconv.prune.repair.heal import Heal
    from moeconv.prune.repair.refit import Refit
    from moeconv.stream.layers import LayerStream


def read_windows(model: Model, request: PruneRequest) -> TokenData:
    """The windows of --data, drawn as in calibration."""
    from moeconv.data.windows import load_tokens, sequence_length

    measure = request.measure
    return load_tokens(
        request.data.data, model.checkpoint.path, tokens=measure.tokens or TOKENS,
        seq_len=sequence_length(model, measure.seq_len, default=SEQ_LEN), seed=request.plan.seed,
        text_field=measure.text_field,
    )  # fmt: skip


def stream_of(
    model: Model, windows: np.ndarray, measure: MeasureOptions, *, meter: Meter, refitted: int = 0, healed: int = 0,
    narrowed: int = 0, variants: int = 1, share: bool = False, shared: bool = False,
) -> LayerStream:  # fmt: skip
    """The stream of the model, beside which the pruned `variants` run, within the memory limit of the user. At most
    `refitted` experts of a layer are refitted at the same time, `healed` are trained, in float32, and `narrowed` lose
    neurons; with `shared`, the shared expert may lose neurons too. With `share`, each of several processes has its part
    of the windows; for healing, a part of every batch.
    """
    import torch

    from moeconv.stream.device import pick_device
    from moeconv.stream.layers import start_meter, stream_within
    from moeconv.stream.share import Share

    start_meter(meter, model, tokens=windows.size)
    workload = pruned_workload(
        model, refitted=refitted, healed=healed, narrowed=narrowed, variants=variants, shared=shared
    )
    limit = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    world, size = current() if share else World(), measure.batch_size
    mine, size = deal(len(windows), batch_size=max(1, size // world.size) if healed else size, world=world)
    stream = stream_within(
        model, windows[mine], device=pick_device(measure.device, device_limit(measure.max_device_memory)),
        batch_size=size, budget=limit, meter=meter,
        what="running the pruned model beside the model", dtype=torch.float32 if healed else None, **workload,
    )  # fmt: skip
    stream.share = Share(torch.from_numpy(mine), len(windows))
    return stream


def refit_of(options: PruneOptions) -> Refit:
    """The settings of the refit of the kept experts."""
    from moeconv.prune.repair.refit import Refit

    return Refit(options.refit_strength, options.refit_sweeps)


def heal_of(options: PruneOptions, *, seed: int) -> Heal:
    """The settings of the training of each layer."""
    from moeconv.prune.repair.heal import Heal

    return Heal(options.heal, seed)
