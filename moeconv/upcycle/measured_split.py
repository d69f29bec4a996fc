"""The measurements before `upcycle --method split` can be planned: neuron statistics, then a partition file."""

from __future__ import annotations

from pathlib import Path

from moeconv.checkpoint.staging import Measured
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import device_limit, parameters_of
from moeconv.plan.meter import Meter
from moeconv.plan.partition import Partition, load_partition
from moeconv.requests import UpcycleRequest
from moeconv.upcycle.split import MEASURE, split_options, split_shape

_NEURONS, _PARTITION = "neurons.safetensors", "partition.safetensors"


def measure_partition(model: Model, request: UpcycleRequest, measured: Measured, *, meter: Meter) -> Partition:
    """The partition for `request`: made from --stats, or from statistics that are measured on --data. The files are
    kept in `measured`.

    Raises UsageError where neither of the two options or both are given.
    """
    options, data = request.upcycle, request.data.data
    shape = split_shape(model, split_options(model, options))
    if bool(options.stats) == bool(data):
        text = "--stats and --data exclude each other" if data else "--method split needs --stats or --data"
        raise UsageError(text, hint=MEASURE.format(source=model.checkpoint.path.name))
    from moeconv.calibrate.neurons import load_neurons
    from moeconv.calibrate.run import calibrate
    from moeconv.stream.device import pick_device
    from moeconv.upcycle.partition import write_partition

    seed = request.plan.seed
    stats, twin = options.stats, request.statistics.stats_of_twin
    if not stats:
        asked = parameters_of(request.calibrate, request.data, request.measure)

        def measure_neurons(folder: Path) -> None:
            calibrate(
                str(model.checkpoint.path), folder / _NEURONS, seed=seed, overwrite=True, meter=meter, **asked
            )  # fmt: skip

        stats = str(measured.once("neurons", measure_neurons, resumes=True)[0] / _NEURONS)

    def partition(folder: Path) -> None:
        write_partition(
            model, load_neurons(stats, model, twin=twin), folder / _PARTITION, experts=shape.experts, top_k=shape.top_k,
            shared=shape.shared, width=shape.width, layers=shape.layers, varied=shape.varied, best=shape.best,
            clustering=options.clustering, seed=seed, meter=meter,
            device=pick_device(request.measure.device, device_limit(request.measure.max_device_memory)),
        )  # fmt: skip

    return load_partition(measured.once("partition", partition)[0] / _PARTITION)
