"""The pure functions that items name. A kernel is found by its name, and imported when a plan uses it.

A kernel takes the raw bytes of the inputs and returns the raw bytes of the outputs. It gets dtypes and shapes, but not
the roles of tensors. `copy` is not a kernel: the executor moves those bytes from file to file without making tensors of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from moeconv.errors import InputError, escape
from moeconv.plan.plan import Input, Params, TensorSpec

Buffer = bytearray | memoryview | bytes
Kernel = Callable[[Sequence[tuple[Input, Buffer]], Sequence[TensorSpec], Params], Sequence[Buffer]]

# kernel name -> module and function
_WHERE = {
    "cast": "moeconv.plan.kernels.elementwise:cast",
    "fill": "moeconv.plan.kernels.elementwise:fill",
    "constant": "moeconv.plan.kernels.elementwise:constant",
    "compute": "moeconv.plan.kernels.layout:compute",
    "draw_normal": "moeconv.plan.kernels.draw:draw_normal",
    "add_noise": "moeconv.plan.kernels.draw:add_noise",
    "redraw_neurons": "moeconv.plan.kernels.draw:redraw_neurons",
    "decode": "moeconv.plan.kernels.quantized:decode_kernel",
    "chain": "moeconv.plan.kernels.chain:chain",
    "gather": "moeconv.plan.kernels.chain:gather",
    "pack_int": "moeconv.plan.kernels.quantized:pack_int_kernel",
    "pack_bnb4": "moeconv.plan.kernels.quantized:pack_bnb4_kernel",
    "pack_bnb4_slice": "moeconv.plan.kernels.quantized:pack_bnb4_slice_kernel",
    "pack_bnb8": "moeconv.plan.kernels.quantized:pack_bnb8_kernel",
    "pack_mlx": "moeconv.plan.kernels.quantized:pack_mlx_kernel",
    "pack_float8": "moeconv.plan.kernels.compressed:pack_float8_kernel",
    "pack_float8_blocks": "moeconv.plan.kernels.compressed:pack_float8_blocks_kernel",
    "pack_int8_rows": "moeconv.plan.kernels.compressed:pack_int8_rows_kernel",
    "pack_mxfp8": "moeconv.plan.kernels.compressed:pack_mxfp8_kernel",
    "pack_mxfp4": "moeconv.plan.kernels.compressed:pack_mxfp4_kernel",
    "pack_mxfp4_blocks": "moeconv.plan.kernels.compressed:pack_mxfp4_blocks_kernel",
    "pack_nvfp4": "moeconv.plan.kernels.compressed:pack_nvfp4_kernel",
    "nvfp4_from_modelopt": "moeconv.plan.kernels.compressed:nvfp4_from_modelopt",
    "pack_int4_asymmetric": "moeconv.plan.kernels.compressed:pack_int4_asymmetric_kernel",
    "pick_neurons": "moeconv.plan.kernels.neurons:pick_neurons",
    "copied_rows": "moeconv.plan.kernels.router_rows:copied_rows",
    "gguf": "moeconv.plan.kernels.ggml:gguf_kernel",
    "from_gguf": "moeconv.plan.kernels.ggml:from_gguf_kernel",
}
_TORCH = ("moeconv.plan.kernels.quantized", "moeconv.plan.kernels.compressed")


def load_kernel(name: str) -> Kernel:
    """The function of a kernel. Its name is a key of the table or "module:function". Raises KeyError for any other
    name, InputError for a module or function of another package that cannot be loaded."""
    module, _, function = (name if ":" in name else _WHERE[name]).partition(":")
    try:
        kernel: Kernel = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the kernel {escape(name)} cannot be loaded: {escape(error)}",
            hint="Update or remove the package that adds the format with this kernel.",
        ) from error
    return kernel


def needs_torch(name: str, params: Params) -> bool:
    """Whether a kernel, or one that it runs itself, imports torch, which takes some 200 MB of memory. True for every
    kernel of another package."""
    inner = [params.get("first"), params.get("then"), *(part["first"] for part in params.get("firsts", ()))]
    if any(one is not None and needs_torch(one["kernel"], one["params"]) for one in inner):
        return True
    return ":" in name or (name in _WHERE and _WHERE[name].partition(":")[0] in _TORCH)


__all__ = ["Buffer", "Kernel", "load_kernel", "needs_torch"]
