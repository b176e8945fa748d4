"""Linear layers in one form: MatMul with a stored [k, n] weight, then Add of a stored [n] bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantempo.export.passes.base import GraphPass, Violation
from quantempo.export.passes.edit import (
    add_constant,
    add_lazy_constant,
    attribute,
    const_array,
    drop_node,
    insert_node,
    is_initializer,
    replace_value,
    stored_shape,
)

TRANSPOSED = ".transposed"


class FoldWeightTransposes(GraphPass):
    """No Transpose of an initializer; the transposed weight is made when the model is written."""

    def apply(self, model: ir.Model) -> int:
        changed = 0
        for node in list(model.graph):
            source = node.inputs[0] if node.op_type == "Transpose" else None
            if source is None or not is_initializer(source):
                continue
            perm = attribute(node, "perm", None)
            replace_value(node.outputs[0], transposed(model.graph, source, perm))
            drop_node(node)
            changed += 1
        return changed

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "Transpose" and is_initializer(node.inputs[0]):
                raise Violation(f"Transpose of initializer {node.inputs[0].name!r}")  # type: ignore[union-attr]


class GemmToMatMul(GraphPass):
    """No Gemm with a stored weight: MatMul and Add, so that all linear layers look alike."""

    def apply(self, model: ir.Model) -> int:
        return sum(_rewrite(model.graph, node) for node in list(model.graph) if _plain_gemm(node))

    def ensures(self, model: ir.Model) -> None:
        left = [node.name for node in model.graph if node.op_type == "Gemm" and is_initializer(node.inputs[1])]
        if left:
            raise Violation(f"{len(left)} Gemm nodes with a stored weight, the first is {left[0]!r}")


def transposed(graph: ir.Graph, source: ir.Value, perm: Any = None) -> ir.Value:
    """A stored transpose of an initializer, one per (initializer, permutation)."""
    assert source.name is not None
    sizes = stored_shape(source)
    order = tuple(perm) if perm is not None else tuple(reversed(range(len(sizes))))
    name = source.name + TRANSPOSED + ("" if order == (1, 0) else "_" + "".join(map(str, order)))
    if name in graph.initializers:
        return graph.initializers[name]
    return add_lazy_constant(graph, _maker(source, order), source, [sizes[axis] for axis in order], name)


def _maker(source: ir.Value, order: tuple[int, ...]) -> Callable[[], NDArray[Any]]:
    tensor = source.const_value
    assert tensor is not None
    return lambda: np.ascontiguousarray(np.transpose(tensor.numpy(), order))


def _plain_gemm(node: ir.Node) -> bool:
    return (
        node.op_type == "Gemm"
        and is_initializer(node.inputs[1])
        and float(attribute(node, "alpha", 1.0)) == 1.0
        and float(attribute(node, "beta", 1.0)) == 1.0
        and not attribute(node, "transA", 0)
    )


def _rewrite(graph: ir.Graph, node: ir.Node) -> int:
    weight = node.inputs[1]
    assert weight is not None
    if attribute(node, "transB", 0):
        weight = transposed(graph, weight)
    result = insert_node(node, "MatMul", [node.inputs[0], weight]).outputs[0]
    result.shape = node.outputs[0].shape
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        stored = const_array(bias)
        if stored is not None and stored.ndim > 1:
            bias = add_constant(graph, stored.reshape(-1), f"{bias.name}_flat")
        result = insert_node(node, "Add", [result, bias]).outputs[0]
    replace_value(node.outputs[0], result)
    drop_node(node)
    return 1
