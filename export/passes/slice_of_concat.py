"""Slices of a Concat that take exactly one of its parts (the swap of sine and cosine halves)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantempo.export.passes.base import GraphPass
from quantempo.export.passes.edit import attribute, const_array, drop_node, producer, replace_value


class SliceOfConcat(GraphPass):
    """A Slice that takes one whole input of a Concat is that input."""

    def apply(self, model: ir.Model) -> int:
        changed = 0
        for node in list(model.graph):
            part = _part(node) if node.op_type == "Slice" else None
            if part is None or node.outputs[0].is_graph_output():
                continue
            replace_value(node.outputs[0], part)
            drop_node(node)
            changed += 1
        return changed


def _part(node: ir.Node) -> ir.Value | None:
    concat = producer(node.inputs[0], "Concat")
    bounds = [const_array(value) for value in node.inputs[1:]]
    if concat is None or len(bounds) < 3 or any(b is None or b.size != 1 for b in bounds):
        return None
    start, end, axis, *step = (int(np.asarray(b).reshape(())) for b in bounds)
    along = int(attribute(concat, "axis", 0))
    widths = []
    for value in concat.inputs:
        if value is None or value.shape is None:
            return None
        rank, width = len(value.shape), value.shape[along]
        if axis % rank != along % rank or not isinstance(width, int):
            return None
        widths.append(width)
    edges = np.cumsum([0, *widths])
    total = int(edges[-1])
    start, end = (min(bound + total if bound < 0 else bound, total) for bound in (start, end))
    for index, value in enumerate(concat.inputs):
        if (edges[index], edges[index + 1]) == (start, end) and (not step or step[0] == 1):
            return value
    return None
