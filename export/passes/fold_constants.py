"""Constant folding: what does not depend on the graph's inputs is computed now."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantempo.export.passes.base import GraphPass, Violation
from quantempo.export.passes.edit import add_constant, drop_node, replace_value
from quantempo.export.passes.evaluate import Array, Evaluator, Size

SAME_TYPE = {"Reshape", "Transpose", "Mul", "Add", "Div", "MatMul", "Softmax", "Sqrt", "Unsqueeze"}


class FoldConstants(GraphPass):
    """No Constant nodes, and no node whose inputs are all constant (weights apart).

    Shapes given to Reshape become constants too: at most one dimension depends on the batch, and it is written -1.
    """

    def apply(self, model: ir.Model) -> int:
        graph, evaluator, changed = model.graph, Evaluator(), 0
        for node in list(graph):
            if node.op_type == "Constant":
                changed += _lift(graph, node)
                continue
            _carry_type(node)
            result = evaluator.visit(node)
            if result is not None and result.dtype != object and not node.outputs[0].is_graph_output():
                value = add_constant(graph, result, "constant")
                replace_value(node.outputs[0], value)
                drop_node(node)
                changed += 1
            elif node.op_type == "Reshape":
                changed += _fix_target(graph, node, evaluator.value(node.inputs[1]))
        return changed

    def ensures(self, model: ir.Model) -> None:
        left = [node.op_type for node in model.graph if node.op_type == "Constant"]
        if left:
            raise Violation(f"{len(left)} Constant nodes")


def _carry_type(node: ir.Node) -> None:
    """The exporter leaves inner values without a type; CastLike asks for it."""
    source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
    if node.op_type in SAME_TYPE and output.dtype is None and source is not None and source.dtype is not None:
        output.dtype = source.dtype


def _lift(graph: ir.Graph, node: ir.Node) -> int:
    (attribute,) = node.attributes.values()
    if attribute.name == "value":
        array: Array = np.asarray(attribute.value.numpy())
    elif attribute.name in ("value_int", "value_ints"):
        array = np.asarray(attribute.value, np.int64)
    elif attribute.name in ("value_float", "value_floats"):
        array = np.asarray(attribute.value, np.float32)
    else:
        return 0
    replace_value(node.outputs[0], add_constant(graph, array, "constant"))
    drop_node(node)
    return 1


def _fix_target(graph: ir.Graph, node: ir.Node, target: Array | None) -> int:
    if target is None or target.dtype != object:
        return 0
    free = [i for i, item in enumerate(target) if isinstance(item, Size)]
    if len(free) != 1 or any(item == -1 for item in target):
        # A second free dimension: [batch, -1, ...] is fine once the batch is taken over by position.
        if free == [0] and isinstance(target[0], Size) and _starts_with_batch(node, target[0]):
            return _set_target(graph, node, [0, *map(int, target[1:])])
        return 0
    return _set_target(graph, node, [-1 if i in free else int(item) for i, item in enumerate(target)])


def _starts_with_batch(node: ir.Node, size: Size) -> bool:
    source = node.inputs[0]
    if source is None or source.shape is None or not len(source.shape):
        return False
    first = source.shape[0]
    return size.factor == 1 and not isinstance(first, int) and "*" not in str(first.value)


def _set_target(graph: ir.Graph, node: ir.Node, target: list[int]) -> int:
    output = node.outputs[0]
    if 0 in target and output.shape is not None and all(isinstance(d, int) for d in list(output.shape)[1:]):
        # Every other dimension is known, so the batch can be the one that is worked out.
        target = [-1, *(int(d) for d in list(output.shape)[1:])]  # type: ignore[arg-type]
    node.replace_input_with(1, add_constant(graph, np.asarray(target, np.int64), "shape"))
    node.attributes.pop("allowzero", None)
    return 1
