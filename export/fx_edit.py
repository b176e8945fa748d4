"""Editing steps on a captured program (torch.export), before it is translated to ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten: Any = torch.ops.aten


def value_of(argument: Any) -> Any:
    """The fake tensor, symbolic number or plain value behind an argument."""
    if isinstance(argument, Node):
        return argument.meta.get("val")
    if isinstance(argument, (tuple, list)):
        return type(argument)(value_of(item) for item in argument)
    return argument


def is_tensor(argument: Any) -> bool:
    """Whether the argument is a node that makes a tensor."""
    return isinstance(argument, Node) and isinstance(argument.meta.get("val"), torch.Tensor)


class Builder:
    """Adds nodes in front of a node; they belong to its module."""

    def __init__(self, before: Node) -> None:
        self._before = before

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call of an operator."""
        graph = self._before.graph
        with graph.inserting_before(self._before):
            node = graph.call_function(target, args, kwargs)
        node.meta = {key: item for key, item in self._before.meta.items() if key not in ("val", "tensor_meta")}
        node.meta["val"] = target(*value_of(args), **{name: value_of(item) for name, item in kwargs.items()})
        return node


Rewrite = Callable[[Node, Builder], "Node | None"]
"""Makes the replacement of a node, or `None` to leave it."""


def rewrite(program: ExportedProgram, rules: Mapping[Any, Rewrite]) -> int:
    """Replace nodes by rules for their operators; returns how many were.

    The program is changed in place.  A rule's nodes compute exactly what the node did.
    """
    graph = program.graph
    changed = 0
    for node in list(graph.nodes):
        rule = rules.get(node.target) if node.op == "call_function" else None
        made = rule(node, Builder(node)) if rule is not None else None
        if made is None:
            continue
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        changed += 1
    if changed:
        settle(program)
    return changed


def settle(program: ExportedProgram) -> None:
    """Bring graph module and signature in line with the edited graph."""
    graph = program.graph
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    output = next(node for node in graph.nodes if node.op == "output")
    for spec, value in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        spec.arg.name = value.name
