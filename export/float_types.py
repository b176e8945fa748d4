"""The rest of a quantized graph in half precision: float16 or bfloat16 in place of float32.

TensorRT and TensorRT-RTX compute in the types that the graph carries, so the graph decides what stays in float32:

1. what the lowering wrapped around the quantizers (pre-multiply, shift, undoing, bias per group): pointwise work that
   is fused and costs nothing, but a bfloat16 pre-multiply would round away up to half an INT8 step;
2. what only depends on the timestep, up to its first product: sines of angles up to 1000 need the bits;
3. in float16, every node that makes or reads a tensor whose calibrated abs-max is above 16384, a quarter of what the
   type can hold, or a constant that it cannot hold;
4. constants that would round to zero (an epsilon of 1e-15), and the nodes that read them; in float16, products whose
   scales would lose bits.

Inputs and outputs of the graph keep their types.  A quantizer's scale is rounded to the half type in both its halves,
so that it means the same number in each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantempo.export.lowering import GROUP_INPUT
from quantempo.export.passes.edit import add_constant
from quantempo.export.unfold import UNFOLDED
from quantempo.export.weights import SCALE_FLOOR

HalfType = Literal["float16", "bfloat16"]

BFLOAT16_OPSET = 22
OVERFLOW = 16384.0
"""Calibrated abs-max from which on a tensor stays in float32 in a float16 graph."""
_TYPES: dict[HalfType, tuple[ir.DataType, Any]] = {
    "float16": (ir.DataType.FLOAT16, np.float16), "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}
_LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38}
_NORMAL = 2.0**-14
"""The smallest float16 with all its bits."""
_FLOAT = ir.DataType.FLOAT
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_PRODUCTS = ("MatMul", "Conv", "Gemm", "ConvTranspose")
_AROUND = (".shrunk", ".shifted", ".clipped", ".grown", ".biased", ".correction", ".bias")
"""Ends of the names that the lowerings give to what stands around a quantizer."""
_FLOAT_INPUTS = {"Resize": (1, 2)}
"""Inputs that are float32 by the operator's definition."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Args:
        half, kept: nodes in the half type, and nodes that compute in float32 for a reason.
        reasons: how many nodes each reason kept.
        casts: inserted.
    """

    half: int
    kept: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    casts: int = 0


def to_half(model: ir.Model, kind: HalfType, ranges: Mapping[str, float]) -> Converted:
    """Convert a lowered float32 graph in place.

    Args:
        model: from `lower_portable`, `lower_fp8`, or a float graph.
        kind: the half type.
        ranges: calibrated abs-max of the float graph's values by name; a value without one is taken to be small.
    """
    conversion = _Conversion(model.graph, kind, ranges)
    converted = conversion.run()
    if kind == "bfloat16":
        # Convolutions take bfloat16 from opset 22 on, which else only widens types.
        model.opset_imports[""] = max(BFLOAT16_OPSET, model.opset_imports.get("", 0))
    model.metadata_props["quantempo.float_type"] = kind
    return converted


def float_values(model: ir.Model) -> dict[str, int]:
    """Every float32 value that a node makes, graph outputs apart, with its elements per row of the batch."""
    found = {}
    for value in (value for node in model.graph for value in node.outputs):
        if value.dtype == _FLOAT and not value.is_graph_output():
            found[str(value.name)] = math.prod(size for size in value.shape or () if isinstance(size, int))
    return found


class _Conversion:
    """One run over a graph."""

    def __init__(self, graph: ir.Graph, kind: HalfType, ranges: Mapping[str, float]) -> None:
        self.graph, self.kind = graph, kind
        self.dtype, self.numpy = _TYPES[kind]
        self.ranges = ranges
        self.reasons: dict[ir.Node, str] = {}
        self.constants: dict[tuple[ir.Value, bool], ir.Value] = {}
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> Converted:
        nodes = [node for node in self.graph if _is_float(node)]
        self._choose(nodes)
        outputs = [(value, value.name) for value in self.graph.outputs if value.dtype == _FLOAT]
        for node in nodes:
            if node.op_type in _QUANTIZERS:
                self._quantizer(node)
            else:
                self._node(node)
        for value, name in outputs:
            self._restore(value, name)
        self._sweep()
        counts: dict[str, int] = {}
        for reason in self.reasons.values():
            counts[reason] = counts.get(reason, 0) + 1
        return Converted(len(nodes) - len(self.reasons), len(self.reasons), counts, len(self.casts))

    # ------------------------------------------------------------------------------------------- what stays in float32

    def _choose(self, nodes: Sequence[ir.Node]) -> None:
        timed = self._of_the_timestep(nodes)
        for node in nodes:
            reason = self._reason(node, timed)
            if reason:
                self.reasons[node] = reason

    def _reason(self, node: ir.Node, timed: set[ir.Node]) -> str:
        """Why a node stays in float32; empty where it does not."""
        if node in timed:
            return "timestep"
        if self._stands_around(node):
            return "around a quantizer"
        if node.op_type in _PRODUCTS and self.kind == "float16" and self._small_scales(node):
            return "scale"
        for value in (*node.inputs, *node.outputs):
            if value is None or value.dtype != _FLOAT:
                continue
            if value.const_value is None:
                if self.kind == "float16" and self._range(value) > OVERFLOW:
                    return "overflow"
            elif node.op_type not in _QUANTIZERS and not self._holds(value):
                return "constant"
        return ""

    def _range(self, value: ir.Value) -> float:
        """Calibrated abs-max; that of a site's result also for the bare product in front of it."""
        name = str(value.name).partition(UNFOLDED)[0]
        return max(self.ranges.get(name, 0.0), self.ranges.get(name.removesuffix(".product"), 0.0))

    def _stands_around(self, node: ir.Node) -> bool:
        """Whether the lowering put it in front of a quantizer or behind a quantized product."""
        first = node.inputs[0] if node.inputs else None
        if node.op_type == "QuantizeLinear":
            maker = first.producer() if first is not None else None
            return maker is not None and self.reasons.get(maker) == "around a quantizer"
        if node.op_type == "Gather":
            return node.inputs[1] is not None and node.inputs[1].name == GROUP_INPUT
        if node.op_type == "Split":
            # The looked-up numbers of the whole graph come out of one row.
            row = first.producer() if first is not None else None
            return row is not None and self.reasons.get(row) == "around a quantizer"
        if node.op_type not in ("Mul", "Add", "Clip"):
            return False
        # What ends a site has taken over the site's name, so the node's own name counts too.
        own, made = str(node.name).rpartition("/")[0], str(node.outputs[0].name)
        return made.endswith(_AROUND) or own.endswith(_AROUND)

    @staticmethod
    def _small_scales(node: ir.Node) -> bool:
        """Whether a product's dequantizers have scales that are subnormal in float16 and stand for something."""
        for value in node.inputs[:2]:
            maker = value.producer() if value is not None else None
            if maker is not None and maker.op_type == "Transpose":
                first = maker.inputs[0]
                maker = first.producer() if first is not None else None
            scale = maker.inputs[1] if maker is not None and maker.op_type == "DequantizeLinear" else None
            if scale is not None and scale.const_value is not None:
                array = np.asarray(scale.const_value.numpy(), np.float32)
                if np.any((array < _NORMAL) & (array > SCALE_FLOOR)):
                    return True
        return False

    def _holds(self, value: ir.Value) -> bool:
        """Whether a constant survives in the half type: no overflow, and nothing but zeros becomes zero."""
        assert value.const_value is not None
        if value.const_value.size > 1 << 16 and self.kind == "bfloat16":
            return True
        array = np.abs(np.asarray(value.const_value.numpy(), np.float32))
        if not array.size:
            return True
        if float(array.max()) > _LARGEST[self.kind]:
            return False
        # In a large tensor single values below the smallest number do no harm; a lone epsilon does.
        return array.size > 16 or not np.any((array > 0) & (array.astype(self.numpy) == 0))

    def _of_the_timestep(self, nodes: Sequence[ir.Node]) -> set[ir.Node]:
        """Nodes that depend on inputs of rank 1 alone (the timestep), before any product."""
        clocks = {value for value in self.graph.inputs if value.shape is not None and len(value.shape) <= 1}
        found: set[ir.Node] = set()
        for node in self.graph:
            computed = [value for value in node.inputs if value is not None and value.const_value is None]
            if not computed or node.op_type in (*_PRODUCTS, *_QUANTIZERS, "Gather"):
                continue
            if all(value in clocks for value in computed):
                clocks.update(node.outputs)
                found.add(node)
        return found & set(nodes)

    # ---------------------------------------------------------------------------------------------------- the rewriting

    def _node(self, node: ir.Node) -> None:
        keep = node in self.reasons
        wanted = _FLOAT if keep else self.dtype
        if node.op_type in ("Cast", "CastLike"):
            self._cast_node(node, wanted)
            return
        fixed = _FLOAT_INPUTS.get(node.op_type, ())
        for index, value in enumerate(node.inputs):
            if value is not None and index not in fixed:
                node.replace_input_with(index, self._as(value, wanted))
        for value in node.outputs:
            if value.dtype == _FLOAT:
                _retype(value, wanted)

    def _cast_node(self, node: ir.Node, wanted: ir.DataType) -> None:
        if node.outputs[0].dtype == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(wanted))
            _retype(node.outputs[0], wanted)

    def _quantizer(self, node: ir.Node) -> None:
        """A quantizer takes its input as it is, and a scale of its type; a dequantizer makes what its product takes."""
        value, scale = node.inputs[0], node.inputs[1]
        assert value is not None
        assert scale is not None
        if node.op_type == "QuantizeLinear":
            wanted = _FLOAT if node in self.reasons or value.dtype == _FLOAT else self.dtype
            if value.const_value is not None:
                node.replace_input_with(0, self._as(value, wanted))
            node.replace_input_with(1, self._scale(scale, wanted))
            return
        readers = {use.node for use in node.outputs[0].uses()}
        floats = {reader for reader in readers if reader in self.reasons}
        if floats and floats != readers:
            self._twin(node, floats)
        wanted = _FLOAT if readers and floats == readers else self.dtype
        _retype(node.outputs[0], wanted)
        # A weight's scale has no other half to agree with.
        free = wanted == _FLOAT and value.const_value is not None
        if not free:
            node.replace_input_with(1, self._scale(scale, wanted))

    def _twin(self, node: ir.Node, readers: set[ir.Node]) -> None:
        """A second dequantizer for the readers in float32: a cast between it and a product could stop the fusion."""
        scale, value = node.inputs[1], node.outputs[0]
        assert scale is not None
        stored = node.inputs[0] is not None and node.inputs[0].const_value is not None
        inputs = [node.inputs[0], scale if stored else self._scale(scale, _FLOAT), *node.inputs[2:]]
        attributes = {key: attribute.value for key, attribute in node.attributes.items()}
        twin = ir.node("DequantizeLinear", inputs, attributes=attributes)
        self.graph.insert_after(node, twin)
        made = twin.outputs[0]
        made.name, made.shape, twin.name = f"{value.name}.float", value.shape, f"{value.name}.float/DequantizeLinear"
        _retype(made, _FLOAT)
        for reader, index in list(value.uses()):
            if reader in readers:
                reader.replace_input_with(index, made)

    def _scale(self, scale: ir.Value, wanted: ir.DataType) -> ir.Value:
        """A scale rounded to the half type, stored in the wanted one."""
        if scale.const_value is None:
            return scale
        return self._constant(scale, wanted, rounded=True)

    def _as(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if value.dtype is None or value.dtype == wanted or value.dtype not in (_FLOAT, self.dtype):
            return value
        if value.const_value is not None:
            return self._constant(value, wanted) if wanted != _FLOAT else value
        return self._cast(value, wanted)

    def _constant(self, value: ir.Value, wanted: ir.DataType, rounded: bool = False) -> ir.Value:
        key = (value, wanted == _FLOAT)
        if key not in self.constants:
            assert value.const_value is not None
            array: NDArray[Any] = np.asarray(value.const_value.numpy(), np.float32)
            limit = _LARGEST[self.kind]
            half = np.clip(array, -limit, limit).astype(self.numpy)
            if rounded:
                # No scale may become zero.
                half = np.where(half.astype(np.float32) == 0, 2.0**-24, half.astype(np.float32)).astype(self.numpy)
            stored = half.astype(np.float32) if wanted == _FLOAT else half
            self.constants[key] = add_constant(self.graph, stored, f"{value.name}.{wanted.name.lower()}")
        return self.constants[key]

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        key = (value, wanted)
        if key not in self.casts:
            maker = value.producer()
            node = ir.node("Cast", [value], {"to": int(wanted)})
            # Right behind what makes the value, so that every later reader finds the cast in front of it.
            if maker is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(maker, node)
            made = node.outputs[0]
            _retype(made, wanted)
            made.shape = value.shape
            made.name = f"{value.name}.{wanted.name.lower()}"
            node.name = f"{made.name}/Cast"
            self.casts[key] = made
        return self.casts[key]

    def _restore(self, value: ir.Value, name: str | None) -> None:
        """A graph output stays float32."""
        if value.dtype == _FLOAT:
            return
        value.name = f"{name}.{self.kind}"
        node = ir.node("Cast", [value], {"to": int(_FLOAT)}, name=f"{name}/Cast")
        self.graph.append(node)
        made = node.outputs[0]
        _retype(made, _FLOAT)
        made.shape, made.name = value.shape, name
        outputs = self.graph.outputs
        outputs[list(outputs).index(value)] = made

    def _sweep(self) -> None:
        """Drop the float32 constants that nothing reads any more."""
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]


def _retype(value: ir.Value, dtype: ir.DataType) -> None:
    """Set an element type.  A clone shares its type objects with the original, so a new one is made."""
    value.type = ir.TensorType(dtype)


def _is_float(node: ir.Node) -> bool:
    """Whether float32 goes in or comes out."""
    return any(value is not None and value.dtype == _FLOAT for value in (*node.inputs, *node.outputs))
