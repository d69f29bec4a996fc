"""The memory that running a model layer by layer will take, computed from its headers before any weight is read.

The figures are for the CPU, where everything is in the memory of one process. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from typing_extensions import TypedDict

from moeconv.contract import Memory
from moeconv.errors import InputError, UsageError
from moeconv.families.model import Model
from moeconv.plan.memory import free_memory
from moeconv.plan.meter import Meter
from moeconv.units import human_bytes


class WorkloadFields(TypedDict, total=False):
    """The fields of `Workload` that depend on what is done with the stream."""

    flows: int
    resident: int
    sample: int
    judged: bool
    copies: int
    results: int
    work: tuple[int, int]


GROUP_BYTES = 1 << 25  # of experts that are widened at a time; at least one expert
PAIR_ROWS = 8192  # (token, expert) pairs computed at a time
GROUP_ROWS = 512  # pairs of one group of widened experts computed at a time
SAMPLE_ROWS = 256  # sampled tokens whose outputs of all experts are held at a time, if SAMPLE_BYTES allows
SAMPLE_BYTES = 1 << 26  # of those outputs; at least an eighth of a byte per weight of the experts
PRODUCT_ROWS = 32  # of those tokens, over which the cosines are summed in float32
_PROCESS = 430_000_000  # bytes of Python, torch and the classes of transformers
_COPIES = 8  # of a batch's hidden states: around the attention, and before and after the experts
_SKEW = 3  # the busiest group is assumed to get this many times its even share of the tokens
_SKETCH = 64  # dimensions of the sampled outputs


@dataclass(frozen=True)
class Workload:
    """What is run: `tokens` tokens in windows of `seq_len` and batches of `batch_size` windows, in numbers of `width`
    bytes.

    `flows` is how many activations [tokens, H] are held, which can also be in a file, and `resident` how many more of
    them one layer needs in memory in any case; `sample` how many tokens go through all experts, whose figures
    are kept to the end; `judged` whether the logits of a window are scored; `copies` how many widened copies of a
    layer's experts exist at the same time (0: the experts stay as they are stored). `results` is the bytes of what is
    found for a layer; `work`, for widened experts, those of what it is computed with: (as a rule, at the least).
    """

    tokens: int
    seq_len: int
    batch_size: int
    width: int = 4
    flows: int = 1
    resident: int = 0
    sample: int = 0
    judged: bool = False
    copies: int = 0
    results: int = 0
    work: tuple[int, int] = (0, 0)

    @property
    def trains(self) -> bool:
        """Whether weights are trained, so that a backward pass follows."""
        return self.copies > 2


@dataclass(frozen=True)
class Need:
    """Memory in bytes. `ends`: the larger of the model's two ends, the embeddings and the output head; `layer`: the
    largest layer without its experts, in the dtype of the computation; `held`: its experts and what is computed in the
    layer, with the experts in memory; `read`: the same, with the experts read from the disk when they are needed;
    `activations`, which can also be in a file; `kept`: results, of a layer or to the end."""

    ends: int
    layer: int
    held: int
    read: int
    activations: int
    kept: int

    def peak(self, *, held: bool, in_file: bool) -> int:
        """The peak in bytes, with the experts `held` in memory or read, and the activations in memory or `in_file`."""
        inner = self.layer + (self.held if held else self.read) + self.kept
        return _PROCESS + max(self.ends, inner) + (0 if in_file else self.activations)

    @property
    def least(self) -> int:
        """The smallest peak in bytes that is possible."""
        return self.peak(held=False, in_file=True)


def together(needs: Sequence[Need]) -> Need:
    """The need of several runs after one another in one process: the maximum of each part."""
    return Need(*(max(getattr(need, f.name) for need in needs) for f in fields(Need)))


@dataclass(frozen=True)
class MemoryPlacement:
    """Where the experts and the activations of a run are. `peak` and `free` are in bytes; `held`: the experts are in
    memory; `activations`: the bytes of activations that may be in memory (None: all)."""

    peak: int
    free: int
    held: bool
    activations: int | None

    def to_json(self) -> Memory:
        """{peak_bytes, free_bytes, experts: memory|disk, activations: memory|file}."""
        return {
            "peak_bytes": self.peak,
            "free_bytes": self.free,
            "experts": "memory" if self.held else "disk",
            "activations": "memory" if self.activations is None else "file",
        }


def need_of(model: Model, run: Workload) -> Need:
    """The memory that a run of this model takes."""
    sizes: dict[int | None, _Sizes] = {}
    for name, role in model.roles.items():
        if role.layer is None or role.layer < model.num_layers:
            ref, size = model.checkpoint.tensors[name], sizes.setdefault(role.layer, _Sizes())
            size.add(role.group, ref.shape, ref.nbytes, model.numel(ref), key=role.key)
    ends, inside = sizes.pop(None, _Sizes()), list(sizes.values())
    hidden, width, experts = model.hidden_size, run.width, max(1, model.num_experts)
    batch = min(run.tokens, run.batch_size * run.seq_len)
    vocabulary = max((numel for numel, _ in ends.embeddings), default=0)
    stored = max((nbytes for _, nbytes in ends.embeddings), default=0)
    logits = 3 * run.seq_len * (vocabulary // hidden) * width if run.judged else 0
    activations = run.tokens * model.residual_size * width
    kept = run.resident * activations + run.sample * experts * (2 * _SKETCH + 4) * len(model.moe_layers) + run.results
    held = [_experts(size, run, experts, batch, model.top_k, hidden) for size in inside]
    # where the weights multiply the inputs, the stock code repeats the tokens for every expert
    repeated = 3 * experts * batch * hidden * width if model.weighs_inputs else 0
    return Need(
        ends=vocabulary * width + max(stored, logits),
        layer=max((size.others * width for size in inside), default=0),
        held=max((h for h, _ in held), default=0) + repeated,
        read=max((r for _, r in held), default=0) + repeated,
        activations=run.flows * activations,
        kept=kept,
    )


def device_need(model: Model, run: Workload) -> int:
    """The bytes that a run takes on another device than the CPU: the experts of a layer are there in the dtype of the
    computation, and the activations of all tokens on the host. The context of CUDA is not counted."""
    need = need_of(model, replace(run, copies=max(1, run.copies)))
    return max(need.ends, need.layer + need.held + need.kept)


def sample_room(experts: int, hidden: int, weights: int) -> tuple[int, int]:
    """(tokens at a time, bytes per number) for the outputs of all experts of a layer with `weights` weights in its
    experts: float32, or float16 where there is no room for SAMPLE_ROWS tokens in float32."""
    room, token = max(SAMPLE_BYTES, weights // 8), experts * hidden
    if room >= SAMPLE_ROWS * token * 4:
        return SAMPLE_ROWS, 4
    return min(SAMPLE_ROWS, max(1, room // (2 * token * PRODUCT_ROWS)) * PRODUCT_ROWS), 2


def choose_placement(need: Need, *, budget: int | None, free: int | None = None, what: str = "this") -> MemoryPlacement:
    """Choose where the experts and the activations are, so that the peak stays within `budget`, or without a budget
    within the free memory. `what` names the command or the work in messages.

    Raises UsageError if not even the least need fits into `budget`, InputError if it does not fit into the free memory.
    """
    free = free_memory() if free is None else free
    limit = free if budget is None else budget
    for held, in_file in ((True, False), (True, True), (False, True)):
        peak = need.peak(held=held, in_file=in_file)
        if peak <= limit:
            return MemoryPlacement(peak, free, held, 0 if in_file else None)
    least = f"{what} takes at least {human_bytes(need.least)} of memory"
    if budget is not None:
        raise UsageError(f"--max-memory {human_bytes(budget)}: {least}", hint="Raise it, or lower --batch-size.")
    raise InputError(
        f"{least}, and {human_bytes(free)} are free",
        hint="Lower --batch-size or --seq-len, or use a larger machine. --max-memory SIZE overrides the free memory.",
    )


def noted_placement(need: Need, *, budget: int | None, meter: Meter, what: str) -> MemoryPlacement:
    """`choose_placement`, reported to the meter."""
    found = choose_placement(need, budget=budget, what=what)
    text = f"{what} takes about {human_bytes(found.peak)} of memory; {human_bytes(found.free)} are free"
    meter.note(text + ("" if found.held else "; the experts are read from the disk when they are needed"))
    return found


def whole_need(models: Sequence[Model], *, trained: int, batch: int, width: int = 4) -> Need:
    """The memory that training through whole models takes, in numbers of `width` bytes: the weights of the `models`
    (the student first), the gradients, moments and best values of `trained` parameters, and the activations of `batch`
    tokens that the backward pass needs."""
    weights = sum(model.numel(model.checkpoint.tensors[name]) for model in models for name in model.roles)
    largest = max((model.checkpoint.tensors[name].nbytes for model in models for name in model.roles), default=0)
    student = models[0]
    behind = batch * 40 * student.hidden_size * student.num_layers
    logits = 4 * batch * int(student.value("vocab_size") or 0)
    return Need(0, width * (weights + 4 * trained + behind + logits) + 2 * largest, 0, 0, 0, 0)


@dataclass
class _Sizes:
    """The parameters and bytes of one layer, or of everything outside the layers."""

    experts: int = 0
    experts_bytes: int = 0
    others: int = 0
    others_bytes: int = 0
    rows: int = 0  # outputs per token of all matrices except the experts'
    embeddings: list[tuple[int, int]] = field(default_factory=list)  # (parameters, bytes)

    def add(self, group: str, shape: tuple[int, ...], nbytes: int, numel: int, *, key: str) -> None:
        if group == "expert":
            self.experts, self.experts_bytes = self.experts + numel, self.experts_bytes + nbytes
            return
        if key.startswith("embedding."):
            self.embeddings.append((numel, nbytes))
        self.others, self.others_bytes = self.others + numel, self.others_bytes + nbytes
        self.rows += shape[0] if len(shape) == 2 and numel else 0


def _values(size: _Sizes, run: Workload, batch: int, hidden: int) -> int:
    """Bytes of what a batch computes in a layer outside its experts: the hidden states and their copies, and the
    outputs of every matrix."""
    return max(size.others_bytes, batch * (_COPIES * hidden + size.rows) * run.width)


def _sample(run: Workload, experts: int, hidden: int, weights: int) -> int:
    """Bytes of the sampled tokens' outputs of all experts, with their projection, after the batches."""
    rows, width = sample_room(experts, hidden, weights)
    held = min(run.sample, rows) * width + min(run.sample, PRODUCT_ROWS) * width
    return held * experts * hidden + 3 * run.sample * experts * min(hidden, _SKETCH) * 4


