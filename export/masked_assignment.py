"""`x[mask] = f(x[mask])` with an elementwise `f`, as a choice: ONNX's way takes sizes that depend on contents."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quantempo.export.fx_edit import Builder, aten, is_tensor, value_of

FUNCTIONAL = {
    getattr(aten, f"{name}_").Tensor: getattr(aten, name).Tensor for name in ("mul", "div", "add", "sub")
}
ELEMENTWISE = {*FUNCTIONAL.values(), aten.neg.default, aten.abs.default}


def masked_assignment(node: Node, build: Builder) -> Node | None:
    """The replacement of an `index_put` by one mask, whose value is a number or made of what the mask selects."""
    given = dict(zip(("self", "indices", "values", "accumulate"), node.args, strict=False)) | dict(node.kwargs)
    target: Any = given["self"]
    indices: Any = given["indices"]
    if given.get("accumulate") or len(indices) != 1 or not is_tensor(indices[0]):
        return None
    (mask,) = indices
    if value_of(mask).dtype != torch.bool:
        return None
    chain = _chain(given["values"], target, mask)
    if chain is None:
        return None
    made = target
    for step in reversed(chain):
        kind: Any = FUNCTIONAL.get(step.target, step.target)
        step.target = kind  # what it would change in place is a copy
        if kind is not aten.index.Tensor:
            made = build(kind, made, *step.args[1:], **step.kwargs)
    if not chain:
        made = given["values"]
    wide = mask
    for _ in range(value_of(target).ndim - value_of(mask).ndim):
        wide = build(aten.unsqueeze.default, wide, -1)
    chosen = build(aten.where.self, wide, made, target)
    return build(aten.copy_.default, target, chosen) if node.target is aten.index_put_.default else chosen


def _chain(value: Any, target: Node, mask: Node) -> list[Node] | None:
    """The operations from `target[mask]` to a value, last first; empty for a number; `None` for anything else."""
    if not is_tensor(value):
        return None
    if value_of(value).ndim == 0:
        return []
    steps: list[Node] = []
    while value.target is not aten.index.Tensor:
        single = all(not is_tensor(other) or value_of(other).ndim == 0 for other in value.args[1:])
        if (value.target not in ELEMENTWISE and value.target not in FUNCTIONAL) or not single:
            return None
        steps.append(value)
        value = value.args[0]
    indices: Any = value.args[1]
    if value.args[0] is not target or list(indices) != [mask] or len(value.users) != 1:
        return None
    return [*steps, value]
