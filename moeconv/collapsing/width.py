"""The number of neurons of the FFNs of a collapsed model: --width, or what computes a token in the source."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.families.settings import MAX_WIDTH
from moeconv.families.shapes import shared_width
from moeconv.options import CollapseOptions
from moeconv.units import counted


@dataclass(frozen=True)
class DenseWidth:
    """The neurons of every FFN of the result, those of the source's shared expert, and those of its dense layers (0
    where it has none)."""

    after: int
    shared: int
    dense: int


def dense_width(model: Model, options: CollapseOptions) -> DenseWidth:
    """The width that the options state. Raises UsageError for a width that is too small for the dense layers of the
    source, or too large for a config.json."""
    shared = shared_width(model.family.experts.shared_width, model.value)
    layers = sorted({r.layer for r in model.roles.values() if r.group == "ffn" and r.layer is not None})
    layers = [layer for layer in layers if layer < model.num_layers and layer not in model.moe_layers]
    dense = model.ffn_width if layers else 0
    if options.multiple is not None and options.multiple < 1:
        raise UsageError(f"--multiple {options.multiple} must be at least 1")
    if options.width is None:
        unit = options.multiple or 1
        usual = -(-(model.top_k * model.expert_width + shared) // unit) * unit
        if usual > MAX_WIDTH:
            raise UsageError(
                f"--multiple {unit} makes a width of {usual}, and the largest is {MAX_WIDTH}",
                hint="Lower it, or state the width with --width.",
            )
        return DenseWidth(max(usual, dense), shared, dense)
    if options.multiple is not None:
        raise UsageError("--multiple rounds the default width, and --width states the number itself",
                         hint="Leave one of the two out.")  # fmt: skip
    if not 1 <= options.width <= MAX_WIDTH:
        raise UsageError(f"--width {options.width} must be from 1 to {MAX_WIDTH}")
    if options.width < dense:
        raise UsageError(
            f"--width {options.width}: layer {layers[0]} of the source is dense and has {counted(dense, 'neuron')}, "
            "and all layers of the result have one width",
            hint=f"Pass --width {dense} or more.",
        )
    return DenseWidth(options.width, shared, dense)
