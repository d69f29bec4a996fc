"""The kernel that evaluates an expression: it moves rows and columns exactly, computes in float32, and rounds once.

An expression is [op, params, children] as JSON; ["input", {"index": i}, []] is the i-th input of the item. Arithmetic
works on blocks of rows, so that temporaries stay small for tensors of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moeconv.checkpoint.header import tensor_nbytes
from moeconv.errors import InputError
from moeconv.plan.kernels import Buffer, Kernel
from moeconv.plan.kernels.arrays import from_float, raw_bytes, to_float32
from moeconv.plan.kernels.draw import add_noise, redraw_neurons
from moeconv.plan.plan import Input, Params, TensorSpec
from moeconv.randomness import generator

_BLOCK = 1 << 18  # elements in float32 at a time
_BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64, "I32": np.int32, "I64": np.int64}
_ARITHMETIC = ("scale", "scale_rows", "add", "negative_exp", "centre", "unit_rows", "low_rank")
_SHORTEST = 1e-12  # the length by which torch's normalize divides shorter rows
_EDITS: dict[str, Kernel] = {"add_noise": add_noise, "redraw_neurons": redraw_neurons}

Tree = Sequence[Any]  # [op, params, children]: JSON whose types differ by position
Bits = tuple[np.ndarray, str]  # raw values as unsigned integers, and the dtype that they stand for


def compute(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """The output that the expression params["tree"] describes, in the dtype of the output."""
    (spec,) = outputs
    evaluate = _Evaluation(inputs, spec.dtype)
    result = bytearray(tensor_nbytes(spec.dtype, spec.shape))
    tree = params["tree"]
    done = size = 0
    previous: Tree | None = None
    for piece in tree[2] if tree[0] == "concat" and not tree[1].get("axis") else [tree]:
        if piece == previous:  # copies of one expert are computed once
            result[done : done + size] = result[done - size : done]
            done += size
            continue
        start, previous = done, piece
        for data in evaluate.encoded(piece):
            result[done : done + len(data)] = data
            done += len(data)
        size = done - start
    if done != len(result):
        raise ValueError(f"{done} bytes computed for {len(result)}")
    return [result]


def _lengths(rows: np.ndarray) -> np.ndarray:
    """The length of each row, float64 [n, 1]."""
    lengths: np.ndarray = np.sqrt(np.square(rows, dtype=np.float64).sum(1, keepdims=True))
    return lengths


class _Evaluation:
    """The evaluation of an expression over the inputs of one item."""

    def __init__(self, inputs: Sequence[tuple[Input, Buffer]], dtype: str) -> None:
        self.inputs, self.dtype = inputs, dtype

    def encoded(self, tree: Tree) -> Iterator[memoryview]:
        """The raw bytes of a node in the output's dtype, block by block."""
        if tree[0] not in _ARITHMETIC:
            array, dtype = self.whole(tree)
            if dtype == self.dtype:
                yield raw_bytes(array)
                return
        for block in self.blocks(tree):
            yield from_float(block, self.dtype)

    def blocks(self, tree: Tree) -> Iterator[np.ndarray]:
        """The rows of a node in float32 (or float64 where the source has that), a few at a time."""
        op, params, of = tree
        if op not in _ARITHMETIC:
            array, dtype = self.whole(tree)
            step = max(1, _BLOCK // max(1, math.prod(array.shape[1:])))
            for start in range(0, len(array), step):
                part = array[start : start + step]
                yield to_float32(raw_bytes(part), dtype, part.shape)
            return
        change = self._arithmetic(op, params, of)
        row = 0
        for block in self.blocks(of[0]):
            yield change(block, row)
            row += len(block)

    def _arithmetic(self, op: str, params: Params, of: Sequence[Tree]) -> Callable[[np.ndarray, int], np.ndarray]:
        """One operation as a function: (rows, number of the first row) -> rows."""
        if op == "scale":
            return lambda x, _row: (x * np.float64(params["by"])).astype(x.dtype)
        if op == "add":
            return lambda x, _row: (x + np.float64(params["what"])).astype(x.dtype)
        if op == "negative_exp":
            return lambda x, _row: (-np.exp(x.astype(np.float64))).astype(x.dtype)
        if op == "unit_rows":
            return lambda x, _row: (x / np.maximum(_lengths(x), _SHORTEST)).astype(x.dtype)
        if op == "low_rank":
            left, right = (np.concatenate(list(self.blocks(child))).astype(np.float64) for child in of[1:])
            return lambda x, row: (x + params["by"] * (left[row : row + len(x)] @ right)).astype(x.dtype)
        if op == "scale_rows":

            def scaled(x: np.ndarray, row: int) -> np.ndarray:
                inside = np.arange(row, row + len(x)) % params["head"]
                factor = np.where((inside >= params["start"]) & (inside < params["stop"]), params["by"], 1.0)
                return (x * factor.reshape(-1, *[1] * (x.ndim - 1))).astype(x.dtype)

            return scaled
        if params["axis"] == 1:
            return lambda x, _row: (x - x.mean(1, keepdims=True, dtype=np.float64)).astype(x.dtype)
        total: np.ndarray | float = 0.0
        rows = 0
        for block in self.blocks(of[0]):
            total = total + block.sum(0, dtype=np.float64)
            rows += len(block)
        mean = total / max(1, rows)
        return lambda x, _row: (x - mean).astype(x.dtype)

    def whole(self, tree: Tree) -> Bits:
        """All values of a node: the unchanged bits of the source if they are only moved, otherwise float32."""
        op, params, of = tree
        if op == "input":
            ref, data = self.inputs[params["index"]]
            return np.frombuffer(data, _BITS[ref.dtype]).reshape(ref.shape), ref.dtype
        if op == "fill":
            data = from_float(np.full(params["shape"], params["value"], np.float32), self.dtype)
            return np.frombuffer(data, _BITS[self.dtype]).reshape(params["shape"]), self.dtype
        if op in _ARITHMETIC:
            parts = list(self.blocks(tree))
            array = parts[0] if len(parts) == 1 else np.concatenate(parts)
            dtype = "F64" if array.dtype == np.float64 else "F32"
            return array.view(_BITS[dtype]), dtype
        if op in _EDITS:
            return self._edited(op, params, of[0])
        if op == "take":
            (array, dtype), (indices, _) = self.whole(of[0]), self.whole(of[1])
            return _taken(array, indices.reshape(-1), params["axis"]), dtype
        children = self._alike([self.whole(child) for child in of])
        return _MOVES[op]([array for array, _ in children], params), children[0][1]

    def _edited(self, op: str, params: Params, child: Tree) -> Bits:
        """A matrix after one of the kernels that draw random numbers, which round to the output's dtype."""
        array, dtype = self.whole(child)
        data = raw_bytes(array)
        ref = Input("", dtype, array.shape, 0, len(data))
        spec = TensorSpec("", self.dtype, array.shape, "", 0)
        (made,) = _EDITS[op]([(ref, data)], [spec], params)
        return np.frombuffer(made, _BITS[self.dtype]).reshape(array.shape), self.dtype

    def _alike(self, parts: list[Bits]) -> list[Bits]:
        """The parts in one dtype: their own where all have the same, else that of the output."""
        if len({dtype for _, dtype in parts}) == 1:
            return parts
        result: list[Bits] = []
        for array, dtype in parts:
            data = from_float(to_float32(raw_bytes(array), dtype, array.shape), self.dtype)
            result.append((np.frombuffer(data, _BITS[self.dtype]).reshape(array.shape), self.dtype))
        return result


def rotary_order(head: int, start: int, size: int, order: str) -> np.ndarray:
    """The permutation of `head` rows with new[i] = old[result[i]] within one head; see `families.node.rotary`."""
    rows = np.arange(head)
    rotated = rows[start : start + size]
    if order == "half":
        rows[start : start + size] = np.concatenate([rotated[0::2], rotated[1::2]])
    elif order == "interleaved":
        rows[start : start + size] = np.stack(np.split(rotated, 2), 1).reshape(-1)
    else:  # spread: the halves of the rotated rows next to the halves of the other rows
        (a, b), (c, d) = np.split(rotated, 2), np.split(np.delete(rows, np.arange(start, start + size)), 2)
        rows = np.concatenate([a, c, b, d])
    return rows


def _rotary(of: Sequence[np.ndarray], params: Params) -> np.ndarray:
    (array,) = of
    inside = rotary_order(params["head"], params["start"], params["size"], params["order"])
    heads = array.reshape(-1, params["head"], *array.shape[1:])
    return heads[:, inside].reshape(array.shape)


def _cut(of: Sequence[np.ndarray], params: Params) -> np.ndarray:
    where = [slice(None)] * params["axis"] + [slice(params["start"], params["stop"])]
    return of[0][tuple(where)]


def _deal(of: Sequence[np.ndarray], params: Params) -> np.ndarray:
    order = generator(params["key"]).permutation(of[0].shape[params["axis"]])
    return np.take(of[0], order[params["start"] : params["stop"]], axis=params["axis"])


def _taken(array: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    if indices.size and not 0 <= indices.min() <= indices.max() < array.shape[axis]:
        raise InputError(
            f"the measured choice names neuron {indices.max()}, and the FFN has {array.shape[axis]} neurons",
            hint="The measurement belongs to another model. Measure again on this one.",
        )
    return np.take(array, indices, axis=axis)


_MOVES: dict[str, Callable[[Sequence[np.ndarray], Params], np.ndarray]] = {
    "concat": lambda of, params: np.concatenate(of, params.get("axis", 0)),
    "interleave": lambda of, _params: np.stack(of, 1).reshape(-1, *of[0].shape[1:]),
    "transpose": lambda of, _params: of[0].T,
    "reshape": lambda of, params: of[0].reshape(params["shape"]),
    "permute": lambda of, params: of[0].transpose(params["axes"]),
    "rotary": _rotary,
    "cut": _cut,
    "every": lambda of, params: of[0][params["first"] :: params["step"]],
    "deal": _deal,
}
