"""Where a graph can be cut for feature caching, found by data flow and module paths.

A *hidden value* is one that depends on the sample: embeddings of timestep and condition do not, and every call computes
them anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from quantempo.errors import ExportError, nearest
from quantempo.export.passes.edit import is_initializer, module_of, readers, same_shape
from quantempo.export.passes.name_values import is_site


@dataclass(frozen=True)
class Branch:
    """A long skip: a concatenation of a deep feature with an earlier one that it was computed from.

    Args:
        deep: name of the deep value, which a cut would cache.
        skip: name of the earlier value, which stays fresh.
        module: module path of the concatenation.
    """

    deep: str
    skip: str
    module: str


@dataclass(frozen=True)
class Span:
    """A range of blocks: the hidden value that enters it and the one that leaves it, by name."""

    before: str
    after: str


class Flow:
    """Data flow of one graph.

    Args:
        model: a graph in normal form; its first input is the sample.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.values: dict[str, ir.Value] = {str(v.name): v for v in self.graph.inputs}
        self.values |= {str(v.name): v for node in self.graph for v in node.outputs}

    @cached_property
    def hidden(self) -> set[ir.Node]:
        """The nodes that depend on the sample."""
        return self.after(self.graph.inputs[0])

    def after(self, value: ir.Value) -> set[ir.Node]:
        """The nodes that depend on a value."""
        return _closure(readers(value), lambda node: (user for v in node.outputs for user in readers(v)))

    def before(self, value: ir.Value) -> set[ir.Node]:
        """The nodes that a value depends on, its producer among them."""
        return _closure([value.producer()], lambda node: (v.producer() for v in node.inputs if v is not None))

    def between(self, start: ir.Value, end: ir.Value) -> set[ir.Node]:
        """The nodes on the ways from one value to another."""
        return self.after(start) & self.before(end)

    def named(self, name: str, what: str) -> ir.Value:
        """A value by its name.

        Raises:
            ExportError: there is none, or it is a graph input.
        """
        value = self.values.get(name)
        if value is None or value.producer() is None:
            raise refuse_cut(
                f"{what}, tensor {name!r}", "no computed value of that name in the graph", "a value of the float graph",
                "the plan belongs to another graph, or a misspelling", nearest(name, self.values),
            )
        return value

    def is_hidden(self, value: ir.Value) -> bool:
        """Whether a value depends on the sample."""
        return value.producer() in self.hidden or value is self.graph.inputs[0]


def _closure(
    start: Iterable[ir.Node | None], step: Callable[[ir.Node], Iterable[ir.Node | None]]
) -> set[ir.Node]:
    seen: set[ir.Node] = set()
    front = [node for node in start if node is not None]
    while front:
        node = front.pop()
        if node not in seen:
            seen.add(node)
            front.extend(other for other in step(node) if other is not None)
    return seen


def branches(model: ir.Model) -> tuple[Branch, ...]:
    """The long skips of a model, the outermost (cheapest to keep fresh) first: DeepCache's branches.

    A concatenation counts where one of its two parts was computed from the other: UNets, U-ViT, Skip-DiT.
    """
    flow, found = Flow(model), []
    for node in reversed(list(model.graph)):
        if node.op_type != "Concat" or len(node.inputs) != 2 or node not in flow.hidden:
            continue
        for deep, skip in (node.inputs, node.inputs[::-1]):
            if deep is None or skip is None or deep is skip or is_initializer(skip) or not flow.is_hidden(skip):
                continue
            if flow.between(skip, deep):
                found.append(Branch(str(deep.name), str(skip.name), module_of(node)))
                break
    return tuple(found)


def block_lists(model: ir.Model) -> Mapping[str, int]:
    """Lists of at least two blocks by module path, and their lengths; for each, blocks 0 to n - 1 hold products."""
    flow = Flow(model)
    indices: dict[str, set[int]] = {}
    for node in model.graph:
        if is_site(node) and node in flow.hidden:
            for match in re.finditer(r"\.(\d+)(?=\.)", module_of(node)):
                indices.setdefault(module_of(node)[: match.start()], set()).add(int(match.group(1)))
    return {name: len(found) for name, found in indices.items() if len(found) > 1 and max(found) == len(found) - 1}


def first_block_list(model: ir.Model) -> str:
    """The module path of the list whose block 0 is the first in the graph that one hidden value enters and leaves.

    A transformer's list of blocks; in a UNet the residual blocks of its first level.  It may have one block alone.

    Raises:
        ExportError: there is none.
    """
    flow, tried = Flow(model), set[str]()
    for node in model.graph:
        if not is_site(node) or node not in flow.hidden:
            continue
        for match in re.finditer(r"\.0(?=\.)", module_of(node)):
            name = module_of(node)[: match.start()]
            if name in tried:
                continue
            tried.add(name)
            with suppress(ExportError):
                span(flow, name, 0, 0, "first block")
                return name
    raise refuse_cut(
        "first block", "no list of blocks whose first one hidden value enters and leaves", "one",
        "a model without residual blocks", "choose a fixed schedule",
    )


