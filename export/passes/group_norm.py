"""GroupNormalization in the form that ONNX Runtime runs fastest and that old parsers know."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantempo.export.passes.base import GraphPass, Violation
from quantempo.export.passes.edit import (
    add_constant,
    attribute,
    const_array,
    drop_node,
    insert_node,
    replace_value,
    static_shape,
)


class GroupNormToInstanceNorm(GraphPass):
    """No GroupNormalization with stored scale and bias: Reshape, InstanceNormalization, Reshape, Mul, Add.

    ONNX Runtime expands the operator into small functions on the CPU; TensorRT reads it from 10.9 on only.
    """

    def apply(self, model: ir.Model) -> int:
        return sum(_rewrite(model.graph, node) for node in list(model.graph) if node.op_type == "GroupNormalization")

    def ensures(self, model: ir.Model) -> None:
        left = sum(node.op_type == "GroupNormalization" for node in model.graph)
        if left:
            raise Violation(f"{left} GroupNormalization nodes")


def _rewrite(graph: ir.Graph, node: ir.Node) -> int:
    source, scale, bias = node.inputs[0], const_array(node.inputs[1]), const_array(node.inputs[2])
    shape = static_shape(source)
    if source is None or scale is None or bias is None or shape is None or None in shape[1:]:
        return 0
    groups, channels = int(attribute(node, "num_groups", 1)), len(scale)
    spread = (channels, *[1] * (len(shape) - 2))
    split = add_constant(graph, np.asarray([0, groups, -1], np.int64), "shape")
    whole = add_constant(graph, np.asarray([-1, *shape[1:]], np.int64), "shape")
    one = add_constant(graph, np.ones(groups, np.float32), "constant")
    zero = add_constant(graph, np.zeros(groups, np.float32), "constant")
    flat = insert_node(node, "Reshape", [source, split]).outputs[0]
    assert source.shape is not None
    size = int(np.prod([d for d in shape[1:] if d is not None])) // groups
    flat.shape = ir.Shape([source.shape[0], groups, size])
    epsilon = {"epsilon": float(attribute(node, "epsilon", 1e-5))}
    normal = insert_node(node, "InstanceNormalization", [flat, one, zero], epsilon).outputs[0]
    normal.shape = flat.shape
    value = insert_node(node, "Reshape", [normal, whole]).outputs[0]
    value.shape = source.shape
    for op, array in (("Mul", scale), ("Add", bias)):
        name = f"{node.inputs[1 if op == 'Mul' else 2].name}_spread"  # type: ignore[union-attr]
        value = insert_node(node, op, [value, add_constant(graph, array.reshape(spread), name)]).outputs[0]
        value.shape = source.shape
    replace_value(node.outputs[0], value)
    drop_node(node)
    return 1
