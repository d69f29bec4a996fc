"""--rest: the weights that --scope leaves out (attention, shared experts, dense feed-forward layers) in a scheme of
their own, and the names by which a config group lists them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.families.names import module_names
from moeconv.options import QuantizeOptions
from moeconv.quantize.formats import FORMATS, choose_group, choose_scheme
from moeconv.quantize.scope import in_scope
from moeconv.quantize.spec import MIXED, Format, Scheme

_LAYER = re.compile(r"^(?P<before>.*?layers)\.(?P<layer>\d+)\.(?P<path>.*)\.(?P<last>[^.]+)$")


@dataclass(frozen=True)
class Rest:
    """The scheme of the other weights, and the weights."""

    scheme: Scheme
    weights: Sequence[TensorRef]

    @property
    def names(self) -> frozenset[str]:
        """The names of the weights."""
        return frozenset(ref.name for ref in self.weights)


def rest_of(model: Model, options: QuantizeOptions, format: Format, taken: Sequence[TensorRef]) -> Rest | None:
    """What --rest packs beside the weights that --scope has `taken`; None without --rest. Raises UsageError where it
    cannot be combined with the other options, InputError for weights that the scheme cannot pack."""
    if options.rest is None:
        return None
    mixed = options.scheme == MIXED and format.mix is None  # not a scheme per tensor
    if not format.beside_loads or mixed:
        with_it = " or ".join(f.name for f in FORMATS.values() if f.beside_loads)
        raise UsageError(
            "--rest cannot be combined with " + ("--scheme mixed" if mixed else f"--format {format.name}"),
            hint=f"Use --format {with_it} with one scheme for the experts, or leave --rest out.",
        )
    names = {ref.name for ref in taken}
    others = [ref for ref in in_scope(model, "all-linear", format) if ref.name not in names]
    if not others:
        raise UsageError(
            f"--scope {options.scope} leaves no weight for --rest", hint="Leave --rest out, or use --scope experts."
        )
    info = choose_scheme(format, scheme=options.rest, bits=None)
    widths = list(dict.fromkeys(ref.shape[1] for ref in others))
    scheme = Scheme(info.name, info.bits, choose_group(format, info, "auto", widths))
    for ref in others:
        format.check(ref, scheme)
    return Rest(scheme, others)


def patterns(model: Model, weights: Iterable[TensorRef]) -> list[str]:
    """Regular expressions that match the modules of these weights, and the modules into which an engine fuses them,
    such as self_attn.qkv_proj, but no modules of experts. Layers are listed where not all of them have such a
    module."""
    layers: dict[str, set[int]] = {}
    for ref in weights:
        for module in module_names(ref.name, model.family):
            if (found := _LAYER.match(module)) is not None:
                layers.setdefault(found["path"], set()).add(int(found["layer"]))
    every = {int(found["layer"]) for found in map(_LAYER.match, model.roles) if found is not None}
    return [rf"re:.*layers\.{_any_of(at, every)}\.{re.escape(path)}\.[^.]+$" for path, at in layers.items()]


def _any_of(layers: Collection[int], every: Collection[int]) -> str:
    """An expression for some numbers of layers; `every` are all that the model has, those of multi-token prediction
    among them."""
    return r"\d+" if {*layers} == {*every} else f"({'|'.join(map(str, sorted(layers)))})"
