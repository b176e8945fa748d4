"""What nothing reads."""

from __future__ import annotations

import onnx_ir as ir

from quantempo.export.passes.base import GraphPass, Violation


class RemoveDead(GraphPass):
    """No node and no initializer that nothing reads."""

    def apply(self, model: ir.Model) -> int:
        graph, changed = model.graph, 0
        for node in reversed(list(graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                graph.remove(node, safe=True)
                changed += 1
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
                changed += 1
        return changed

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                raise Violation(f"node {node.name!r} ({node.op_type}), which nothing reads")
