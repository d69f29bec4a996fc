"""What running a model layer by layer will take, from its headers, before a byte of a weight is read.

The figures are those of the CPU, where all of it lies in the memory of one process. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from moeconv.errors import InputError, UsageError
from moeconv.families.model import Model
from moeconv.plan.memory import free_memory
from moeconv.plan.meter import Meter
from moeconv.units import human_bytes

GROUP_BYTES = 1 << 25  # of widened experts at a time, or one expert
PAIR_ROWS = 8192  # (token, expert) pairs computed at a time
GROUP_ROWS = 512  # of those of one group of widened experts
SAMPLE_ROWS = 256  # tokens whose outputs of all experts are held at a time, where they have room
SAMPLE_BYTES = 1 << 26  # of those outputs, or an eighth of a byte for every weight of the experts
PRODUCT_ROWS = 32  # of those tokens, over which cosines are summed in float32
CODED_BYTES = 1 << 29  # of experts whose codes are chosen together, or one expert
# activations: the model's, and what its experts are given; of a layer's experts: as they were, rounded, chosen, and
# those that are being put in place; groups whose codes are being chosen
GPTQ: Mapping[str, Any] = {"flows": 2, "copies": 6}
# activations: the model's, the variant's, and of a refit's layer its inputs, what is missing, and a copy
PRUNED: Mapping[str, Any] = {"flows": 5}
_PROCESS = 430_000_000  # Python, torch, the classes of transformers
_CONVERTED = 2  # a group decoded, stacked and joined, beside the widened one
_COPIES = 8  # of the stream, in a batch: around the attention, in front of the experts and behind them
_SKEW = 3  # times its even share of the tokens
_SKETCH = 64  # dimensions of the sampled outputs


@dataclass(frozen=True)
class Workload:
    """What is run: windows of tokens in batches, computed in numbers of `width` bytes.

    `flows`: activations [tokens, H] that are held; `sample`: tokens that go through all experts, whose figures stay to
    the end; `judged`: logits of a window are scored; `copies` of a layer's experts, widened, that stand beside each
    other (0: they stay as they are stored); `coders` groups of experts whose codes are chosen at the same time.
    """

    tokens: int
    seq_len: int
    batch_size: int
    width: int = 4
    flows: int = 1
    sample: int = 0
    judged: bool = False
    copies: int = 0
    coders: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes: `ends`, the larger of the two ends of the model with its embeddings; `layer`, the largest layer without
    its experts as it is computed with; `held`, its experts in memory and what is computed in the layer, `read` where
    they are read when they are needed; `activations`, which a file can hold; `kept`, results that stay to the end."""

    ends: int
    layer: int
    held: int
    read: int
    activations: int
    kept: int

    def peak(self, *, held: bool, in_file: bool) -> int:
        inner = self.layer + (self.held if held else self.read) + self.kept
        return _PROCESS + max(self.ends, inner) + (0 if in_file else self.activations)

    @property
    def least(self) -> int:
        return self.peak(held=False, in_file=True)


def together(needs: Sequence[Need]) -> Need:
    """What runs after one another in one process take: the most of each."""
    return Need(*(max(getattr(need, f.name) for need in needs) for f in fields(Need)))


@dataclass(frozen=True)
class MemoryPlacement:
    """How a run fits: its `peak`, what is `free`, whether experts are `held` in memory, and the bytes of activations in
    memory (None: all)."""

    peak: int
    free: int
    held: bool
    activations: int | None

    def to_json(self) -> dict[str, Any]:
        """{peak_bytes, free_bytes, experts: memory|disk, activations: memory|file}."""
        places = {"experts": "memory" if self.held else "disk"}
        places["activations"] = "memory" if self.activations is None else "file"
        return {"peak_bytes": self.peak, "free_bytes": self.free} | places


def need_of(model: Model, run: Workload) -> Need:
    """What a run of this model takes."""
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
    kept = run.sample * experts * (2 * _SKETCH + 4) * len(model.moe_layers)
    held = [_experts(size, run, experts, batch, model.top_k, hidden) for size in inside]
    return Need(
        ends=vocabulary * width + max(stored, logits),
        layer=max((size.others * width for size in inside), default=0),
        held=max((h for h, _ in held), default=0),
        read=max((r for _, r in held), default=0),
        activations=run.flows * run.tokens * hidden * width,
        kept=kept,
    )