def _decoded(group: int, stored: int, weights: int) -> int:
    """Bytes of a group of widened experts of `group` bytes while one parameter of them (at most two thirds: gate and
    up) is decoded, stacked and fused, two copies at a time. Forms of less than a byte per weight decode to 16 bits."""
    return 4 * group // 3 // (1 if stored >= weights else 2)


def _experts(size: _Sizes, run: Workload, experts: int, batch: int, top_k: int, hidden: int) -> tuple[int, int]:
    """Bytes of a layer's experts and of what is computed in the layer: (with the experts held in memory, with the
    experts read when they are needed)."""
    values = _values(size, run, batch, hidden)
    if not size.experts:
        return values, values
    alone = math.ceil(size.experts / experts)  # parameters of one expert
    inner = alone // (3 * hidden)
    each = (3 * hidden + 4 * inner) * run.width  # bytes per (token, expert) pair
    wide, stored = size.experts * run.width, size.experts_bytes
    sample = _sample(run, experts, hidden, size.experts) if run.sample else 0
    work = max(sample, values + min(batch * top_k, PAIR_ROWS) * each)
    if run.copies:
        placed = wide * run.copies
        if not run.trains:  # no backward pass needs them: the stock code computes expert by expert
            work = values + min(batch * top_k, PAIR_ROWS, _SKEW * batch * top_k // experts) * each
        together, least = run.work
        return placed + max(work, together), placed + max(work, least)
    if wide <= GROUP_BYTES or stored >= wide:
        return wide + work, wide + work
    group = max(1, GROUP_BYTES // (alone * run.width)) * alone * run.width
    pairs = GROUP_ROWS if run.sample else _SKEW * batch * top_k * group // wide  # of the busiest group
    work = max(sample, values + min(pairs, batch * top_k) * each)
    decoded = _decoded(group, stored, size.experts)
    in_memory = decoded if stored < 2 * size.experts else 0
    return stored + group + in_memory + work, group + decoded + stored * group // wide + work
