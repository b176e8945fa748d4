"""Equal constants and equal computations, once."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from quantempo.export.passes.base import GraphPass, Violation
from quantempo.export.passes.edit import drop_node, replace_value

SMALL = 1 << 16
"""Only constants up to this many elements are compared; weights are left alone."""


class ShareConstants(GraphPass):
    """No two small initializers of one type, shape and content."""

    def apply(self, model: ir.Model) -> int:
        seen: dict[tuple[object, ...], ir.Value] = {}
        changed = 0
        for name, value in list(model.graph.initializers.items()):
            key = content_key(value)
            if key is None or value.is_graph_output():
                continue
            if key not in seen:
                seen[key] = value
                continue
            value.replace_all_uses_with(seen[key])
            del model.graph.initializers[name]
            changed += 1
        return changed

    def ensures(self, model: ir.Model) -> None:
        keys = [content_key(v) for v in model.graph.initializers.values() if not v.is_graph_output()]
        known = [key for key in keys if key is not None]
        if len(set(known)) != len(known):
            raise Violation(f"{len(known) - len(set(known))} duplicate constants")


class ShareSubexpressions(GraphPass):
    """No two nodes with the same operator, attributes and inputs."""

    def apply(self, model: ir.Model) -> int:
        seen: dict[tuple[object, ...], ir.Node] = {}
        changed = 0
        for node in list(model.graph):
            key = _node_key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is node or any(v.is_graph_output() for v in node.outputs):
                continue
            for old, new in zip(node.outputs, first.outputs, strict=True):
                replace_value(old, new)
            drop_node(node)
            changed += 1
        return changed


def content_key(value: ir.Value) -> tuple[object, ...] | None:
    """A key that two initializers share only if they are equal; `None` for large ones."""
    tensor = value.const_value
    if tensor is None or tensor.size > SMALL:
        return None
    return (tensor.dtype, tuple(tensor.shape), hashlib.sha256(np.asarray(tensor.numpy()).tobytes()).digest())


def _node_key(node: ir.Node) -> tuple[object, ...] | None:
    attributes: list[tuple[str, object]] = []
    for name, attribute in sorted(node.attributes.items()):
        kind = attribute.type
        if kind in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
            attributes.append((name, attribute.value))
        elif kind in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
            attributes.append((name, tuple(attribute.value)))
        else:
            return None
    if node.op_type.startswith("Random"):
        return None
    inputs = tuple(id(value) for value in node.inputs)
    return (node.domain, node.op_type, node.overload, len(node.outputs), inputs, tuple(attributes))
