"""What will be written: TensorSpec, Item, Shard, Plan. Pure data, decided from headers alone.

A large plan has half a million specs: they are named tuples, which are made twice as fast as frozen dataclasses.

A plan fixes every output byte except those that kernels compute, so that its sizes are the sizes of the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from json.encoder import encode_basestring_ascii
from operator import add, gt
from typing import Any, NamedTuple, TypeAlias

from moeconv.checkpoint.gguf import GgufHead
from moeconv.checkpoint.header import DTYPE_BITS, PLAN_HEADER, PLAN_VALUES, file_cost, most_cost, repeated_nbytes
from moeconv.checkpoint.strictjson import canonical_json
from moeconv.errors import UsageError
from moeconv.types import Config

# The parameters of a kernel, by the names that the kernel documents: JSON values.
Params: TypeAlias = Mapping[str, Any]

PLAN_VERSION = 1
DEFAULT_SHARD_SIZE = 5_000_000_000


class TensorSpec(NamedTuple):
    """An output tensor: its name and layout on disk, the role that it is counted under, and the number of parameters
    that it stands for.

    Where several items make a tensor, each makes one of its `of` slices along the first axis: slice `at`, and `shape`
    is that of the slice. `of` is 0 for a whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    params: int
    at: int = 0
    of: int = 0

    @property
    def nbytes(self) -> int:
        return repeated_nbytes(self.dtype, self.shape)


class Input(NamedTuple):
    """A byte range of one tensor of an origin: the source, an overlay, or a further source ("source:1")."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]  # of the range where it is whole rows: the shape that a kernel gets
    start: int
    nbytes: int
    origin: str = "source"


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of work: a kernel with its inputs, parameters and outputs. `copy` concatenates the bytes of its inputs.

    `changed` is the role under which the outputs count as changed, "" where bytes are only moved.
    """

    outputs: tuple[TensorSpec, ...]
    kernel: str = "copy"
    inputs: tuple[Input, ...] = ()
    params: Params = field(default_factory=dict)
    changed: str = ""

    @property
    def nbytes(self) -> int:
        return sum([repeated_nbytes(spec.dtype, spec.shape) for spec in self.outputs])

    @property
    def held(self) -> int:
        """The bytes of the tensors between the kernels of a chain; 0 for other items."""
        total, params = 0, self.params
        while "between" in params:
            _, dtype, shape, *_ = params["between"]
            total, params = total + repeated_nbytes(dtype, tuple(shape)), params["then"]["params"]
        return total


@dataclass(frozen=True)
class Shard:
    """One output file: its items in the order of the plan. A safetensors file, or a GGUF file where `gguf` is given."""

    name: str
    items: tuple[Item, ...]
    gguf: GgufHead | None = None

    def layout(self) -> list[TensorSpec]:
        """The tensors in the order of the file: those with the widest elements first, so that each one is aligned."""
        specs = [spec for item in self.items for spec in item.outputs]
        if self.gguf is not None:
            return specs
        whole = [
            s._replace(shape=(s.of, *s.shape), params=s.params * s.of, of=0) if s.of else s for s in specs if not s.at
        ]
        return sorted(whole, key=lambda s: -DTYPE_BITS[s.dtype])

    @cached_property
    def work(self) -> list[Item]:
        """The items in the order of the file, so that the file can be hashed while it is written instead of being read
        back. An item that makes several tensors stands at the position of the largest one."""
        if self.gguf is not None:
            return list(self.items)
        return sorted(self.items, key=lambda item: -DTYPE_BITS[max(item.outputs, key=lambda s: s.nbytes).dtype])

    def copies_the_same(self, other: Shard) -> bool:
        """Whether both shards only copy the same bytes in the same order, under different names."""
        return len(self.items) == len(other.items) and all(
            a.kernel == b.kernel == "copy" and a.inputs == b.inputs for a, b in zip(self.items, other.items)
        )

    @cached_property
    def nbytes(self) -> int:
        """The size of the file in bytes, with its header."""
        return self.gguf.serialise()[2] if self.gguf is not None else self.cost[2]

    @cached_property
    def cost(self) -> tuple[int, int, int]:
        """(bytes of the safetensors header, values in it as a reader counts them, bytes of the file)."""
        return file_cost((s.name, s.dtype, s.shape) for s in self.layout())


