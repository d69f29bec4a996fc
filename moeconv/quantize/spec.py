"""The record of a quantization format: number formats, layout on disk, kernels, config.json, and runtimes that load it.

A format is one record in a file of its own, with one line in formats.py or an entry point `moeconv.formats`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from moeconv.checkpoint.imatrix import Imatrix
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.model import Model
from moeconv.families.spec import Family
from moeconv.options import QuantizeOptions
from moeconv.plan.build import rows, whole
from moeconv.plan.plan import Item, Shard, TensorSpec
from moeconv.quantize.layout.planner import separate_form
from moeconv.types import JsonObject

MIXED = "mixed"  # the value of --scheme for bits that differ by layer
# the machines that `hardware` names: Nvidia's GPUs by generation (A100 and RTX 30; RTX 40 and L40; H100; B200 and
# RTX 50), a processor, and Apple's
HARDWARE = ("ampere", "ada", "h100", "b200", "cpu", "mac")
GPUS = HARDWARE[:4]
# for values of --method that try several methods on each layer: those methods
TRIED = {"auto": ("mse", "awq", "gptq")}
BY_DATA = ("gptq", "awq", "auto")  # the values of --method that choose codes by --data
FOLDING = ("awq", "auto")  # those that may change the norms in front of the experts, and what else reads them
METHODS = ("rtn", "mse", *BY_DATA)
# a tensor of a packed weight: suffix of the name, name in the kernel's output, dtype, shape
Part = tuple[str, str, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Scheme:
    """The chosen number format. `group` is the number of weights per scale, None for one scale per row."""

    name: str
    bits: int
    group: int | None = None
    nested: bool = False  # bitsandbytes' double quantization: the scales are quantized too


@dataclass(frozen=True, slots=True)
class SchemeInfo:
    """A number format of a layout. `codes` is the dtype of the tensor with the codes. `loads` states for each runtime
    whether it loads the scheme: ok, dequantized, no or unknown. `limit` is the relative RMS error that no decoded
    weight of a usual matrix exceeds; above it, the packing is taken to be wrong.

    `measured` has the runtimes that were run with it, in the versions of families/measured.py; what `loads` states of
    the others is from their source or documents. Where a run depends on the family, it maps the families that were run
    to "same", "differs" (from transformers) or "refused"; an empty mapping stands for all.

    `groups` are the values of --group-size in weights per scale, the largest first, with None for one scale per row; ()
    where the layout has no choice. `usual` is the size of --group-size auto where it divides all widths. `errors`
    {group: squared error of Gaussian weights under round-to-nearest, relative to their square} is needed for schemes
    that --scheme mixed chooses from. `nests`: --double-quant can be used with it. `aliases` are other words for it that
    --scheme understands. `hardware` are the machines, of HARDWARE, on which a runtime computes with it by kernels of
    its own, and `error` is the relative RMS error of Gaussian weights under round-to-nearest with the largest group
    that is usual; both are what `moeconv formats --for` shows. `joined`: the weights that an engine joins to one matrix
    share a scale, so that the item of each reads them all (`joined_weights.py`). `kernel` names the kernel that packs
    it, where not every kernel of the format can. `whole`: it decides the type of every tensor, so that --scope all goes
    without saying. `inputs`: beside each weight it stores a scale of the inputs, which is measured on --data.
    """

    name: str
    bits: int
    codes: str
    loads: Mapping[str, str]
    limit: float
    groups: tuple[int | None, ...] = ()
    errors: Mapping[int | None, float] = field(default_factory=dict)
    nests: bool = False
    usual: int | None = None
    aliases: tuple[str, ...] = ()
    measured: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    hardware: tuple[str, ...] = ()
    error: float | None = None
    joined: bool = False
    kernel: str = ""
    whole: bool = False
    inputs: bool = False


@dataclass(frozen=True, slots=True)
class AsStored:
    """A stored form that a kernel makes, or whose codes and scales are those that it makes. `parts` are the parts of it
    that the outputs of the kernel are, in their order; `kernel` makes the outputs of them, "" where they are equal."""

    parts: tuple[str, ...]
    kernel: str = ""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that packs, by its name in items, with the values of --method that it supports besides rtn.

    `fits`: the kernel has the parameter `fit`, with which it searches scales of least error (mse). `grid` is
    "module:name" of a `quantize.gptq.grids.CodeGrid`, with which data chooses the codes (BY_DATA); it works on tensors,
    so it is imported when it is needed. `check(item, method)` raises UsageError for an item that a method cannot be
    used with. `without` has the reason why the layout does not support a method. `encodes` has the stored forms, of
    `families.encodings`, in which a weight passes as it is.
    """

    name: str
    fits: bool = False
    grid: str = ""
    check: Callable[[Item, str], None] = lambda *_: None
    without: Mapping[str, str] = field(default_factory=dict)
    encodes: Mapping[str, AsStored] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        return ("rtn", *["mse"] * self.fits, *(BY_DATA if self.grid else ()))


