"""The `unfold` dialect: `portable`, with quantized convolutions written as matrix products.

TensorRT for RTX has no INT8 convolutions for Turing; it computes them in half, on weights that it dequantizes at every
call.  INT8 matrix products it has, and a convolution is the product of its unfolded input (the columns of `im2col`)
with the same weight:

    y[n, p, o] = Σ_(c, i) x[n, c, stride · p + dilation · i] · W[o, c, i]

The rewrite is exact: the integers and their sums are the same ones, and a symmetric quantizer maps padding to zero.
The weight keeps its bytes; only its shape changes.  The compiler makes one kernel of what leads up to a quantizer,
unfolding included.

Unfolding costs traffic: a kernel of area `a` writes and reads `a · C` bytes per pixel, `C` input channels.  It saves
`2 · a · C · O · (1/F - 1/I)` seconds per pixel, with `O` output channels and `F`, `I` operations per second in half
(accumulated in float32) and in INT8.  `a · C` cancels out: on GeForce RTX 20 (336 to 616 GB/s, 26 to 54 and 103 to 215
TOPS by their data sheets) both are equal at 103 to 120 output channels, so narrower convolutions stay in float.  This
is an estimate; it was not timed.  A kernel of area 1 costs a transposition that the quantizer does on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantempo.contracts.plan import Keep, QuantPlan
from quantempo.export.passes.base import GraphPass, Violation
from quantempo.export.passes.edit import add_constant
from quantempo.export.passes.remove_dead import RemoveDead

DIALECT = "unfold"
NARROW = 128
"""Output channels below which unfolding costs more time than INT8 saves, see above."""
UNFOLDED = ".unfolded"
"""Ends, or continues, the names of values that only move the values of another one."""
_AHEAD = (".shrunk", ".shifted", ".clipped", ".quantized", ".dequantized")
_END = np.iinfo(np.int64).max


def kept_when_unfolded(model: ir.Model, plan: QuantPlan) -> dict[str, Keep]:
    """The quantized convolutions that this dialect leaves in float, by site id, with the reason; reads no weights.

    Args:
        model: float graph in normal form.
        plan: what is quantized.
    """
    by_output = {str(value.name): node for node in model.graph for value in node.outputs}
    kept = {}
    for site in plan.quantized():
        node = by_output.get(site.output)
        if site.op != "conv" or node is None or node.op_type != "Conv":
            continue
        geometry = Geometry.of(node)
        area = geometry.kernel[0] * geometry.kernel[1]
        if geometry.groups != 1:
            kept[site.id] = Keep("grouped: the device has no INT8 convolutions, and it unfolds to many small products")
        elif area > 1 and site.n < NARROW:
            kept[site.id] = Keep(
                f"{site.n} output channels: the device has no INT8 convolutions, and below {NARROW} unfolding costs "
                "more than it saves"
            )
    return kept


@dataclass(frozen=True)
class Geometry:
    """How a two-dimensional convolution moves over its input; `pads` as in ONNX, beginnings first."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    groups: int

    @staticmethod
    def of(node: ir.Node) -> Geometry:
        """Of a Conv node whose weight has a known shape."""

        def numbers(name: str, default: Sequence[int]) -> tuple[int, ...]:
            attribute = node.attributes.get(name)
            return tuple(attribute.as_ints()) if attribute is not None else tuple(default)

        weight = node.inputs[1]
        assert weight is not None
        assert weight.shape is not None
        groups = node.attributes.get("group")
        return Geometry(
            tuple(weight.shape.numpy())[2:], numbers("strides", (1, 1)), numbers("pads", (0, 0, 0, 0)),  # type: ignore[arg-type]
            numbers("dilations", (1, 1)), groups.as_int() if groups is not None else 1,  # type: ignore[arg-type]
        )

    @property
    def word(self) -> str:
        """Part of a value's name."""
        parts = (self.kernel, self.strides, self.pads, self.dilations)
        return "k" + "_".join("x".join(map(str, part)) for part in parts)


class UnfoldConvolutions(GraphPass):
    """No convolution of two dequantized operands: unfolded inputs and matrix products."""

    def apply(self, model: ir.Model) -> int:
        places = [node for node in model.graph if _is_place(node)]
        made: dict[tuple[ir.Value, str], ir.Value] = {}
        for node in places:
            _Unfolding(model.graph, node, made).run()
        RemoveDead().apply(model)
        return len(places)

    def ensures(self, model: ir.Model) -> None:
        left = sum(map(_is_place, model.graph))
        if left:
            raise Violation(f"{left} quantized convolutions")


def _is_place(node: ir.Node) -> bool:
    """A convolution, not a grouped one, of two dequantized operands."""
    makers = [value.producer() if value is not None else None for value in node.inputs[:2]]
    dequantized = all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
    return node.op_type == "Conv" and dequantized and Geometry.of(node).groups == 1


