"""The pure functions that an Item may name, found by name and imported only when a plan uses them.

A kernel takes the inputs' raw bytes and gives the outputs' raw bytes; it sees dtypes and shapes, never names.
`copy` is not here: the loop moves those bytes from file to file without making tensors of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from moeconv.errors import InputError, escape
from moeconv.plan.plan import Input, TensorSpec

Buffer = bytearray | memoryview | bytes
Kernel = Callable[[Sequence[tuple[Input, Buffer]], Sequence[TensorSpec], Mapping[str, Any]], Sequence[Buffer]]

# kernel name -> module and function
_WHERE = {
    "cast": "moeconv.plan.kernels.elementwise:cast",
    "fill": "moeconv.plan.kernels.elementwise:fill",
    "compute": "moeconv.plan.kernels.layout:compute",
    "draw_normal": "moeconv.plan.kernels.draw:draw_normal",
    "add_noise": "moeconv.plan.kernels.draw:add_noise",
    "redraw_neurons": "moeconv.plan.kernels.draw:redraw_neurons",
    "decode": "moeconv.plan.kernels.quantized:decode_kernel",
    "chain": "moeconv.plan.kernels.chain:chain",
    "pack_int": "moeconv.plan.kernels.quantized:pack_int_kernel",
    "pack_bnb4": "moeconv.plan.kernels.quantized:pack_bnb4_kernel",
    "pack_bnb4_slice": "moeconv.plan.kernels.quantized:pack_bnb4_slice_kernel",
    "pack_bnb8": "moeconv.plan.kernels.quantized:pack_bnb8_kernel",
    "gguf": "moeconv.plan.kernels.ggml:gguf_kernel",
}
_TORCH = ("moeconv.plan.kernels.quantized",)


def load_kernel(name: str) -> Kernel:
    """The function behind a kernel's name: a row of the table, or "module:function". Raises KeyError for a name
    that is neither, InputError for a module or function of a package outside that is not there."""
    module, _, function = (name if ":" in name else _WHERE[name]).partition(":")
    try:
        kernel: Kernel = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the kernel {escape(name)} cannot be loaded: {escape(error)}",
            hint="A package that adds a format names it: update or remove that package.",
        ) from error
    return kernel


def needs_torch(name: str) -> bool:
    """Whether a kernel brings torch into the process, which alone takes some 200 MB: any of a package outside may."""
    return ":" in name or (name in _WHERE and _WHERE[name].partition(":")[0] in _TORCH)


__all__ = ["Buffer", "Kernel", "load_kernel", "needs_torch"]
