"""Codes chosen by data (GPTQ, AWQ, or the better of several methods), while the model is streamed layer by layer.

Each layer is computed behind layers that are quantized already. Its experts' second moments are weighted by the router
(MoEQuant, arXiv 2505.03804). Codes and scales are written to an overlay under their names on disk. Only the moments of
one layer are in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.overlay import Layout, writing_overlay
from moeconv.contract import CodesFigures, CodesLayer
from moeconv.data import heldout
from moeconv.data.windows import load_tokens, sequence_length
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import SEQ_LEN, TOKENS, DataOptions, MeasureOptions, device_limit, parse_size
from moeconv.plan.kernels.decode import decode_parts
from moeconv.plan.kernels.stored import to_bytes
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.phases import phase
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.experts import experts_of
from moeconv.quantize.gptq.groups import role_of, weight_name
from moeconv.quantize.gptq.layer import LayerCodes
from moeconv.quantize.gptq.need import CODED_BYTES, DIVIDED, FLOWS, READERS, exponents_of, gptq_workload
from moeconv.quantize.gptq.work import LayerWork, Settings
from moeconv.quantize.spec import FOLDING
from moeconv.stream.device import pick_device, room_on
from moeconv.stream.layers import LayerStream, start_meter, stream_within
from moeconv.stream.share import Share
from moeconv.world import current, deal, first

VERSION = 1
_NOT_FOLDED = {
    "norm": "the inputs of gate and up keep their scale, because the norm in front of the experts has other readers "
    "or does not multiply by its weight alone",
    "up": "the inputs of down keep their scale, because they are not linear in up",
}


@phase("gptq")
def choose_codes(
    model: Model,
    items: Sequence[Item],
    path: str | os.PathLike[str],
    *,
    data: DataOptions,
    measure: MeasureOptions,
    damping: float,
    method: str = "gptq",
    ordered: bool = True,
    beside: Sequence[Item] = (),
    written: Model | None = None,
    view: Model | None = None,
    seed: int = 0,
    jobs: int = 1,
    meter: Meter | None = None,
) -> CodesFigures:
    """Write an overlay to `path` that holds the outputs of `items`, which are planned packings of expert weights.

    `view` is the model whose weights the items pack, where that is not `model` itself but one planned on it (decoded,
    or with its experts as separate tensors). The overlay then belongs to the view. `method` is a value of --method.
    The methods of `spec.FOLDING` also write `beside`, the planned items of the norms in front of the experts and of
    what else reads them (`beside_of`). auto decodes what it packs, as stored in the planned model `written`.
    `damping` is added to the diagonal of every second moment, as a share of the diagonal's mean. With `ordered`, the
    columns of the largest inputs are chosen first; the layout on disk does not depend on it. On the CPU, `jobs` groups
    of experts are coded at the same time; the codes do not depend on it. Of several processes, each runs its share of
    the windows and codes its share of the experts; the first one writes.

    In the result, `output_rms` is the relative error of the layer's FFN against the unquantized one, for the same
    inputs, on tokens that chose no codes, and `output_rms_by_method` that of every method that was tried, with
    round-to-nearest as `rtn`. A layer whose chosen codes are not clearly better gets what round-to-nearest writes, and
    its `kept` is False; auto keeps the method with the least error. In a layer with too few tokens, no codes are
    chosen.

    Raises UsageError for a wrong damping or size, InputError for unusable data and for weights or activations that are
    not finite.
    """
    if not 0 < damping < 1e6:
        raise UsageError(f"--damping {damping} must be above 0", hint="The usual value is 0.01.")
    view = view or model
    budget = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    meter = meter or SilentMeter()
    meter.note("reading the data")
    length = sequence_length(model, measure.seq_len, default=SEQ_LEN)
    read = first(
        lambda: load_tokens(
            data.data, model.checkpoint.path, tokens=measure.tokens or TOKENS, seq_len=length, seed=seed,
            text_field=measure.text_field,
        )
    )  # fmt: skip
    start_meter(meter, model, tokens=read.windows.size)
    workload = gptq_workload(view, items, tokens=read.windows.size, seq_len=read.seq_len, jobs=jobs, method=method)
    mine, size = deal(len(read.windows), batch_size=measure.batch_size, world=current())
    workload["flows"] = 1 + (FLOWS - 1) * current().size  # of the inputs of the experts, each process holds all
    stream = stream_within(
        model, read.windows[mine], dtype=torch.float32, batch_size=size,
        device=pick_device(measure.device, device_limit(measure.max_device_memory)),
        budget=budget, meter=meter, what=method, **workload,
    )  # fmt: skip
    sources = [{"name": s.name, "sha256": s.sha256, "tokens": s.tokens} for s in read.sources]
    metadata = artifact_metadata(
        "overlay", version=VERSION, identity=view.identity, method=method, damping=damping, seed=seed,
        seq_len=read.seq_len, sources=sources,
    )  # fmt: skip
    by_layer: dict[int | None, list[Item]] = {}
    for item in items:
        by_layer.setdefault(role_of(view, item).layer, []).append(item)
    written_items = (*items, *beside)
    tensors = [(role_of(view, i).layer, (s.name, s.dtype, s.shape)) for i in written_items for s in i.outputs]
    if method in FOLDING:
        tensors += [(role.layer, (name, "I8", (n,))) for name, role, n in exponents_of(view, written_items)]
    settings, decode = Settings(damping, ordered, seed), partial(_decoded, written)
    stream.share = Share(torch.from_numpy(mine), len(read.windows))
    rows = []
    limit, workers = _room(stream, jobs)
    with (
        _writing(Path(path), tensors, metadata) as write,
        ThreadPoolExecutor(workers, thread_name_prefix="moeconv-codes") as pool,
    ):

        def put(parts: Mapping[str, Tensor]) -> None:
            for name, tensor in parts.items():
                write(name, to_bytes(tensor))

        for layer in stream.layers():
            if layer.index in by_layer:
                some = by_layer[layer.index]
                experts = experts_of(model, view, stream, layer, some)
                here = [item for item in beside if role_of(view, item).layer == layer.index]
                work = LayerWork(model, view, stream, layer, experts, some, here, settings, limit, pool)
                with torch.no_grad():
                    rows.append(LayerCodes(work, method, decode).run(put))
                meter.note(_note(rows[-1]))
    return {"layers": rows, "tokens": read.tokens, "held_out": int(heldout.held_out(*read.windows.shape).sum())}


@contextmanager
def _writing(
    path: Path, tensors: Sequence[tuple[int | None, Layout]], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, memoryview], None]]:
    """A function that writes a tensor by name; only the first process writes."""
    if not current().leads:
        yield lambda _name, _data: None
        return
    with writing_overlay(path, tensors, metadata=metadata) as writer:
        yield writer.write


def _note(row: CodesLayer) -> str:
    errors = row["output_rms_by_method"].items()
    tried = ", ".join(f"{method} {error:.4f}" for method, error in errors if method not in ("rtn", row["method"]))
    return (
        f"layer {row['layer']}: output error {row['output_rms']:.4f} ({row['method']}), "
        + f"round-to-nearest {row['output_rms_rtn']:.4f}"
        + (f", {tried}" if tried else "")
    )


def beside_of(view: Model, items: Iterable[Item]) -> list[Item]:
    """Of the items of a plan, those of the norms in front of the experts and of what else reads them."""
    found = ((item, view.roles.get(weight_name(item))) for item in items)
    keys = (*DIVIDED, *READERS)
    return [item for item, role in found if role and role.key in keys and role.layer in view.moe_layers]


def _decoded(written: Model | None, item: Item, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight that the tensors `parts` of an item decode to, float32 [out, in]."""
    assert written is not None
    name = weight_name(item)
    stored = written.stored[name]
    by_part = {part: parts[tensor] for part, tensor in stored.parts.items()}
    return decode_parts(by_part, name=name, how=stored.how, dtype=torch.float32)


def _room(stream: LayerStream, jobs: int) -> tuple[int, int]:
    """(work memory in bytes per group of experts, number of groups that are coded at the same time)."""
    if stream.device.type != "cpu":
        return room_on(stream.device) // 4, 1
    tight = stream.placement is not None and not stream.placement.held
    return (0, 1) if tight else (CODED_BYTES, jobs)


def remarks_on(found: CodesFigures, *, method: str) -> list[str]:
    """Warnings about the result of `choose_codes`: too little text, layers that keep round-to-nearest, and factors of
    AWQ that could not be folded."""
    layers, what = found["layers"], f"--method {method}"
    remarks = heldout.remarks_on(layers, what=what, kept="round-to-nearest", fitted="the chosen codes")
    used = [row for row in layers if row["method"] == "awq"]
    for place, why in _NOT_FOLDED.items():
        if lacking := [row["layer"] for row in used if place not in row["folded"]]:
            remarks.append(f"{what}: {heldout.layers_in_words(lacking)}: {why}")
    return remarks