class _Unfolding:
    """The rewriting of one convolution; `made` holds the quantized columns of those before it."""

    def __init__(self, graph: ir.Graph, node: ir.Node, made: dict[tuple[ir.Value, str], ir.Value]) -> None:
        self._graph, self._node, self._made = graph, node, made
        self._geometry = Geometry.of(node)
        output = node.outputs[0].shape
        assert output is not None
        self._size = (output[0], output[2], output[3])

    def run(self) -> None:
        old = self._node.outputs[0]
        name, channels = str(old.name), self._weight_shape()[0]
        product = self._op("MatMul", [self._columns(), self._weight()], f"{name}{UNFOLDED}", channels)
        old.name = None
        result = self._op("Transpose", [product], name, perm=[0, 3, 1, 2])
        result.shape = old.shape
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        self._graph.remove(self._node, safe=True)

    def _weight_shape(self) -> tuple[int, ...]:
        weight = self._node.inputs[1]
        assert weight is not None
        assert weight.shape is not None
        return tuple(weight.shape.numpy())

    def _op(
        self, operator: str, inputs: Sequence[ir.Value | None], name: str, channels: int = 0,
        **attributes: int | list[int],
    ) -> ir.Value:
        """A float32 node in front of the convolution; `channels` are the last axis of the output, behind the pixels."""
        node = ir.node(operator, inputs, attributes, outputs=[ir.Value(name=name)], name=f"{name}/{operator}")
        node.metadata_props.update(self._node.metadata_props)
        self._graph.insert_before(self._node, node)
        value = node.outputs[0]
        value.type = ir.TensorType(ir.DataType.FLOAT)
        if channels:
            value.shape = ir.Shape([*self._size, channels])
        return value

    def _columns(self) -> ir.Value:
        """The quantized and dequantized columns: what leads up to the dequantizer, applied to unfolded values."""
        end = self._node.inputs[0]
        assert end is not None
        key = (end, self._geometry.word)
        if key not in self._made:
            chain: list[ir.Node] = []
            value = end
            while (maker := value.producer()) is not None and str(value.name).endswith(_AHEAD):
                chain.append(maker)
                first = maker.inputs[0]
                assert first is not None
                value = first
            value = self._unfolded(value)
            for node in reversed(chain):
                value = self._again(node, value)
            self._made[key] = value
        return self._made[key]

    def _again(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """A node of the quantizer once more, on other values."""
        front, _, end = str(node.outputs[0].name).rpartition(".")
        again = self._op(node.op_type, [value, *node.inputs[1:]], f"{front}.{self._geometry.word}.{end}")
        producer = again.producer()
        assert producer is not None
        for attribute in node.attributes.values():
            producer.attributes.add(attribute)
        again.type, again.shape = node.outputs[0].type, value.shape
        return again

    def _unfolded(self, value: ir.Value) -> ir.Value:
        """`[n, height, width, channels · area]`, channels outermost, as a weight's rows have them."""
        geometry, channels = self._geometry, self._weight_shape()[1]
        name = f"{value.name}{UNFOLDED}.{geometry.word}"
        value = self._op("Transpose", [value], f"{name}.pixels", perm=[0, 2, 3, 1])
        top, left, bottom, right = geometry.pads
        if any(geometry.pads):
            pads = self._constant("pads", [0, top, left, 0, 0, bottom, right, 0])
            value = self._op("Pad", [value, pads], f"{name}.padded")
        offsets = [(i, j) for i in range(geometry.kernel[0]) for j in range(geometry.kernel[1])]
        if len(offsets) == 1 and geometry.strides == (1, 1):
            value.shape = ir.Shape([*self._size, channels])
            return value
        parts = [self._part(value, offset, f"{name}.{offset[0]}_{offset[1]}", channels) for offset in offsets]
        if len(parts) == 1:
            return parts[0]
        last = self._constant("last", [-1])
        columns = [self._op("Unsqueeze", [part, last], f"{part.name}.column") for part in parts]
        whole = self._op("Concat", columns, f"{name}.columns", axis=4)
        shape = self._constant("rows", [0, 0, 0, channels * len(parts)])
        return self._op("Reshape", [whole, shape], name, channels * len(parts))

    def _part(self, value: ir.Value, offset: tuple[int, int], name: str, channels: int) -> ir.Value:
        """The values that one element of the kernel meets."""
        geometry = self._geometry
        pairs = list(zip(offset, geometry.kernel, geometry.dilations, strict=True))
        starts = [i * step for i, _, step in pairs]
        ends = [-(size - 1 - i) * step or _END for i, size, step in pairs]
        inputs = [starts, ends, [1, 2], list(geometry.strides)]
        return self._op("Slice", [value, *(self._constant("slice", item) for item in inputs)], name, channels)

    def _constant(self, name: str, numbers: Sequence[int]) -> ir.Value:
        return add_constant(self._graph, np.asarray(numbers, np.int64), f"{UNFOLDED[1:]}.{name}")

    def _weight(self) -> ir.Value:
        """`[channels · area, n]`, from the same bytes."""
        end = self._node.inputs[1]
        assert end is not None
        dequantizer = end.producer()
        assert dequantizer is not None
        integers, scale = dequantizer.inputs[:2]
        assert integers is not None
        assert integers.const_value is not None
        shape = self._weight_shape()
        flat = np.asarray(integers.const_value.numpy()).reshape(shape[0], -1)
        rows = add_constant(self._graph, flat, f"{integers.name}.rows")
        name = str(end.name)
        value = self._op("DequantizeLinear", [rows, scale], f"{name}{UNFOLDED}.rows", axis=0)
        value.shape = rows.shape
        value = self._op("Transpose", [value], f"{name}{UNFOLDED}", perm=[1, 0])
        value.shape = ir.Shape([flat.shape[1], shape[0]])
        return value
