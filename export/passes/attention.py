"""Decomposed attention, tidied: one Transpose for the keys, one scale for the queries.

The exporter turns attention into Reshape, Transpose, Reshape around the keys and multiplies queries and keys by the
root of the scale each.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantempo.export.passes.base import GraphPass
from quantempo.export.passes.edit import (
    add_constant,
    attribute,
    const_array,
    drop_node,
    insert_node,
    producer,
    replace_value,
    scalar,
    sole_reader,
    static_shape,
)


class CollapseTransposes(GraphPass):
    """Reshape to three dimensions, Transpose of the last two and Reshape back is one Transpose."""

    def apply(self, model: ir.Model) -> int:
        return sum(_collapse(node) for node in list(model.graph) if node.op_type == "Transpose")


class MergeAttentionScales(GraphPass):
    """MatMul(a·c, b·d) with constant scalars is MatMul(a·(c·d), b): one pass over the queries, none over the keys.

    Exact where c and d are powers of two (head sizes 16, 64, 256), within one rounding of the product elsewhere.
    """

    def apply(self, model: ir.Model) -> int:
        return sum(_merge(model.graph, node) for node in list(model.graph) if node.op_type == "MatMul")


def _collapse(node: ir.Node) -> int:
    if tuple(attribute(node, "perm", ())) != (0, 2, 1):
        return 0
    flat, back = producer(node.inputs[0], "Reshape"), sole_reader(node.outputs[0], "Reshape")
    if flat is None or back is None or flat.inputs[0] is None:
        return 0
    source, inner, outer = flat.inputs[0], const_array(flat.inputs[1]), const_array(back.inputs[1])
    shape = static_shape(source)
    if inner is None or outer is None or shape is None or len(shape) < 3 or len(inner) != 3 or None in shape[1:]:
        return 0
    wanted = [*shape[1:-2], shape[-1], shape[-2]]
    if list(inner) != [-1, shape[-2], shape[-1]] or list(outer[1:]) != wanted or int(outer[0]) not in (-1, shape[0]):
        return 0
    rank = len(shape)
    perm = [*range(rank - 2), rank - 1, rank - 2]
    swap = insert_node(back, "Transpose", [source], {"perm": perm}).outputs[0]
    assert source.shape is not None
    swap.shape = ir.Shape([source.shape[axis] for axis in perm])
    replace_value(back.outputs[0], swap)
    for dead in (back, node):
        drop_node(dead)
    return 1


def _scaled(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """(x, c) where the value is x·c for a constant scalar c and nothing else reads it."""
    node = producer(value, "Mul")
    if node is None or sole_reader(node.outputs[0]) is None:
        return None
    for factor, other in (node.inputs, reversed(node.inputs)):
        number = scalar(factor)
        if number is not None and other is not None and factor is not None:
            return other, number
    return None


def _merge(graph: ir.Graph, node: ir.Node) -> int:
    left, right = _scaled(node.inputs[0]), _scaled(node.inputs[1])
    if left is None or right is None:
        return 0
    factor = add_constant(graph, np.asarray(left[1] * right[1], np.float32), "scale")
    query = insert_node(node, "Mul", [left[0], factor])
    query.outputs[0].shape = left[0].shape
    dead = [value.producer() for value in node.inputs if value is not None]
    node.replace_input_with(0, query.outputs[0])
    node.replace_input_with(1, right[0])
    for old in dead:
        if old is not None:
            drop_node(old)
    return 1
