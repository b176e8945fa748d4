"""The approximate GELU by a sigmoid, where OpenVINO computes it apart from the product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantempo.export.passes.base import GraphPass
from quantempo.export.passes.edit import add_constant, attribute, drop_node, insert_node, producer, replace_value

CUBIC = 0.044715
SLOPE = float(2 * np.sqrt(2 / np.pi))


class GeluAsSigmoid(GraphPass):
    """No approximate Gelu reads a product with a looked-up scale: `x · sigmoid(2 √(2/π) (x + 0.044715 x³))`.

    With constant scales OpenVINO computes GELU within the product's kernel.  It cannot do so behind a factor that is
    looked up; in the pointwise kernel that it makes then, a sigmoid costs less than the `tanh` of its own GELU.
    """

    def apply(self, model: ir.Model) -> int:
        return sum(_rewrite(model.graph, node) for node in list(model.graph) if node.op_type == "Gelu")


def _rewrite(graph: ir.Graph, node: ir.Node) -> int:
    x = node.inputs[0]
    if x is None or attribute(node, "approximate", "none") != "tanh" or not _scaled_at_run_time(x):
        return 0

    def step(operator: str, *operands: ir.Value) -> ir.Value:
        made = insert_node(node, operator, operands).outputs[0]
        made.shape = x.shape
        return made

    slope, cubic = (add_constant(graph, np.asarray(number, np.float32), "gelu") for number in (SLOPE, SLOPE * CUBIC))
    inner = step("Mul", x, step("Add", step("Mul", step("Mul", x, x), cubic), slope))
    replace_value(node.outputs[0], step("Mul", x, step("Sigmoid", inner)), keep_name=True)
    drop_node(node)
    return 1


def _scaled_at_run_time(value: ir.Value) -> bool:
    """Whether the value is `product · factor [+ bias]` with a single computed factor."""
    add = producer(value, "Add")
    for operand in [value] if add is None else list(add.inputs):
        scaling = producer(operand, "Mul")
        if scaling is not None and producer(scaling.inputs[0], "MatMul") is not None:
            factor = scaling.inputs[1]
            return factor is not None and not factor.is_initializer() and _is_single(factor)
    return False


def _is_single(value: ir.Value) -> bool:
    return value.shape is not None and all(size == 1 for size in value.shape)
