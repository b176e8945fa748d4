"""Evaluation of constant and shape arithmetic, with the batch size as the one unknown.

Shape tensors of a graph with a dynamic batch hold whole numbers and multiples of the batch size.  `Size` is such a
multiple; arrays that hold one have dtype object, and numpy moves them about like any other item.  Transcendental
functions go through torch, whose arithmetic the graph is checked against.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from quantempo.export.passes.edit import attribute

Array = NDArray[Any]
Handler = Callable[[ir.Node, Sequence[Any]], Array]
LIMIT = 1 << 22
"""Constants with more elements than this are weights: they are not computed with here."""


class Unknown(Exception):
    """The result cannot be told before the graph runs."""


@dataclass(frozen=True)
class Size:
    """`factor` times the batch size."""

    factor: int

    def __mul__(self, other: object) -> Size:
        if isinstance(other, (int, np.integer)):
            return Size(self.factor * int(other))
        raise Unknown

    __rmul__ = __mul__

    def __floordiv__(self, other: object) -> Size | int:
        if isinstance(other, Size) and self.factor % other.factor == 0:
            return self.factor // other.factor
        if isinstance(other, (int, np.integer)) and self.factor % int(other) == 0:
            return Size(self.factor // int(other))
        raise Unknown

    __truediv__ = __floordiv__


def dimension(value: int | ir.SymbolicDim) -> int | Size:
    """A dimension of an exported shape: a number, `batch`, or `k*batch`."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"(?:(\d+)\*)?[A-Za-z_]\w*", str(value.value or ""))
    if match is None:
        raise Unknown
    return Size(int(match.group(1) or 1))


def pack(items: Sequence[Any]) -> Array:
    """A vector of whole numbers, or of numbers and sizes."""
    if any(isinstance(item, Size) for item in items):
        array = np.empty(len(items), object)
        array[:] = items
        return array
    return np.asarray(items, np.int64)


def _shape(node: ir.Node, _inputs: Sequence[Any]) -> Array:
    source = node.inputs[0]
    if source is None or source.shape is None:
        raise Unknown
    dims = list(source.shape)[slice(attribute(node, "start", 0), attribute(node, "end", None))]
    return pack([dimension(d) for d in dims])


def _squeeze(node: ir.Node, inputs: Sequence[Any]) -> Array:
    axes = inputs[1] if len(inputs) > 1 else None
    return np.asarray(np.squeeze(inputs[0], None if axes is None else tuple(int(a) for a in axes)))


def _unsqueeze(node: ir.Node, inputs: Sequence[Any]) -> Array:
    return np.expand_dims(inputs[0], tuple(int(a) for a in np.atleast_1d(inputs[1])))


def _reshape(node: ir.Node, inputs: Sequence[Any]) -> Array:
    target = [int(d) for d in inputs[1]]
    if not attribute(node, "allowzero", 0):
        target = [inputs[0].shape[i] if d == 0 else d for i, d in enumerate(target)]
    return np.asarray(inputs[0].reshape(target))


def _slice(node: ir.Node, inputs: Sequence[Any]) -> Array:
    starts, ends = inputs[1], inputs[2]
    axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else range(len(starts))
    steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    index: list[slice] = [slice(None)] * inputs[0].ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise Unknown
        index[int(axis)] = slice(int(start), int(end), int(step))
    return np.asarray(inputs[0][tuple(index)])


def _range(node: ir.Node, inputs: Sequence[Any]) -> Array:
    start, limit, delta = (i.item() for i in inputs)
    return np.asarray(torch.arange(start, limit, delta, dtype=torch.from_numpy(np.asarray(inputs[0])).dtype).numpy())


def _cast_to(array: Array, dtype: np.dtype[Any]) -> Array:
    if array.dtype == object:
        if dtype.kind == "i":
            return array
        raise Unknown
    return array.astype(dtype)


