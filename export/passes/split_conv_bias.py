"""Convolutions without a bias of their own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantempo.export.passes.base import GraphPass, Violation
from quantempo.export.passes.edit import add_constant, const_array, drop_node, insert_node, replace_value


class SplitConvBias(GraphPass):
    """No Conv with a bias input: Conv, then Add of a stored [1, C, 1, 1].

    With a scale that is looked up at run time the bias cannot be stored as an integer, so an engine would not fuse a
    quantized Conv that has one.  In a float graph engines fuse the Add back.
    """

    def apply(self, model: ir.Model) -> int:
        changed = 0
        for node in list(model.graph):
            if node.op_type != "Conv" or len(node.inputs) < 3 or node.inputs[2] is None:
                continue
            bias, weight = const_array(node.inputs[2]), node.inputs[1]
            if bias is None or weight is None or weight.shape is None:
                continue
            plain = insert_node(node, "Conv", node.inputs[:2])
            plain.attributes.update(node.attributes)
            plain.outputs[0].shape = node.outputs[0].shape
            spread = bias.reshape(1, -1, *[1] * (len(weight.shape) - 2))
            stored = add_constant(model.graph, np.asarray(spread), f"{node.inputs[2].name}_spread")
            replace_value(node.outputs[0], insert_node(node, "Add", [plain.outputs[0], stored]).outputs[0])
            drop_node(node)
            changed += 1
        return changed

    def ensures(self, model: ir.Model) -> None:
        left = [node for node in model.graph if node.op_type == "Conv" and len(node.inputs) > 2]
        if left:
            raise Violation(f"{len(left)} Conv nodes with a bias")
