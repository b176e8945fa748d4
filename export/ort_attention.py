"""Attention for ONNX Runtime: the decomposed form becomes `com.microsoft.MultiHeadAttention`.

The operator reads queries, keys and values as the projections give them, `[batch, sequence, heads · size]`, and returns
the same layout, so that no transposed copy and no whole matrix of scores has to pass through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"
QUERY, KEY = (0, 2, 1, 3), (0, 2, 3, 1)


def fuse_attention(model: ir.Model) -> int:
    """Replace every unmasked attention, in place; float rounding apart the graph computes the same.

    Rules, for `Reshape(Transpose(MatMul(Softmax(MatMul(q, k)), v)))`:
    1. `q`, `k` and `v` are `Transpose(Reshape(x, [·, sequence, heads, size]))`, `q` and `k` perhaps times a constant;
    2. nothing else reads what lies between, and none of it is a graph output;
    3. a mask, a bias or another layout leaves the attention as it is.

    Returns:
        How many were replaced.
    """
    fused = 0
    for node in list(model.graph):
        found = _match(node) if node.op_type == "Reshape" else None
        if found is not None:
            _replace(model.graph, node, found)
            fused += 1
    if fused:
        model.opset_imports.setdefault(CONTRIB, 1)
    return fused


@dataclass(frozen=True, eq=False)
class _Attention:
    """A match: the three inputs, the number of heads, the factor on the scores, and the nodes to remove."""

    inputs: tuple[ir.Value, ir.Value, ir.Value]
    heads: int
    scale: float
    inner: tuple[ir.Node, ...]


def _match(last: ir.Node) -> _Attention | None:
    inner: list[ir.Node] = []
    merge = _sole(last.inputs[0], "Transpose", inner)
    if merge is None or _perm(merge) != QUERY:
        return None
    mix = _sole(merge.inputs[0], "MatMul", inner)
    softmax = _sole(mix.inputs[0], "Softmax", inner) if mix is not None else None
    if mix is None or softmax is None or _axis(softmax) not in (-1, 3):
        return None
    scores = _sole(softmax.inputs[0], "MatMul", inner)
    if scores is None:
        return None
    query, query_factor = _scaled(scores.inputs[0], inner)
    key, key_factor = _scaled(scores.inputs[1], inner)
    parts = [_heads(value, perm, inner) for value, perm in ((query, QUERY), (key, KEY), (mix.inputs[1], QUERY))]
    if any(part is None for part in parts):
        return None
    values = tuple(part[0] for part in parts if part is not None)
    heads = {part[1] for part in parts if part is not None}
    if len(heads) != 1:
        return None
    query_value, key_value, value_value = values
    return _Attention((query_value, key_value, value_value), heads.pop(), query_factor * key_factor, tuple(inner))


def _sole(value: ir.Value | None, op_type: str, inner: list[ir.Node]) -> ir.Node | None:
    """The producer of a value that only one node reads, if it is of the given type; noted in `inner`."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != op_type or value.is_graph_output() or len(value.uses()) != 1:
        return None
    inner.append(node)
    return node


def _scaled(value: ir.Value | None, inner: list[ir.Node]) -> tuple[ir.Value | None, float]:
    """What a constant is multiplied with, and the constant; `(value, 1)` where there is none."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Mul":
        return value, 1.0
    for this, other in (node.inputs, node.inputs[::-1]):
        constant = other.const_value if other is not None else None
        if constant is not None and constant.size == 1:
            return (this, float(constant.numpy().reshape(()))) if _sole(value, "Mul", inner) else (None, 1.0)
    return value, 1.0


def _heads(value: ir.Value | None, perm: Sequence[int], inner: list[ir.Node]) -> tuple[ir.Value, int] | None:
    """What is reshaped to heads and transposed, and the number of heads."""
    transpose = _sole(value, "Transpose", inner)
    if transpose is None or _perm(transpose) != tuple(perm):
        return None
    reshape = _sole(transpose.inputs[0], "Reshape", inner)
    source = reshape.inputs[0] if reshape is not None else None
    shape = reshape.inputs[1].const_value if reshape is not None and reshape.inputs[1] is not None else None
    if source is None or shape is None or shape.size != 4 or source.shape is None or len(source.shape) != 3:
        return None
    heads = int(np.asarray(shape.numpy())[2])
    return (source, heads) if heads > 0 else None


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else -1


def _replace(graph: ir.Graph, last: ir.Node, found: _Attention) -> None:
    old = last.outputs[0]
    name = old.name
    node = ir.Node(
        CONTRIB,
        "MultiHeadAttention",
        found.inputs,
        [ir.AttrInt64("num_heads", found.heads), ir.AttrFloat32("scale", found.scale)],
        outputs=[ir.Value(shape=old.shape, type=old.type)],
        name=f"{name}/MultiHeadAttention",
        metadata_props=dict(last.metadata_props),
    )
    graph.insert_before(last, node)
    old.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    graph.remove([last, *found.inner], safe=True)
    old.name = None
    node.outputs[0].name = name