def check_depth(model: ir.Model, blocks: str, depth: int, what: str) -> None:
    """Refuse a list of blocks that the model does not have, or that has another length.

    Raises:
        ExportError: naming it.
    """
    lists = block_lists(model)
    if blocks not in lists:
        raise refuse_cut(
            f"{what}, blocks {blocks!r}", "no such list of blocks in the graph", "a module path of a list of blocks",
            "a model of another architecture, or a misspelling", nearest(blocks, lists),
        )
    if lists[blocks] != depth:
        raise refuse_cut(
            f"{what}, blocks {blocks!r}", f"a cut for {depth} blocks", f"one for {lists[blocks]}",
            "it was fitted for a model of another depth", "fit the cache plan anew for this model",
        )


def span(flow: Flow, blocks: str, first: int, last: int, what: str) -> Span:
    """What enters and leaves a range of blocks.

    Raises:
        ExportError: not exactly one hidden value enters and one of its shape leaves (a long skip, several streams).
    """
    inside = re.compile(re.escape(blocks) + r"\.(?:" + "|".join(map(str, range(first, last + 1))) + r")(?:\.|$)")
    entering, leaving = borders(flow, lambda node: inside.match(module_of(node)) is not None)
    place = f"{what}, {blocks} {first} to {last}"
    if len(entering) != 1 or len(leaving) != 1:
        uncached = f"{', '.join(entering)} enter and {', '.join(leaving) or 'nothing'} leave the blocks"
        raise refuse_cut(
            place, uncached, "one hidden value in and one out",
            "skip connections or several streams: reuse would need tensors that the cut does not cache",
            "cut at a branch (FeatureCut) instead, or choose another range",
        )
    if not same_shape(flow.values[entering[0]], flow.values[leaving[0]]):
        raise refuse_cut(
            place, f"shapes {flow.values[entering[0]].shape} in and {flow.values[leaving[0]].shape} out", "one shape",
            "the blocks change the resolution or the width", "choose a range within one resolution",
        )
    return Span(entering[0], leaving[0])


def modulated_input(flow: Flow, blocks: str) -> str | None:
    """What the first block's first layer of weights reads that depends on the sample and on other inputs too, by name.

    Other inputs are timestep and condition: in a transformer this is the normalized and modulated input of attention,
    in a residual block of a UNet what enters the convolution behind the embedding of the timestep.
    """
    conditioned = {node for value in flow.graph.inputs[1:] for node in flow.after(value)}
    for node in flow.graph:
        value = node.inputs[0] if node.inputs else None
        inside = is_site(node) and is_within(node, f"{blocks}.0")
        if inside and value is not None and flow.is_hidden(value) and value.producer() in conditioned:
            return str(value.name)
    return None


def borders(flow: Flow, is_inside: Callable[[ir.Node], bool]) -> tuple[list[str], list[str]]:
    """Names of the hidden values that enter and that leave a set of nodes, in graph order."""
    entering: dict[str, None] = {}
    leaving: dict[str, None] = {}
    for node in flow.graph:
        inner = is_inside(node)
        for value in node.inputs:
            if value is None or not flow.is_hidden(value):
                continue
            producer = value.producer()
            from_inside = producer is not None and is_inside(producer)
            if inner and not from_inside:
                entering[str(value.name)] = None
            elif from_inside and not inner:
                leaving[str(value.name)] = None
        if inner:
            leaving.update((str(v.name), None) for v in node.outputs if v.is_graph_output())
    return list(entering), list(leaving)


def sublayers(flow: Flow, blocks: str, index: int, what: str) -> dict[str, Span]:
    """The sublayers of a block by module path, in graph order: children that multiply hidden values with weights.

    Raises:
        ExportError: a child takes or returns several hidden values.
    """
    start = f"{blocks}.{index}."
    names: dict[str, None] = {}
    for node in flow.graph:
        if is_site(node) and node in flow.hidden and module_of(node).startswith(start):
            names[start + module_of(node).removeprefix(start).split(".")[0]] = None
    found = {}
    for name in names:
        entering, leaving = borders(flow, lambda node, name=name: is_within(node, name))  # type: ignore[misc]
        if len(entering) != 1 or len(leaving) != 1:
            raise refuse_cut(
                f"{what}, sublayer {name}", f"{len(entering)} hidden values in, {len(leaving)} out", "one in, one out",
                "a sublayer that works on several streams", "choose a delta or feature cut for this model",
            )
        found[name] = Span(entering[0], leaving[0])
    return found


def is_within(node: ir.Node, module: str) -> bool:
    """Whether a node belongs to a module or to one inside it."""
    path = module_of(node)
    return path == module or path.startswith(module + ".")


def refuse_cut(where: str, found: str, wanted: str, cause: str, remedy: str) -> ExportError:
    """The error of a cut that does not fit the graph."""
    return ExportError(where, found=found, wanted=wanted, cause=cause, remedy=remedy)
