"""Regions that torch.export keeps as operators of their own, put back into the graph around them."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from quantempo.errors import ExportError
from quantempo.export.fx_edit import settle

AUTOCAST, GRADIENTS = "wrap_with_autocast", "wrap_with_set_grad_enabled"
ARGUMENTS = {AUTOCAST: 4, GRADIENTS: 1}
"""How many arguments each has before the region: of autocast (device, type, enabled, cached); of gradients, enabled."""


def inline_regions(program: ExportedProgram) -> None:
    """Inline regions under `torch.autocast` and `torch.set_grad_enabled`, in place.

    Neither changes what a float32 module computes on a CPU, unless autocast is switched on for the CPU.

    Raises:
        ExportError: it is.
    """
    found = 0
    while regions := [node for node in program.graph.nodes if _kind(node) is not None]:
        for node in regions:
            _inline(program, node)
        found += len(regions)
    if found:
        settle(program)


def _kind(node: Node) -> str | None:
    name = str(getattr(node.target, "__name__", node.target)) if node.op == "call_function" else ""
    return name if name in ARGUMENTS else None


def _inline(program: ExportedProgram, node: Node) -> None:
    kind = _kind(node)
    assert kind is not None
    before = ARGUMENTS[kind]
    if kind == AUTOCAST and node.args[0] == "cpu" and node.args[2]:
        raise ExportError(
            "operation autocast", found="a region in half precision", wanted="float32",
            cause="the model's forward switches autocast on", remedy="take torch.autocast out of the model's forward",
        )
    region: Any = node.args[before]
    inner: GraphModule = getattr(program.graph_module, str(region.target))
    places = [each for each in inner.graph.nodes if each.op == "placeholder"]
    known: dict[Node, Node] = dict(zip(places, node.args[before + 1 :], strict=True))  # type: ignore[arg-type]
    with program.graph.inserting_before(node):
        results: Any = program.graph.graph_copy(inner.graph, known)
    for use in list(node.users):
        position: Any = use.args[1]  # the region's results are a tuple
        use.replace_all_uses_with(results[position])
        program.graph.erase_node(use)
    program.graph.erase_node(node)