@dataclass(frozen=True)
class Plan:
    """Everything that a step will write. `block` is the step's own block of the JSON result."""

    command: str
    parameters: Config
    identity: str
    config: Config
    shards: tuple[Shard, ...]
    params_total: int
    params_active: int
    block: Config = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()  # source tensors that have no part in the output
    texts: Mapping[str, str] = field(default_factory=dict)  # further small files: name -> text
    promise: Mapping[str, int] = field(
        default_factory=dict
    )  # the expected value of `changed`, counted from the geometry
    earlier: tuple[Plan, ...] = ()  # plans that this one was fused with; the manifest lists each as a step

    def items(self) -> Iterable[Item]:
        for shard in self.shards:
            yield from shard.items

    @cached_property
    def changed(self) -> dict[str, int]:
        """How many tensors of each role are written with other bytes than in the source, or under another name."""
        counts: dict[str, int] = {}
        for item in self.items():
            if item.changed:
                counts[item.changed] = counts.get(item.changed, 0) + len(item.outputs)
        return counts

    @cached_property
    def tensors(self) -> int:
        """The number of tensors in the files; tensors that GGUF stacks count as one."""
        return sum(
            len(shard.gguf.stacks) if shard.gguf else sum([not s.at for item in shard.items for s in item.outputs])
            for shard in self.shards
        )

    @property
    def gguf(self) -> bool:
        """Whether the output is a GGUF file, which includes config and tokenizer, in place of a checkpoint."""
        return any(shard.gguf is not None for shard in self.shards)

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all shards, with their headers."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def largest_item(self) -> int:
        """The bytes of the largest item that is computed: outputs, inputs, and the tensor between the kernels of a
        chain. Each worker holds one such item at a time."""
        computed = [i.nbytes + i.held + sum(n.nbytes for n in i.inputs) for i in self.items() if i.kernel != "copy"]
        return max(computed, default=0)

    @cached_property
    def plan_id(self) -> str:
        """hex sha256 of the plan: the same work has the same id on every machine."""
        digest = hashlib.sha256()
        for part in self.canonical():
            digest.update(part)
        return digest.hexdigest()

    def canonical(self) -> Iterator[bytes]:
        """The plan as canonical JSON, without paths and times, in parts."""
        about = {
            "plan_version": PLAN_VERSION,
            "command": self.command,
            "parameters": dict(self.parameters),
            "identity": self.identity,
            "config": dict(self.config),
            **({"earlier": [plan.plan_id for plan in self.earlier]} if self.earlier else {}),
        }
        yield canonical_json(about)[:-1] + b',"shards":['  # the last of the sorted keys but for "texts"
        for i, shard in enumerate(self.shards):
            yield b"," * (i > 0) + _shard_json(shard)
        yield b"]" + (b',"texts":' + canonical_json(dict(self.texts)) if self.texts else b"") + b"}"


def _shard_json(shard: Shard) -> bytes:
    """The canonical JSON of a shard in a plan. It is made as text: of a large plan it would be millions of objects."""
    head = f'"head":"{hashlib.sha256(shard.gguf.serialise()[0]).hexdigest()}",' if shard.gguf else ""
    known: dict[int, str] = {}  # items of equal weights share their parameters
    items = ",".join([_item_json(item, known) for item in shard.items])
    return f'{{{head}"items":[{items}],"name":{_text(shard.name)}}}'.encode()


