"""GPTQ (arXiv 2210.17323) for experts: codes chosen by data, while the model is streamed layer by layer.

Each layer is computed behind layers that are quantized already. Its experts' second moments are weighted by the router
(MoEQuant, arXiv 2505.03804). Codes and scales are written to an overlay under their names on disk. Only the moments of
one layer are in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.overlay import writing_overlay
from moeconv.contract import CodesFigures
from moeconv.data import heldout
from moeconv.data.windows import load_tokens, sequence_length
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import SEQ_LEN, TOKENS, DataOptions, MeasureOptions, parse_size
from moeconv.plan.kernels.stored import to_bytes
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.phases import phase
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.experts import experts_of
from moeconv.quantize.gptq.groups import role_of
from moeconv.quantize.gptq.layer import LayerCodes
from moeconv.quantize.gptq.need import CODED_BYTES, gptq_workload
from moeconv.stream.layers import LayerStream, pick_device, start_meter, stream_within

VERSION = 1


@phase("gptq")
def choose_codes(
    model: Model,
    items: Sequence[Item],
    path: str | os.PathLike[str],
    *,
    data: DataOptions,
    measure: MeasureOptions,
    damping: float,
    view: Model | None = None,
    seed: int = 0,
    jobs: int = 1,
    meter: Meter | None = None,
) -> CodesFigures:
    """Write an overlay to `path` that holds the outputs of `items`, which are planned packings of expert weights.

    `view` is the model whose weights the items pack, where that is not `model` itself but one planned on it (decoded,
    or with its experts as separate tensors). The overlay then belongs to the view. `damping` is added to the diagonal
    of every second moment, as a share of the diagonal's mean. On the CPU, `jobs` groups of experts are coded at the
    same time; the codes do not depend on it.

    In the result, `output_rms` is the relative error of the layer's FFN against the unquantized one, for the same
    inputs, on tokens that chose no codes; `output_rms_rtn` is that error with round-to-nearest and `output_rms_gptq`
    with the chosen codes. A layer whose chosen codes are not clearly better gets what round-to-nearest writes, and its
    `kept` is False. In a layer with too few tokens, no codes are chosen, and `output_rms_gptq` is None.

    Raises UsageError for a wrong damping or size, InputError for unusable data and for weights or activations that are
    not finite.
    """
    if not 0 < damping < 1e6:
        raise UsageError(f"--damping {damping} must be above 0", hint="The usual value is 0.01.")
    view = view or model
    budget = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    meter = meter or SilentMeter()
    meter.note("reading the data")
    read = load_tokens(
        data.data, model.checkpoint.path, tokens=measure.tokens or TOKENS,
        seq_len=sequence_length(model, measure.seq_len, default=SEQ_LEN), seed=seed, text_field=measure.text_field,
    )  # fmt: skip
    start_meter(meter, model, tokens=read.windows.size)
    workload = gptq_workload(view, items, tokens=read.windows.size, seq_len=read.seq_len, jobs=jobs)
    stream = stream_within(
        model, read.windows, dtype=torch.float32, device=pick_device(measure.device), batch_size=measure.batch_size,
        budget=budget, meter=meter, what="gptq", **workload,
    )  # fmt: skip
    sources = [{"name": s.name, "sha256": s.sha256, "tokens": s.tokens} for s in read.sources]
    metadata = artifact_metadata(
        "overlay", version=VERSION, identity=view.identity, method="gptq", damping=damping, seed=seed,
        seq_len=read.seq_len, sources=sources,
    )  # fmt: skip
    by_layer: dict[int | None, list[Item]] = {}
    for item in items:
        by_layer.setdefault(role_of(view, item).layer, []).append(item)
    tensors = [(role_of(view, i).layer, (s.name, s.dtype, s.shape)) for i in items for s in i.outputs]
    rows = []
    limit, workers = _room(stream, jobs)
    with (
        writing_overlay(Path(path), tensors, metadata=metadata) as writer,
        ThreadPoolExecutor(workers, thread_name_prefix="moeconv-codes") as pool,
    ):

        def put(parts: Mapping[str, Tensor]) -> None:
            for name, tensor in parts.items():
                writer.write(name, to_bytes(tensor))

        for layer in stream.layers():
            if layer.index in by_layer:
                some = by_layer[layer.index]
                experts = experts_of(model, view, stream, layer, some)
                work = LayerCodes(model, view, stream, layer, experts, some, damping, seed, limit, pool)
                with torch.no_grad():
                    rows.append(work.run(put))
                meter.note(
                    f"layer {layer.index}: output error {rows[-1]['output_rms']:.4f}, "
                    f"round-to-nearest {rows[-1]['output_rms_rtn']:.4f}"
                )
    return {"layers": rows, "tokens": read.tokens, "held_out": int(heldout.held_out(*read.windows.shape).sum())}


def _room(stream: LayerStream, jobs: int) -> tuple[int, int]:
    """(work memory in bytes per group of experts, number of groups that are coded at the same time)."""
    if stream.device.type != "cpu":
        return max(CODED_BYTES, torch.cuda.mem_get_info(stream.device)[0] // 4), 1
    tight = stream.placement is not None and not stream.placement.held
    return (0, 1) if tight else (CODED_BYTES, jobs)


def remarks_on(found: CodesFigures) -> list[str]:
    """Warnings about the result of `choose_codes`: too little text, and layers that keep round-to-nearest."""
    return heldout.remarks_on(found["layers"], what="--method gptq", kept="round-to-nearest", fitted="the chosen codes")