def sample_room(experts: int, hidden: int, weights: int) -> tuple[int, int]:
    """How outputs of all experts are held for a layer with so many weights in its experts: (tokens at a time, bytes of
    a number): float32, or float16 where fewer tokens than SAMPLE_ROWS would have room."""
    room, token = max(SAMPLE_BYTES, weights // 8), experts * hidden
    if room >= SAMPLE_ROWS * token * 4:
        return SAMPLE_ROWS, 4
    return min(SAMPLE_ROWS, max(1, room // (2 * token * PRODUCT_ROWS)) * PRODUCT_ROWS), 2


def choose_placement(need: Need, *, budget: int | None, free: int | None = None, what: str = "this") -> MemoryPlacement:
    """Where experts and activations go so that the peak stays below `budget`, or below what is free without one.

    Raises InputError where not even the least fits into what is free, UsageError where `budget` is below it.
    """
    free = free_memory() if free is None else free
    limit = free if budget is None else budget
    for held, in_file in ((True, False), (True, True), (False, True)):
        peak = need.peak(held=held, in_file=in_file)
        if peak <= limit:
            return MemoryPlacement(peak, free, held, 0 if in_file else None)
    least = f"{what} takes at least {human_bytes(need.least)} of memory"
    if budget is not None:
        raise UsageError(f"--max-memory {human_bytes(budget)}: {least}", hint="Raise it; --batch-size lowers the need.")
    raise InputError(
        f"{least}, {human_bytes(free)} are free",
        hint="Lower --batch-size or --seq-len, or use a larger machine; --max-memory SIZE overrules what is free.",
    )


def noted_placement(need: Need, *, budget: int | None, meter: Meter, what: str) -> MemoryPlacement:
    """`choose_placement`, with a note to the meter."""
    found = choose_placement(need, budget=budget, what=what)
    text = f"{what} takes about {human_bytes(found.peak)} of memory, {human_bytes(found.free)} are free"
    meter.note(text + ("" if found.held else "; no more of the experts is held than must be"))
    return found


def whole_need(models: Sequence[Model], *, trained: int, batch: int) -> Need:
    """What training through whole models in float32 takes: their weights, the gradients, moments and best values of
    `trained` parameters, and what `batch` tokens leave behind for the way back."""
    weights = sum(model.numel(model.checkpoint.tensors[name]) for model in models for name in model.roles)
    largest = max((model.checkpoint.tensors[name].nbytes for model in models for name in model.roles), default=0)
    student = models[0]
    behind = batch * 40 * student.hidden_size * student.num_layers
    logits = 4 * batch * int(student.value("vocab_size") or 0)
    return Need(0, 4 * (weights + 4 * trained + behind + logits) + 2 * largest, 0, 0, 0, 0)


@dataclass
class _Sizes:
    """Parameters and bytes of one layer, or of what is outside of the layers."""

    experts: int = 0
    experts_bytes: int = 0
    others: int = 0
    others_bytes: int = 0
    rows: int = 0  # outputs of all matrices beside the experts', for every token
    embeddings: list[tuple[int, int]] = field(default_factory=list)  # parameters, bytes

    def add(self, group: str, shape: tuple[int, ...], nbytes: int, numel: int, *, key: str) -> None:
        if group == "expert":
            self.experts, self.experts_bytes = self.experts + numel, self.experts_bytes + nbytes
            return
        if key.startswith("embedding."):
            self.embeddings.append((numel, nbytes))
        self.others, self.others_bytes = self.others + numel, self.others_bytes + nbytes
        self.rows += shape[0] if len(shape) == 2 and numel else 0


def _values(size: _Sizes, run: Workload, batch: int, hidden: int) -> int:
    """What a batch computes in a layer beside its experts: the stream, copies of it, and every matrix's outputs."""
    return max(size.others_bytes, batch * (_COPIES * hidden + size.rows) * run.width)


def _sample(run: Workload, experts: int, hidden: int, weights: int) -> int:
    """What the sample's outputs of all experts take, with their sketch, the batches being through."""
    rows, width = sample_room(experts, hidden, weights)
    held = min(run.sample, rows) * width + min(run.sample, PRODUCT_ROWS) * width
    return held * experts * hidden + 3 * run.sample * experts * min(hidden, _SKETCH) * 4


def _experts(size: _Sizes, run: Workload, experts: int, batch: int, top_k: int, hidden: int) -> tuple[int, int]:
    """Bytes of a layer's experts with what is computed in it: (held in memory, read when they are needed)."""
    values = _values(size, run, batch, hidden)
    if not size.experts:
        return values, values
    alone = math.ceil(size.experts / experts)  # parameters of one
    inner = alone // (3 * hidden)
    each = (3 * hidden + 4 * inner) * run.width  # of a (token, expert) pair
    wide, stored = size.experts * run.width, size.experts_bytes
    sample = _sample(run, experts, hidden, size.experts) if run.sample else 0
    work = max(sample, values + min(batch * top_k, PAIR_ROWS) * each)
    if run.copies:
        placed = wide * run.copies
        if run.copies <= 2:  # nothing is kept for a way back: the stock code goes expert by expert
            work = values + min(batch * top_k, PAIR_ROWS, _SKEW * batch * top_k // experts) * each
        together, least = _coded(run, experts, hidden, inner, top_k)
        return placed + max(work, together), placed + max(work, least)
    if wide <= GROUP_BYTES or stored >= wide:
        return wide + work, wide + work
    group = max(1, GROUP_BYTES // (alone * run.width)) * alone * run.width
    pairs = GROUP_ROWS if run.sample else _SKEW * batch * top_k * group // wide  # of the group that is chosen most
    work = max(sample, values + min(pairs, batch * top_k) * each)
    decoded = _CONVERTED * group if stored < 2 * size.experts else 0
    return stored + group + decoded + work, (1 + _CONVERTED) * group + stored * group // wide + work


def codes_bytes(out: int, width: int) -> int:
    """What choosing the codes of one expert's matrix [out, width] holds: Hessians in float64, factored, and in float32;
    weights, levels, steps and what is left of the error."""
    return 40 * width * width + 24 * out * width


def _coded(run: Workload, experts: int, hidden: int, inner: int, top_k: int) -> tuple[int, int]:
    """Bytes of the groups of experts whose codes are chosen, and of one expert alone."""
    if not run.coders:
        return 0, 0
    tokens = min(run.tokens, _SKEW * run.tokens * top_k // experts)
    alone = max(codes_bytes(2 * inner, hidden), codes_bytes(hidden, inner) + 8 * inner * tokens)
    group = max(alone, min(CODED_BYTES, alone * experts))
    return min(run.coders * group, alone * experts), alone
