"""GroupNormalization in the form that ONNX Runtime runs fastest and that old parsers know."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantempo.export.passes.base import GraphPass, Violation
from quantempo.export.passes.edit import (
    add_constant,
    attribute,
    drop_node,
    insert_node,
    is_initializer,
    replace_value,
    static_shape,
)


class GroupNormToInstanceNorm(GraphPass):
    """No GroupNormalization with stored scale and bias: Reshape, InstanceNormalization, Reshape, BatchNormalization.

    ONNX Runtime expands the operator into small functions on the CPU; TensorRT reads it from 10.9 on only.  The batch
    normalization has mean 0, variance 1 and no epsilon: it is `x * scale + bias` per channel in one pass over memory.
    """

    def apply(self, model: ir.Model) -> int:
        return sum(_rewrite(model.graph, node) for node in list(model.graph) if node.op_type == "GroupNormalization")

    def ensures(self, model: ir.Model) -> None:
        left = sum(node.op_type == "GroupNormalization" for node in model.graph)
        if left:
            raise Violation(f"{left} GroupNormalization nodes")


def _rewrite(graph: ir.Graph, node: ir.Node) -> int:
    source, shape = node.inputs[0], static_shape(node.inputs[0])
    if source is None or shape is None or None in shape[1:] or not all(map(is_initializer, node.inputs[1:])):
        return 0
    groups, channels = int(attribute(node, "num_groups", 1)), shape[1]
    assert channels is not None
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
    mean = add_constant(graph, np.zeros(channels, np.float32), "constant")
    variance = add_constant(graph, np.ones(channels, np.float32), "constant")
    affine = [value, *node.inputs[1:3], mean, variance]
    value = insert_node(node, "BatchNormalization", affine, {"epsilon": 0.0}).outputs[0]
    value.shape = source.shape
    replace_value(node.outputs[0], value, keep_name=True)
    drop_node(node)
    return 1
