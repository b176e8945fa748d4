"""`chunk` without sequences."""

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
    readers,
    replace_value,
    scalar,
)


class SplitSequences(GraphPass):
    """No sequences: SplitToSequence with SequenceAt becomes Split."""

    def apply(self, model: ir.Model) -> int:
        return sum(_rewrite(model.graph, node) for node in list(model.graph) if node.op_type == "SplitToSequence")

    def ensures(self, model: ir.Model) -> None:
        left = sorted({node.op_type for node in model.graph if "Sequence" in node.op_type})
        if left:
            raise Violation(", ".join(left))


def _rewrite(graph: ir.Graph, node: ir.Node) -> int:
    source, lengths = node.inputs[0], const_array(node.inputs[1])
    takers = readers(node.outputs[0])
    indices = [scalar(taker.inputs[1]) for taker in takers]
    if source is None or lengths is None or any(t.op_type != "SequenceAt" for t in takers) or None in indices:
        return 0
    axis = int(attribute(node, "axis", 0))
    if lengths.ndim == 0:
        size = source.shape[axis] if source.shape is not None else None
        if not isinstance(size, int):
            return 0
        step = int(lengths)
        lengths = np.asarray([min(step, size - start) for start in range(0, size, step)], np.int64)
    sizes = add_constant(graph, lengths.astype(np.int64), "split")
    split = insert_node(node, "Split", [source, sizes], {"axis": axis}, outputs=len(lengths))
    if source.dtype is not None:
        for value in split.outputs:
            value.dtype = source.dtype
    for taker, index in zip(takers, indices, strict=True):
        assert index is not None
        replace_value(taker.outputs[0], split.outputs[int(index) % len(lengths)])
        drop_node(taker)
    drop_node(node)
    return 1