def _cast(node: ir.Node, inputs: Sequence[Any]) -> Array:
    return _cast_to(inputs[0], ir.DataType(attribute(node, "to", 1)).numpy())


def _cast_like(node: ir.Node, inputs: Sequence[Any]) -> Array:
    like = node.inputs[1]
    if like is None or like.dtype is None:
        raise Unknown
    return _cast_to(inputs[0], like.dtype.numpy())


def _divide(node: ir.Node, inputs: Sequence[Any]) -> Array:
    a, b = inputs
    if a.dtype == object or b.dtype == object:
        return np.asarray(np.asarray(a, object) // np.asarray(b, object))
    if a.dtype.kind == "i":
        return np.asarray(np.trunc(a / b), a.dtype)
    return np.asarray(a / b, a.dtype)


def _expand(node: ir.Node, inputs: Sequence[Any]) -> Array:
    if inputs[1].dtype == object:
        raise Unknown
    shape = np.broadcast_shapes(inputs[0].shape, tuple(int(d) for d in inputs[1]))
    if int(np.prod(shape)) > LIMIT:
        raise Unknown
    return np.broadcast_to(inputs[0], shape)


def _elementwise(function: Callable[[Any, Any], Any]) -> Handler:
    def handler(node: ir.Node, inputs: Sequence[Any]) -> Array:
        result = np.asarray(function(inputs[0], inputs[1]))
        return result if result.dtype == object else result.astype(inputs[0].dtype)

    return handler


def _torch(function: Callable[[torch.Tensor], torch.Tensor]) -> Handler:
    def handler(node: ir.Node, inputs: Sequence[Any]) -> Array:
        return np.asarray(function(torch.from_numpy(np.array(inputs[0]))).numpy())

    return handler


HANDLERS: dict[str, Handler] = {
    "Shape": _shape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Slice": _slice,
    "Range": _range,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Div": _divide,
    "Expand": _expand,
    "Identity": lambda node, inputs: np.asarray(inputs[0]),
    "Concat": lambda node, inputs: np.concatenate(list(inputs), axis=int(attribute(node, "axis", 0))),
    "Gather": lambda node, inputs: np.take(inputs[0], inputs[1], axis=int(attribute(node, "axis", 0))),
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Neg": lambda node, inputs: np.asarray(-inputs[0]),
    "Sqrt": _torch(torch.sqrt),
    "Exp": _torch(torch.exp),
    "Log": _torch(torch.log),
    "Sin": _torch(torch.sin),
    "Cos": _torch(torch.cos),
}
WITHOUT_VALUES = {"Shape"}
"""Operators that ask only for the shape of their input."""


def _settle(array: Array) -> Array:
    """Plain integers where no size is left among them."""
    if array.dtype == object and not any(isinstance(item, Size) for item in array.flat):
        return array.astype(np.int64)
    return array


class Evaluator:
    """What is known of each value before the graph runs."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Array] = {}

    def value(self, value: ir.Value | None) -> Array | None:
        """The contents of a value: constants, and the results of `visit`."""
        if value is None:
            return None
        if value in self._known:
            return self._known[value]
        tensor = value.const_value
        if tensor is None or tensor.size > LIMIT:
            return None
        self._known[value] = np.asarray(tensor.numpy())
        return self._known[value]

    def visit(self, node: ir.Node) -> Array | None:
        """Evaluate a node whose inputs were visited; `None` where the result depends on the graph's inputs."""
        handler = HANDLERS.get(node.op_type)
        if handler is None or node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
            return None
        inputs: list[Array | None] = []
        if node.op_type not in WITHOUT_VALUES:
            for position, source in enumerate(node.inputs):
                known = self.value(source)
                if known is None and source is not None and not (node.op_type == "CastLike" and position == 1):
                    return None
                inputs.append(known)
        try:
            result = _settle(np.asarray(handler(node, inputs)))
        except (Unknown, TypeError, ValueError):
            return None
        self._known[node.outputs[0]] = result
        return result
