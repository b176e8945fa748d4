"""Output channels that the sampler does not use, removed together with their computation."""

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
    is_initializer,
    producer,
    sole_reader,
    stored_shape,
)

Rows = NDArray[np.int64]


class CutOutputChannels(GraphPass):
    """The graph's output has the asked number of channels (axis 1), and the last linear layer computes no others.

    The cut is made in the weight where the layer is a convolution, or a linear layer followed by unpatching
    (`[.., h, w, p, q, c]` to `[.., c, h·p, w·q]`); elsewhere it is a Slice of the output.
    """

    def __init__(self, channels: int) -> None:
        self._channels = channels

    def apply(self, model: ir.Model) -> int:
        graph = model.graph
        output = graph.outputs[0]
        if output.shape is not None and output.shape[1] == self._channels:
            return 0
        if not (_cut_conv(graph, output, self._channels) or _cut_patches(graph, output, self._channels)):
            _slice(graph, output, self._channels)
        return 1

    def ensures(self, model: ir.Model) -> None:
        shape = model.graph.outputs[0].shape
        if shape is None or shape[1] != self._channels:
            raise Violation(f"an output of shape {shape}")


def _biased(value: ir.Value | None, op: str) -> tuple[ir.Node, ir.Node | None] | None:
    """(product, Add of a stored bias or `None`) that make the value."""
    add = producer(value, "Add")
    core = producer(value, op)
    if add is not None:
        if not is_initializer(add.inputs[1]):
            return None
        core = producer(add.inputs[0], op)
        if core is not None and sole_reader(core.outputs[0]) is None:
            return None
    return (core, add) if core is not None and is_initializer(core.inputs[1]) else None


def _set_channels(value: ir.Value, axis: int, channels: int) -> None:
    if value.shape is not None:
        dims = list(value.shape)
        dims[axis] = channels
        value.shape = ir.Shape(dims)


def _keep(graph: ir.Graph, node: ir.Node, axis: int, rows: Rows) -> None:
    """Let the node's second input keep only some rows along an axis."""
    stored = node.inputs[1]
    assert stored is not None
    assert stored.const_value is not None
    shape = list(stored_shape(stored))
    shape[axis] = len(rows)
    tensor = stored.const_value
    make: Callable[[], NDArray[Any]] = lambda: np.take(tensor.numpy(), rows, axis=axis)  # noqa: E731
    node.replace_input_with(1, add_lazy_constant(graph, make, stored, shape, f"{stored.name}_kept"))


def _cut_conv(graph: ir.Graph, output: ir.Value, channels: int) -> bool:
    found = _biased(output, "Conv")
    if found is None or int(attribute(found[0], "group", 1)) != 1:
        return False
    for node, axis in zip(found, (0, 1), strict=True):
        if node is not None:
            _keep(graph, node, axis, np.arange(channels))
            _set_channels(node.outputs[0], 1, channels)
    return True


def _cut_patches(graph: ir.Graph, output: ir.Value, channels: int) -> bool:
    join = producer(output, "Reshape")
    order = producer(join.inputs[0], "Transpose") if join is not None else None
    split = producer(order.inputs[0], "Reshape") if order is not None else None
    if join is None or order is None or split is None:
        return False
    found = _biased(split.inputs[0], "MatMul")
    parts, whole = const_array(split.inputs[1]), const_array(join.inputs[1])
    perm = list(attribute(order, "perm", ()))
    linear = [join.inputs[0], order.inputs[0], split.inputs[0]]
    if found is None or parts is None or whole is None or any(v is None or sole_reader(v) is None for v in linear):
        return False
    count = int(parts[-1])
    if len(parts) != 6 or perm != [0, 5, 1, 3, 2, 4] or len(whole) != 4 or int(whole[1]) != count:
        return False
    patch = int(parts[3] * parts[4])
    rows = np.arange(patch * count).reshape(patch, count)[:, :channels].reshape(-1)
    for node in found:
        if node is not None:
            _keep(graph, node, -1, rows)
            _set_channels(node.outputs[0], -1, len(rows))
    for node, axis, target in ((split, 5, parts), (join, 1, whole)):
        changed = target.copy()
        changed[axis] = channels
        node.replace_input_with(1, add_constant(graph, changed, "shape"))
        _set_channels(node.outputs[0], axis, channels)
    _set_channels(order.outputs[0], 1, channels)
    return True


def _slice(graph: ir.Graph, output: ir.Value, channels: int) -> None:
    last = output.producer()
    assert last is not None
    bounds = [add_constant(graph, np.asarray([n], np.int64), "bound") for n in (0, channels, 1)]
    node = ir.node("Slice", [output, *bounds])
    node.metadata_props.update(last.metadata_props)
    graph.append(node)
    new = node.outputs[0]
    new.shape, new.type = output.shape, output.type
    _set_channels(new, 1, channels)
    name, output.name = output.name, f"{output.name}_all"
    new.name = name
    graph.outputs[0] = new
