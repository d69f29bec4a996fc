"""Two kernels as one, for plans that were fused: what the first makes never leaves memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeconv.plan.kernels import Buffer, load_kernel
from moeconv.plan.plan import Input, TensorSpec


def chain(
    inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Mapping[str, Any]
) -> Sequence[Buffer]:
    """The kernel `then` on what `first` makes. params: first and then (kernel, params), between."""
    name, dtype, shape = params["between"]
    spec = TensorSpec(name, dtype, tuple(shape), "", 0)
    first, then = params["first"], params["then"]
    if first["kernel"] == "copy":
        data: Buffer = bytearray(b"".join(part for _, part in inputs))
    else:
        (data,) = load_kernel(first["kernel"])(inputs, (spec,), first["params"])
    made = Input(spec.name, spec.dtype, spec.shape, 0, spec.nbytes)
    return load_kernel(then["kernel"])([(made, bytearray(data))], outputs, then["params"])
