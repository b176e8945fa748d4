"""Names that a person can read and that do not change between runs."""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir

from quantempo.export.passes.base import GraphPass, Violation
from quantempo.export.passes.edit import is_initializer, module_of
from quantempo.export.passes.weights import TRANSPOSED

SITE_OPS = ("MatMul", "Conv")
SUFFIXES = (TRANSPOSED, "_kept", "_spread", "_flat")


class NameValues(GraphPass):
    """Unique names from module paths.

    Rules, first match wins:
    1. graph inputs and outputs keep their names;
    2. the product of a linear layer or convolution is `MODULE/product`, and after its bias `MODULE/out`;
    3. what such a layer reads is `MODULE/in`, after its first reader;
    4. any other value is `MODULE/operator`.
    A repeated name gets `#2`, `#3`, ….  Weights keep the name of the torch parameter; constants are `constant.N` in
    order of first use.  Nodes are named like their first output.
    """

    def __init__(self, wrapper: str = "denoiser") -> None:
        self._prefix = wrapper + "."

    def apply(self, model: ir.Model) -> int:
        graph = model.graph
        names: dict[ir.Value, str] = {}
        taken: Counter[str] = Counter()
        fixed = [*graph.inputs, *graph.outputs]
        for value in fixed:
            assert value.name is not None
            taken[value.name] += 1
        for value, wish in _wishes(graph).items():
            if value not in fixed:
                names[value] = _unique(wish, taken)
        self._name_initializers(graph, names, taken)
        for index, value in enumerate(names):
            value.name = f"temporary.{index}"
        for value, name in names.items():
            value.name = name
        for node in graph:
            node.name = node.outputs[0].name
        return len(names)

    def _name_initializers(self, graph: ir.Graph, names: dict[ir.Value, str], taken: Counter[str]) -> None:
        ordered = dict.fromkeys(v for node in graph for v in node.inputs if v is not None and is_initializer(v))
        constants = 0
        for value in ordered:
            assert value.name is not None
            base = value.name
            for suffix in SUFFIXES:
                base = base.split(suffix)[0]
            if base.startswith(self._prefix):
                names[value] = _unique(base.removeprefix(self._prefix), taken)
            else:
                names[value] = _unique(f"constant.{constants}", taken)
                constants += 1

    def ensures(self, model: ir.Model) -> None:
        counts = Counter(value.name for node in model.graph for value in node.outputs)
        repeated = [name for name, count in counts.items() if count > 1 or not name]
        if repeated:
            raise Violation(f"value names that are not unique: {', '.join(map(repr, repeated[:3]))}")


def is_site(node: ir.Node) -> bool:
    """Whether the node is the product of a computed tensor and a stored weight."""
    if node.op_type not in SITE_OPS or len(node.inputs) != 2:
        return False
    weight = node.inputs[1]
    if not is_initializer(weight) or is_initializer(node.inputs[0]):
        return False
    assert weight is not None
    return node.op_type != "MatMul" or weight.shape is None or len(weight.shape) == 2  # a stack of matrices is none


def _wishes(graph: ir.Graph) -> dict[ir.Value, str]:
    sites: dict[ir.Node, str] = {}
    counts: Counter[str] = Counter()
    for node in graph:
        if is_site(node):
            sites[node] = _unique(module_of(node) or node.op_type.lower(), counts)
    wishes: dict[ir.Value, str] = {}
    for node, site in sites.items():
        wishes[node.outputs[0]] = f"{site}/product"
        for user in (use.node for use in node.outputs[0].uses()):
            if user.op_type == "Add" and is_initializer(user.inputs[1]) and module_of(user) == module_of(node):
                wishes.setdefault(user.outputs[0], f"{site}/out")
    for node, site in sites.items():
        if node.inputs[0] is not None:
            wishes.setdefault(node.inputs[0], f"{site}/in")
    for node in graph:
        module, op = module_of(node), _snake(node.op_type)
        for value in node.outputs:
            wishes.setdefault(value, f"{module}/{op}" if module else op)
    return wishes


def _snake(op: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", op).lower()


def _unique(wish: str, taken: Counter[str]) -> str:
    taken[wish] += 1
    if taken[wish] == 1:
        return wish
    name = f"{wish}#{taken[wish]}"
    return name if not taken[name] and not taken.update([name]) else _unique(wish, taken)
