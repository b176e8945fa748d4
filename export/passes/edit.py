"""Small editing steps that the passes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MODULE = "quantempo.module"
"""Node metadata: the module path in the torch model, without the wrapper."""


def const_array(value: ir.Value | None) -> NDArray[Any] | None:
    """The numbers of a constant value; `None` where it is computed."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def is_initializer(value: ir.Value | None) -> bool:
    """Whether the value is stored in the model."""
    return value is not None and value.is_initializer()


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(np.asarray(value.const_value.numpy()).reshape(()))


def static_shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The shape, symbolic dimensions as `None`."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def stored_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of an initializer."""
    assert value.shape is not None
    return tuple(value.shape.numpy())


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether two values certainly have one shape."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    for x, y in zip(a.shape, b.shape, strict=True):
        left, right = (d if isinstance(d, int) else d.value for d in (x, y))
        if left is None or left != right:
            return False
    return True


def add_constant(graph: ir.Graph, array: NDArray[Any], name: str) -> ir.Value:
    """A new initializer; the name is made unique."""
    unique, count = name, 1
    while unique in graph.initializers or (count == 1 and _is_computed(graph, unique)):
        count += 1
        unique = f"{name}_{count}"
    tensor = ir.tensor(np.array(array, order="C"), name=unique)
    value = ir.val(unique, const_value=tensor)
    value.shape, value.dtype = ir.Shape(array.shape), tensor.dtype
    graph.register_initializer(value)
    return value


def _is_computed(graph: ir.Graph, name: str) -> bool:
    """Whether a node makes a value of that name; values outside of all modules are named like their operators."""
    return "/" not in name and any(value.name == name for node in graph for value in node.outputs)


def add_lazy_constant(
    graph: ir.Graph, make: Callable[[], NDArray[Any]], like: ir.Value, shape: Sequence[int], name: str
) -> ir.Value:
    """A new initializer whose numbers are made only when the model is written; element type as in `like`."""
    assert like.dtype is not None
    unique = name
    while unique in graph.initializers:
        unique += "_"
    tensor = ir.LazyTensor(lambda: ir.tensor(make()), dtype=like.dtype, shape=ir.Shape(shape), name=unique)
    value = ir.val(unique, const_value=tensor)
    value.shape, value.dtype = ir.Shape(shape), like.dtype
    graph.register_initializer(value)
    return value


def insert_node(
    before: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None,
    outputs: int = 1,
) -> ir.Node:
    """A new node in front of `before`, of the same module; its outputs take dtype from `before`'s first output."""
    node = ir.node(op, inputs, attributes=dict(attributes or {}), num_outputs=outputs)
    node.metadata_props.update(before.metadata_props)
    dtype = before.outputs[0].dtype
    for value in node.outputs:
        if dtype is not None:
            value.dtype = dtype
    graph = before.graph
    assert graph is not None
    graph.insert_before(before, node)
    return node


def replace_value(old: ir.Value, new: ir.Value, keep_name: bool = False) -> None:
    """Let every reader of `old`, and the graph's outputs, read `new`.

    With `keep_name` the new value takes the old one's name, by which calibration knows it; a graph output always does.
    """
    if old.is_graph_output() and (new.is_graph_input() or new.is_initializer() or new.is_graph_output()):
        return
    if old.is_graph_output() or keep_name:
        name, old.name = old.name, None
        new.name = name
    if old.shape is not None and (new.shape is None or old.is_graph_output()):
        new.shape = old.shape
    if new.dtype is None and old.dtype is not None:
        new.dtype = old.dtype
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def drop_node(node: ir.Node) -> None:
    """Remove a node whose outputs nothing reads any more."""
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, each once, in graph order of their first use."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def sole_reader(value: ir.Value, op: str | None = None) -> ir.Node | None:
    """The only node that reads the value, if it is of that operator and the value is no graph output."""
    users = readers(value)
    if len(users) != 1 or value.is_graph_output() or (op is not None and users[0].op_type != op):
        return None
    return users[0]


def producer(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that makes the value, if it is of that operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or the operator's default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def module_of(node: ir.Node) -> str:
    """The module path that a node came from; the empty string at the top."""
    return node.metadata_props.get(MODULE, "")
