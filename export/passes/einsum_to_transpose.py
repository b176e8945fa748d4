"""Einsum of one operand that only reorders dimensions."""

from __future__ import annotations

import onnx_ir as ir

from quantempo.export.passes.base import GraphPass
from quantempo.export.passes.edit import attribute, drop_node, insert_node, replace_value


class EinsumToTranspose(GraphPass):
    """An Einsum that only permutes is a Transpose."""

    def apply(self, model: ir.Model) -> int:
        changed = 0
        for node in list(model.graph):
            if node.op_type != "Einsum" or len(node.inputs) != 1:
                continue
            taken, arrow, given = str(attribute(node, "equation", "")).replace(" ", "").partition("->")
            if not arrow or sorted(taken) != sorted(given) or len(set(taken)) != len(taken):
                continue
            perm = [taken.index(letter) for letter in given]
            replace_value(node.outputs[0], insert_node(node, "Transpose", node.inputs, {"perm": perm}).outputs[0])
            drop_node(node)
            changed += 1
        return changed
