"""One Unsqueeze in front of a Split instead of one behind each of its parts (the modulation of adaLN)."""

from __future__ import annotations

import onnx_ir as ir

from quantempo.export.passes.base import GraphPass
from quantempo.export.passes.edit import (
    attribute,
    const_array,
    drop_node,
    insert_node,
    readers,
    replace_value,
    static_shape,
)


class UnsqueezeBeforeSplit(GraphPass):
    """A Split whose parts all go through the same Unsqueeze comes after it.

    Every part that is read has to be read by Unsqueeze nodes alone, all of one axis.
    """

    def apply(self, model: ir.Model) -> int:
        return sum(_hoist(node) for node in list(model.graph) if node.op_type == "Split")


def _axis(node: ir.Node, rank: int) -> int | None:
    """The one axis that an Unsqueeze of a tensor of that rank inserts."""
    axes = const_array(node.inputs[1])
    return int(axes.reshape(())) % (rank + 1) if axes is not None and axes.size == 1 else None


def _hoist(split: ir.Node) -> int:
    source, shape = split.inputs[0], static_shape(split.inputs[0])
    if source is None or source.shape is None or shape is None or any(v.is_graph_output() for v in split.outputs):
        return 0
    users = [user for part in split.outputs for user in readers(part)]
    if not users or any(user.op_type != "Unsqueeze" for user in users):
        return 0
    axis = _axis(users[0], len(shape))
    if axis is None or any(_axis(user, len(shape)) != axis for user in users):
        return 0
    along = int(attribute(split, "axis", 0)) % len(shape)
    wide = insert_node(split, "Unsqueeze", [source, users[0].inputs[1]]).outputs[0]
    dims = list(source.shape)
    wide.shape = ir.Shape([*dims[:axis], 1, *dims[axis:]])
    moved = insert_node(
        split, "Split", [wide, *split.inputs[1:]], {"axis": along + (axis <= along)}, outputs=len(split.outputs)
    )
    for part, new in zip(split.outputs, moved.outputs, strict=True):
        for user in readers(part):
            replace_value(user.outputs[0], new)
            drop_node(user)
    drop_node(split)
    return 1
