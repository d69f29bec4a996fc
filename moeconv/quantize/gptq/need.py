"""What choosing codes takes in memory, from the plan and the headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moeconv.data import heldout
from moeconv.families import packed
from moeconv.families.model import Model
from moeconv.plan.kernels.chain import last_stage
from moeconv.plan.plan import Item
from moeconv.stream.need import WorkloadFields

CODED_BYTES = 1 << 29  # of experts whose codes are chosen together, or one expert
POOLED = 512  # tokens of the whole layer that every expert is shown beside its own
OUTPUT_ROWS = 4096  # tokens whose outputs are compared at a time
ROWS_PER_CALL = 8192  # output rows of all experts together that one call on the CPU codes
FLOWS = 2  # activations: the model's, and what a layer's experts are given
TENSOR_BYTES = 1700  # per written tensor: in the plan without and with codes, and in the result that is checked
_PAIR_BYTES = 1 << 26  # of (token, expert) pairs that go through the experts at a time
_SKEW = 3  # times its even share of the tokens


def codes_bytes(out: int, width: int) -> int:
    """What choosing the codes of one expert's matrix [out, width] holds: its Hessian in float64 and, one after the
    other, the factors and permuted copies of it; the weights, levels, errors and slopes in float32, and copies in the
    order of the columns."""
    return 32 * width * (width + out)


def hidden_bytes(width: int, tokens: int) -> int:
    """What the down projection [out, width] of an expert with so many tokens is given, and what that has lost."""
    return 8 * width * tokens


def pair_bytes(hidden: int, inner: int) -> int:
    """Of one (token, expert) pair in the stock code: its inputs, gathered, the output, weighted and summed; gate and
    up, the activation and their product."""
    return 4 * (5 * hidden + 4 * inner)


def pair_rows(hidden: int, inner: int) -> int:
    """(token, expert) pairs that go through the experts at a time."""
    return max(64, _PAIR_BYTES // pair_bytes(hidden, inner))


def experts_per_call(rows: int) -> int:
    """Experts of so many output rows that one call on the CPU codes."""
    return max(1, ROWS_PER_CALL // rows)


@dataclass
class _Matrices:
    """One layer's: bytes of the packed ones; of an expert its rows by (whether it is a down projection, width)."""

    packed: int = 0
    tensors: int = 0
    rows: dict[tuple[bool, int], dict[int, int]] = field(default_factory=dict)

    def add(self, item: Item, *, expert: int, down: bool) -> None:
        out, width = last_stage(item).inputs[0].shape
        self.packed += sum(spec.nbytes for spec in item.outputs)
        self.tensors += len(item.outputs)
        of_kind = self.rows.setdefault((down, width), {})
        of_kind[expert] = of_kind.get(expert, 0) + out


def gptq_workload(
    view: Model, items: Iterable[Item], *, tokens: int, seq_len: int, jobs: int
) -> WorkloadFields:  # fmt: skip
    """The workload of choosing the codes of `items`, packings of expert weights of `view`: the experts
    stand in memory once, with the packed ones beside them, and groups of `jobs` times CODED_BYTES are worked on."""
    layers: dict[int | None, _Matrices] = {}
    for item in items:
        role = view.roles[packed.weight_of(item.outputs[0].name)]
        layers.setdefault(role.layer, _Matrices()).add(
            item, expert=int(role.expert or 0), down=role.key.partition(".")[2] == "down"
        )
    windows = -(-tokens // seq_len)
    held = max(tokens // heldout.EVERY, seq_len) if windows >= heldout.EVERY else -(-tokens // heldout.SHARE)
    row = 4 * view.hidden_size
    # what the held-out tokens should give, and the float64 moment of the pool
    results = max((layer.packed for layer in layers.values()), default=0) + held * row + 2 * row * view.hidden_size
    results += TENSOR_BYTES * sum(layer.tensors for layer in layers.values())
    share = min(tokens, tokens * view.top_k // max(1, view.num_experts))
    works = [_work(view, kind, rows, jobs, tokens, share) for m in layers.values() for kind, rows in m.rows.items()]
    least = max((alone for _, alone in works), default=0)
    outputs = min(held, OUTPUT_ROWS) * 2 * row
    return {
        "flows": FLOWS, "copies": 1, "results": results,
        "work": (max([outputs, *(group for group, _ in works)]), max(outputs, least)),
    }  # fmt: skip


def _work(
    view: Model, kind: tuple[bool, int], rows: Mapping[int, int], jobs: int, tokens: int, share: int
) -> tuple[int, int]:
    """Bytes of coding matrices of one kind, a group for every job, or one expert alone."""
    (down, width), out = kind, max(rows.values())
    each, most = codes_bytes(out, width), codes_bytes(out, width)
    if down:
        each += hidden_bytes(width, share + POOLED)
        most += hidden_bytes(width, min(tokens, _SKEW * share) + POOLED)
    together = max(1, min(experts_per_call(out), CODED_BYTES // each, len(rows)))
    group = max(together * each, most)
    if down:
        hidden, pairs = view.hidden_size, together * (share + POOLED)
        group += min(pair_rows(hidden, width), pairs) * pair_bytes(hidden, width)
        most += min(pair_rows(hidden, width), share + POOLED) * pair_bytes(hidden, width)
    return min(jobs, -(-len(rows) // together)) * group, most
