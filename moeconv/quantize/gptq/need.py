"""The memory that it takes to choose codes, computed from the plan and the headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from moeconv.data import heldout
from moeconv.families import packed
from moeconv.families.model import Model
from moeconv.families.spec import Role
from moeconv.plan.kernels.chain import last_stage
from moeconv.plan.plan import Item
from moeconv.quantize.spec import FOLDING, TRIED
from moeconv.stream.need import WorkloadFields

CODED_BYTES = 1 << 29  # work memory of experts whose codes are chosen together (more only for a single expert)
POOLED = 512  # tokens of the whole layer that are used for every expert, besides its own
OUTPUT_ROWS = 4096  # tokens whose outputs are compared at a time
ROWS_PER_CALL = 8192  # output rows of all experts together that one call on the CPU codes
FLOWS = 2  # activations: those of the model, and the inputs of a layer's experts
TENSOR_BYTES = 1700  # per written tensor: in the plan without and with codes, and in the result that is checked
DIVIDED = ("norm.ffn", "norm.ffn_bias")  # what AWQ divides by its factors
# what else reads the norm before the experts
READERS = ("router.weight", "shared.router", "shared.gate", "shared.up", "shared.gate_up")
FOLD = ".fold"  # after the name of a weight: the exponents of its factors, in an overlay
FOLDED = ("norm.ffn", "expert.down")  # roles whose inputs or outputs have factors of their own
_PAIR_BYTES = 1 << 26  # of the (token, expert) pairs that the experts compute at a time
_SKEW = 3  # an expert may get so many times its even share of the tokens


def exponents_of(view: Model, items: Iterable[Item]) -> Iterator[tuple[str, Role, int]]:
    """(name in the overlay, role, number of values) of the exponents of AWQ's factors. `items` are planned for weights
    of `view`; of the norm and the down projections the overlay has exponents."""
    for item in items:
        name = packed.weight_of(item.outputs[0].name)
        if (role := view.roles[name]).key in FOLDED:
            width = view.expert_dimension if role.expert is None else last_stage(item).inputs[0].shape[1]
            yield name + FOLD, role, width


def codes_bytes(out: int, width: int) -> int:
    """The memory for choosing the codes of one expert's matrix [out, width]: its Hessian in float64 and, one after the
    other, the factors and permuted copies of it; the weights, levels, errors and slopes in float32, and copies in the
    order of the columns."""
    return 32 * width * (width + out)


def hidden_bytes(width: int, tokens: int) -> int:
    """The memory of the inputs of an expert's down projection [out, width] for `tokens` tokens, and of their error."""
    return 8 * width * tokens


def pair_bytes(hidden: int, inner: int) -> int:
    """The memory per (token, expert) pair in the stock code: the gathered input; the output, its weighted copy and the
    sum; gate and up, the activation and their product."""
    return 4 * (5 * hidden + 4 * inner)


def pair_rows(hidden: int, inner: int) -> int:
    """The number of (token, expert) pairs that the experts compute at a time."""
    return max(64, _PAIR_BYTES // pair_bytes(hidden, inner))


def experts_per_call(rows: int) -> int:
    """The number of experts with `rows` output rows each that one call on the CPU codes."""
    return max(1, ROWS_PER_CALL // rows)


@dataclass
class _Matrices:
    """The matrices of one layer: the bytes of the packed ones, and the rows of an expert by (whether it is a down
    projection, width)."""

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
    view: Model, items: Iterable[Item], *, tokens: int, seq_len: int, jobs: int, method: str = "gptq"
) -> WorkloadFields:  # fmt: skip
    """The workload of choosing the codes of `items`, which pack expert weights of `view`, by `method`: the experts are
    in memory once, with the packed ones beside them (twice where several methods are tried), and `jobs` groups of
    CODED_BYTES are worked on at the same time."""
    layers: dict[int | None, _Matrices] = {}
    for item in items:
        role = view.roles[packed.weight_of(item.outputs[0].name)]
        layers.setdefault(role.layer, _Matrices()).add(
            item, expert=int(role.expert or 0), down=role.key.partition(".")[2] == "down"
        )
    windows = -(-tokens // seq_len)
    held = max(tokens // heldout.EVERY, seq_len) if windows >= heldout.EVERY else -(-tokens // heldout.SHARE)
    row = 4 * view.expert_dimension
    # the wanted outputs for the held-out tokens, and the float64 moment of the pool
    copies = 1 + (method in TRIED)
    wanted = (held + POOLED * (method in FOLDING)) * row
    results = copies * max((layer.packed for layer in layers.values()), default=0) + wanted
    results += 2 * row * view.expert_dimension
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
    """The bytes for coding matrices of one kind: one group per job, or a single expert."""
    (down, width), out = kind, max(rows.values())
    each, most = codes_bytes(out, width), codes_bytes(out, width)
    if down:
        each += hidden_bytes(width, share + POOLED)
        most += hidden_bytes(width, min(tokens, _SKEW * share) + POOLED)
    together = max(1, min(experts_per_call(out), CODED_BYTES // each, len(rows)))
    group = max(together * each, most)
    if down:
        hidden, pairs = view.expert_dimension, together * (share + POOLED)
        group += min(pair_rows(hidden, width), pairs) * pair_bytes(hidden, width)
        most += min(pair_rows(hidden, width), share + POOLED) * pair_bytes(hidden, width)
    return min(jobs, -(-len(rows) // together)) * group, most
