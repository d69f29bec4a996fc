"""What a quantization format is: number formats, a layout on disk, kernels, what config.json says, and who loads it.

A format is one record in a file of its own, and one line in formats.py or an entry point moeconv.formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.model import Model
from moeconv.plan.build import whole
from moeconv.plan.plan import Item, Shard, TensorSpec
from moeconv.types import JsonObject

MIXED = "mixed"  # the word of --scheme for bits that differ by layer


@dataclass(frozen=True, slots=True)
class Scheme:
    """A number format as it was chosen. `group` is weights per scale, None for one scale per row."""

    name: str
    bits: int
    group: int | None = None
    nested: bool = False  # bitsandbytes' double quantization: the scales are quantized too


@dataclass(frozen=True, slots=True)
class SchemeInfo:
    """A number format that a layout offers. `codes` is the dtype of the tensor that holds the codes; `loads` says for
    each runtime whether it loads it: ok, dequantized, no or unknown. `limit` is a relative RMS error above which a
    decoded weight cannot be what this scheme makes of a sane matrix.

    `groups` are the weights per scale that --group-size may ask for, the largest first, None for one scale per row; ()
    where the layout fixes them. `errors` {group: squared error of Gaussian weights relative to their own square,
    measured by round-to-nearest} is for schemes that --scheme mixed chooses from. `nests`: --double-quant goes with it.
    """

    name: str
    bits: int
    codes: str
    loads: Mapping[str, str]
    limit: float
    groups: tuple[int | None, ...] = ()
    errors: Mapping[int | None, float] = field(default_factory=dict)
    nests: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that packs, by the name that items have, and the values of --method that it has beside rtn.

    `fits`: it takes the parameter `fit` and then searches scales of least error (mse). `grid` is "module:name" of a
    `quantize.gptq.grids.CodeGrid`, with which data chooses the codes (gptq): imported when it is needed, since it works
    on tensors. `check(item, method)` raises UsageError for an item that a method does not go with; `without` says why
    the layout lacks a method.
    """

    name: str
    fits: bool = False
    grid: str = ""
    check: Callable[[Item, str], None] = lambda *_: None
    without: Mapping[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        return ("rtn", *["mse"] * self.fits, *["gptq"] * bool(self.grid))


@dataclass(frozen=True, slots=True)
class Format:
    """A layout on disk. `make(ref, scheme, role)` plans one weight; `config(scheme, ignore, dtype, scope)` is
    quantization_config. A format that is a file of its own has `shard(model, weights, scheme, dtype)` instead.

    A kernel that no table of this package has is named "module:function" in the items that `make` plans.
    """

    name: str
    schemes: tuple[SchemeInfo, ...]  # the first of a width is what --bits means
    notes: Mapping[str, str]  # runtime -> what one should know
    kernels: tuple[Kernel, ...]  # that its items name
    make: Callable[[TensorRef, Scheme, str], Item] | None = None
    config: Callable[[Scheme, Sequence[str], str, str], JsonObject] | None = None
    shard: Callable[[Model, Iterable[TensorRef], Scheme, str | None], tuple[Shard, list[str]]] | None = None
    stack: Callable[[TensorRef, Scheme, str, int], list[Item]] | None = None  # `make` for all experts in one tensor
    check: Callable[[TensorRef, Scheme], None] = lambda *_: None  # raises InputError for what cannot be packed
    # what --scheme mixed chooses from, the narrowest first: () where bits cannot differ by layer
    mixes: tuple[str, ...] = ()
    mixed: Mapping[str, str] = field(default_factory=dict)  # `loads` where bits differ by layer
    # {scheme: its quantization_config}, {layer: scheme} -> one quantization_config
    merge: Callable[[Mapping[Scheme, JsonObject], Mapping[int, Scheme]], JsonObject] | None = None
    remarks: Callable[[str, int], Sequence[str]] = lambda *_: ()  # warnings for a target
    imports: str = ""  # a line of Python that transformers needs before it loads it
    remote_code: str = ""  # the module of its loader, where --self-contained can write that beside the weights

    def __post_init__(self) -> None:
        """Raises ValueError for a record that no command could use."""
        packs = self.shard is not None or (self.make is not None and self.config is not None)
        unknown = set(self.mixes) - set(self.names)
        wrong = {
            "it has no scheme": not self.schemes,
            "two of its schemes have one name": len(set(self.names)) < len(self.schemes),
            "it has neither make and config nor shard": not packs,
            f"it mixes {', '.join(sorted(unknown))}, which it does not have": bool(unknown),
            "it mixes schemes, and has no merge": bool(self.mixes) and self.merge is None,
        }
        if problems := [text for text, found in wrong.items() if found]:
            raise ValueError(f"format {self.name}: {'; '.join(problems)}")

    def scheme(self, name: str) -> SchemeInfo:
        """The scheme of a name. Raises KeyError for one that it does not have."""
        return {scheme.name: scheme for scheme in self.schemes}[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its schemes."""
        return tuple(scheme.name for scheme in self.schemes)

    @property
    def methods(self) -> tuple[str, ...]:
        """What --method may be."""
        return tuple(dict.fromkeys(("rtn", *(method for kernel in self.kernels for method in kernel.methods))))

    def limit(self, bits: float) -> float:
        """The `limit` of the scheme whose width is nearest to `bits` per weight as they are stored."""
        return min(self.schemes, key=lambda scheme: (abs(scheme.bits - bits), -scheme.limit)).limit


def codes(
    ref: TensorRef, kernel: str, parts: Sequence[tuple[str, str, str, tuple[int, ...]]], role: str, **params: object
) -> Item:
    """An item of one weight: `parts` are (suffix, name that the kernel gives it, dtype, shape); the first has codes."""
    numel, stem = math.prod(ref.shape), ref.name.removesuffix(".weight")
    specs = tuple(
        TensorSpec(stem + suffix, dtype, shape, role, numel if i == 0 else 0)
        for i, (suffix, _, dtype, shape) in enumerate(parts)
    )
    return Item(specs, kernel, (whole(ref),), {"parts": [p[1] for p in parts], **params}, role.partition(".")[0])