def _item_json(item: Item, known: dict[int, str]) -> str:
    params = known.get(id(item.params))
    if params is None:
        params = known[id(item.params)] = canonical_json(dict(item.params)).decode()
    inputs = [f"[{_text(n.origin)},{_text(n.tensor)},{n.start},{n.nbytes},{_sizes(n.shape)}]" for n in item.inputs]
    outputs = [
        f'[{_text(name)},"{dtype}",{_sizes(shape)}{f",{at},{of}" if of else ""}]'
        for name, dtype, shape, _, _, at, of in item.outputs
    ]
    return f"[{_text(item.kernel)},[{','.join(inputs)}],{params},[{','.join(outputs)}]]"


_text = encode_basestring_ascii


@lru_cache(maxsize=4096)
def _sizes(shape: tuple[int, ...]) -> str:
    return canonical_json(shape).decode()


def pack_shards(
    items: Sequence[Item], *, shard_size: int = DEFAULT_SHARD_SIZE, group_of: Callable[[Item], Hashable] | None = None
) -> tuple[Shard, ...]:
    """Put items into files of at most `shard_size` bytes of tensors, in order. Items that make slices of the same
    tensors stay together; what is larger than `shard_size` gets a file of its own. No file gets more tensors than a
    header that can be opened has room for.

    `group_of` keeps items of different groups in different files. The groups are in the order of their first items.
    Raises UsageError for a size below 1.
    """
    if shard_size < 1:
        raise UsageError("--shard-size must be at least 1 byte", hint="Try --shard-size 5GB.")
    groups: dict[Hashable, list[list[Item]]] = {}
    for unit in _units(items):
        groups.setdefault(group_of(unit[0]) if group_of else None, []).append(unit)
    by_size = [_in_order(units, _size, (shard_size,)) for units in groups.values()]
    shards = _named(by_size)
    if any(cost > most for shard in shards for cost, most in zip(shard.cost, _HEADER)):  # it takes very many tensors
        most = (shard_size, *_HEADER)
        shards = _named(
            _in_order(units, lambda unit: (*_size(unit), *_header_cost(unit)), most) for units in groups.values()
        )
    return shards


_HEADER = (PLAN_HEADER, PLAN_VALUES)


def _named(groups: Iterable[list[list[Item]]]) -> tuple[Shard, ...]:
    """The files of the groups, by the names that every loader knows."""
    bins = [packed for group in groups for packed in group] or [[]]
    if len(bins) == 1:
        return (Shard("model.safetensors", tuple(bins[0])),)
    total = len(bins)
    return tuple(Shard(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(b)) for i, b in enumerate(bins, start=1))


def _size(items: Iterable[Item]) -> tuple[int]:
    return (sum([item.nbytes for item in items]),)


def _header_cost(items: Iterable[Item]) -> tuple[int, int]:
    """An upper bound of the (bytes, values) that the tensors of the items take in the header of a file."""
    return most_cost(
        (s.name, s.dtype, (s.of, *s.shape) if s.of else s.shape) for item in items for s in item.outputs if not s.at
    )


def _in_order(
    units: Sequence[Sequence[Item]], cost: Callable[[Sequence[Item]], tuple[int, ...]], most: tuple[int, ...]
) -> list[list[Item]]:
    """The items of the units in order, in lists whose costs add up to at most `most`, where one unit does not alone
    exceed it."""
    bins: list[list[Item]] = [[]]
    filled = (0,) * len(most)
    for unit in units:
        costs = cost(unit)
        total = tuple(map(add, filled, costs))
        if bins[-1] and any(map(gt, total, most)):
            bins.append([])
            total = costs
        bins[-1].extend(unit)
        filled = total
    return bins


def _units(items: Sequence[Item]) -> list[list[Item]]:
    """Lists of items that must be in one file: one item each, or the items that make slices of the same tensors."""
    units: list[list[Item]] = []
    for item in items:
        if item.outputs[0].at:
            units[-1].append(item)
        else:
            units.append([item])
    return units