@dataclass(frozen=True, slots=True)
class Asked:
    """The request to a format that writes files of its own. `weights` are packed in `scheme`; `whole`: the scheme
    decides the type of every tensor. `dtype` is that of the tensors that are not packed. `imatrix` has the importance
    of columns, `size` is that of the largest file in bytes, and `name` is that of the file. `beside` has the scheme of
    the weights, by name, that --rest packs, and `types` the scheme of each tensor of the file that `Format.mix` chose
    one for."""

    model: Model
    weights: Sequence[TensorRef]
    scheme: Scheme
    dtype: str | None
    whole: bool = False
    imatrix: Imatrix | None = None
    size: int = 50_000_000_000
    name: str = "model"
    beside: Mapping[str, Scheme] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Format:
    """A layout on disk. `make(ref, scheme, role)` plans one weight; of the weight's name, only the names of the tensors
    may depend on it. `config(scheme, ignore, dtype, scope)` returns the
    quantization_config. A format that writes files of another kind has `shard` instead, which returns the files and
    warnings, and `covers`, which returns the weights of --scope all.

    The items name a kernel of another package as "module:function".
    """

    name: str
    schemes: tuple[SchemeInfo, ...]  # --bits stands for the first scheme of that width
    notes: Mapping[str, str]  # runtime -> what a user should know
    kernels: tuple[Kernel, ...]  # the kernels that its items name
    make: Callable[[TensorRef, Scheme, str], Item] | None = None
    config: Callable[[Scheme, Sequence[str], str, str], JsonObject] | None = None
    shard: Callable[[Asked], tuple[tuple[Shard, ...], list[str]]] | None = None
    covers: Callable[[Model], list[TensorRef]] | None = None
    dense: bool = False  # whether it stores models without experts
    # the row with the layout of experts that it packs; None where it packs them in the layout that they have
    form: Callable[[Family], Family | None] = separate_form
    # why a family has no such row, where it packs no other layout
    why_not: Callable[[Family], str] = lambda _: ""
    # whether it writes the multi-token-prediction layers
    prediction: bool = True
    # other keys of config.json that have the quantization_config too
    config_keys: tuple[str, ...] = ()
    # keys of weights of a family that it leaves as they are, whatever --scope says
    leaves: Callable[[Family], Collection[str]] = lambda _: ()
    stack: Callable[[TensorRef, Scheme, str, int], list[Item]] | None = None  # `make` for all experts in one tensor
    takes: Callable[[Family], bool] = lambda _: True  # whether it can store a family, by its row
    check: Callable[[TensorRef, Scheme], None] = lambda *_: None  # raises InputError for what cannot be packed
    # the schemes that --scheme mixed chooses from, those with fewer bits first; () where bits cannot differ by layer
    mixes: tuple[str, ...] = ()
    # schemes that bits by layer can be chosen from where --among names them
    among: tuple[str, ...] = ()
    mixed: Mapping[str, str] = field(default_factory=dict)  # `loads` where bits differ by layer
    mixed_measured: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # `measured` of the same
    # {scheme: its quantization_config}, {layer: scheme} -> one quantization_config
    merge: Callable[[Mapping[Scheme, JsonObject], Mapping[int, Scheme]], JsonObject] | None = None
    # the same choice for a format of files of another kind, in which every tensor may have a scheme of its own:
    # (what is asked for, sets of schemes in the order in which they are tried, importance of layers, options) ->
    # what is asked for with `types`
    mix: Callable[[Asked, Sequence[Sequence[str]], Mapping[int, float], QuantizeOptions], Asked] | None = None
    # (config of the scheme, config of --rest, expressions that match the modules of --rest) -> one quantization_config
    beside: Callable[[JsonObject, JsonObject, Sequence[str]], JsonObject] | None = None
    # `loads` of two schemes, where both are loaded; empty where two cannot stand beside each other (--rest)
    beside_loads: Mapping[str, str] = field(default_factory=dict)
    remarks: Callable[[str, int], Sequence[str]] = lambda *_: ()  # warnings for a target
    hardware: tuple[str, ...] = ()  # `hardware` of schemes that do not state it
    imports: str = ""  # a line of Python that must run before transformers can load the output
    remote_code: str = ""  # the module of its loader, where --self-contained can write the loader beside the weights

    def __post_init__(self) -> None:
        """Raises ValueError for a record that no command could use."""
        packs = self.shard is not None or (self.make is not None and self.config is not None)
        unknown = {*self.mixes, *self.among} - {*self.names}
        wrong = {
            "it has no scheme": not self.schemes,
            "two of its schemes have one name": len(set(self.names)) < len(self.schemes),
            "it has neither make and config nor shard": not packs,
            f"it mixes {', '.join(sorted(unknown))}, which it does not have": bool(unknown),
            "it mixes schemes, and has neither merge nor mix": bool(self.mixes) and not (self.merge or self.mix),
        }
        if problems := [text for text, found in wrong.items() if found]:
            raise ValueError(f"format {self.name}: {'; '.join(problems)}")

    def packs_as_stored(self, family: Family) -> bool:
        """Whether it packs the experts in the layout of the row, in which runtimes read them."""
        form = self.form(family)
        return form is not None and form.tensors.names == family.tensors.names

    def scheme(self, name: str) -> SchemeInfo:
        """The scheme of a name. Raises KeyError for one that it does not have."""
        return {scheme.name: scheme for scheme in self.schemes}[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its schemes."""
        return tuple(scheme.name for scheme in self.schemes)

    @property
    def methods(self) -> tuple[str, ...]:
        """The values of --method."""
        return tuple(dict.fromkeys(("rtn", *(method for kernel in self.kernels for method in kernel.methods))))

    def methods_of(self, info: SchemeInfo) -> tuple[str, ...]:
        """The values of --method for one scheme."""
        kernels = [kernel for kernel in self.kernels if info.kernel in ("", kernel.name)]
        found = dict.fromkeys(("rtn", *(method for kernel in kernels for method in kernel.methods)))
        # factors that are folded into a norm change the inputs whose scale is measured
        return tuple(method for method in found if not (info.inputs and method in FOLDING))

    def limit(self, bits: float, dtype: str) -> float:
        """The `limit` of the scheme with codes of this dtype whose width is nearest to `bits`, the stored bits per
        weight."""
        of_dtype = [scheme for scheme in self.schemes if scheme.codes == dtype] or self.schemes
        return min(of_dtype, key=lambda scheme: (abs(scheme.bits - bits), -scheme.limit)).limit


def codes(ref: TensorRef, kernel: str, parts: Sequence[Part], role: str, **params: object) -> Item:
    """The item that packs one weight. The first part has the codes."""
    specs = _specs(ref.name.removesuffix(".weight"), parts, role, math.prod(ref.shape))
    return Item(specs, kernel, (whole(ref),), {"parts": [p[1] for p in parts], **params}, role.partition(".")[0])


def stacked_codes(
    ref: TensorRef, stem: str, kernel: str, parts: Sequence[Part], role: str, experts: int,
    params: Mapping[str, object], *, shared: Sequence[Part] = (),
) -> list[Item]:  # fmt: skip
    """The items that pack a tensor [E, ...] of all experts, one per expert. The names of the tensors begin with `stem`.
    `parts` are those of one expert, and the first one has the codes. The item of the first expert also makes the parts
    that all experts share."""
    items = []
    for expert in range(experts):
        part = rows(ref, expert, 1)._replace(shape=ref.shape[1:])
        made = [*parts, *(() if expert else shared)]
        specs = _specs(stem, parts, role, math.prod(part.shape), expert, experts)
        specs += () if expert else _specs(stem, shared, role, 0)
        items.append(Item(specs, kernel, (part,), {"parts": [p[1] for p in made], **params}, role.partition(".")[0]))
    return items


def _specs(stem: str, parts: Sequence[Part], role: str, numel: int, at: int = 0, of: int = 0) -> tuple[TensorSpec, ...]:
    """The tensors of a weight of `numel` elements, which count with the first part."""
    return tuple(
        TensorSpec(stem + suffix, dtype, shape, role, numel if i == 0 else 0, at, of)
        for i, (suffix, _, dtype, shape) in enumerate(parts)
    )
