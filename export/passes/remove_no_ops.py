"""Nodes that return their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantempo.export.passes.base import GraphPass, Violation
from quantempo.export.passes.edit import (
    add_constant,
    attribute,
    const_array,
    drop_node,
    producer,
    replace_value,
    same_shape,
    scalar,
)


class RemoveNoOps(GraphPass):
    """No Identity, no inference Dropout, and no Cast, Reshape, Slice, Transpose, Mul, Div or Expand without effect.

    Exact to the last bit: a factor is dropped only if it is exactly 1, a slice only if it takes everything.  An added
    zero stays (-0 + 0 is 0, and tiny summands such as an epsilon are nobody's to drop).
    """

    def apply(self, model: ir.Model) -> int:
        changed = 0
        for node in list(model.graph):
            kept = RULES[node.op_type](node) if node.op_type in RULES else None
            if kept is None:
                continue
            output = node.outputs[0]
            if output.is_graph_output() and (kept.is_graph_input() or kept.is_initializer() or kept.is_graph_output()):
                continue
            replace_value(output, kept)
            drop_node(node)
            changed += 1
        return changed + sum(_compose(model.graph, node) for node in list(model.graph) if node.graph is not None)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "Identity" and not node.outputs[0].is_graph_output():
                raise Violation(f"an Identity, {node.name!r}")


def _first(node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _cast(node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    same = source is not None and source.dtype is not None and int(source.dtype) == attribute(node, "to", None)
    return source if same else None


def _reshape(node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    return source if source is not None and same_shape(source, node.outputs[0]) else None


def _slice(node: ir.Node) -> ir.Value | None:
    if len(node.inputs) < 4:
        return None
    source = node.inputs[0]
    starts, ends, axes = (const_array(value) for value in node.inputs[1:4])
    steps = const_array(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    if source is None or starts is None or ends is None or axes is None or steps is None:
        return None
    if np.any(starts != 0) or np.any(steps != 1):
        return None
    for end, axis in zip(ends, axes, strict=True):
        size = source.shape[int(axis)] if source.shape is not None else None
        if int(end) < (size if isinstance(size, int) else np.iinfo(np.int64).max):
            return None
    return source


def _transpose(node: ir.Node) -> ir.Value | None:
    perm = attribute(node, "perm", None)
    return node.inputs[0] if perm is not None and list(perm) == list(range(len(perm))) else None


def _unit(value: ir.Value | None, other: ir.Value | None, output: ir.Value) -> bool:
    """Whether `value` is one everywhere and does not widen the result."""
    if value is None or other is None:
        return False
    spread = producer(value, "Expand")
    if scalar(spread.inputs[0] if spread is not None else value) != 1.0:
        return False
    return same_shape(other, output) or (spread is None and value.shape is not None and len(value.shape) == 0)


def _mul(node: ir.Node) -> ir.Value | None:
    a, b = node.inputs
    if _unit(b, a, node.outputs[0]):
        return a
    return b if _unit(a, b, node.outputs[0]) else None


def _div(node: ir.Node) -> ir.Value | None:
    a, b = node.inputs
    return a if _unit(b, a, node.outputs[0]) else None


RULES: dict[str, Callable[[ir.Node], ir.Value | None]] = {
    "Identity": _first,
    "Dropout": _first,
    "Cast": _cast,
    "Reshape": _reshape,
    "Expand": _reshape,
    "Slice": _slice,
    "Transpose": _transpose,
    "Mul": _mul,
    "Div": _div,
}


def _compose(graph: ir.Graph, node: ir.Node) -> int:
    """Join a node with its producer: Reshape of Reshape, Unsqueeze of Unsqueeze, Transpose of Transpose."""
    if node.op_type not in ("Reshape", "Unsqueeze", "Transpose"):
        return 0
    inner = producer(node.inputs[0], node.op_type)
    if inner is None or inner.inputs[0] is None:
        return 0
    if node.op_type == "Transpose":
        first, second = attribute(inner, "perm", None), attribute(node, "perm", None)
        if first is None or second is None:
            return 0
        node.attributes["perm"] = ir.AttrInt64s("perm", [first[i] for i in second])
    elif node.op_type == "Reshape":
        target = const_array(node.inputs[1])
        if target is None or np.any(target == 0):
            return 0
    else:
        first_axes, second_axes = const_array(inner.inputs[1]), const_array(node.inputs[1])
        rank = len(node.outputs[0].shape) if node.outputs[0].shape is not None else None
        if first_axes is None or second_axes is None or rank is None:
            return 0
        node.replace_input_with(1, _joined_axes(graph, np.atleast_1d(first_axes), np.atleast_1d(second_axes), rank))
    node.replace_input_with(0, inner.inputs[0])
    if not inner.outputs[0].uses() and not inner.outputs[0].is_graph_output():
        drop_node(inner)
    return 1


def _joined_axes(graph: ir.Graph, first: NDArray[Any], second: NDArray[Any], rank: int) -> ir.Value:
    """Axes of one Unsqueeze that does what two did: the first's axes move up past the second's."""
    last = {int(a) % rank for a in second}
    places = [i for i in range(rank) if i not in last]
    inner_rank = len(places)
    axes = sorted(last | {places[int(a) % inner_rank] for a in first})
    return add_constant(graph, np.asarray(axes, np.int64), "axes")
