"""Quantized attention: quantizers on the operands of the products inside every decomposed attention.

The compilers fuse the pattern into one kernel on 8-bit operands when each quantizer stands right in front of its
product: queries scaled before they are quantized, keys transposed before, and the probabilities, which lie in [0, 1]
whatever the data, with the constant scale 1/448 (E4M3) or 1/127 (INT8).

Either both products are quantized, or the scores `Q Kᵀ` alone: in INT8 the probabilities of a row that looks at many
tokens are a few steps of 1/127, so that the second product loses more than the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from quantempo.errors import ScaleMissing
from quantempo.export.fp8 import LEAST_SCALE, fp8_scale
from quantempo.export.passes.edit import add_constant, insert_node, producer, sole_reader

Format = Literal["fp8", "int8"]
Products = Literal["both", "scores"]
"""Which of attention's two products are quantized."""

MARGIN = {"fp8": 2.0, "int8": 1.0}
"""Factor on the calibrated abs-max: room that costs nothing in a floating-point format, and half a bit in INT8."""
TOP = {"fp8": 448.0, "int8": 127.0}
SUFFIX = ".attention"
PROBABILITY = {"fp8": np.float32(1 / 448), "int8": np.float32(1 / 127)}
"""Scale of the probabilities."""
HEAD_SIZES = {"fp8": (9, 256), "int8": (9, 256)}
LONGEST = {"fp8": 1 << 30, "int8": 512}
"""Head sizes and sequence lengths for which the fused kernels exist and pay (docs/dialects.md); for scores alone any
length pays."""


@dataclass(frozen=True, eq=False)
class Attention:
    """One decomposed attention.

    Args:
        scores, mix: its two products.
        probabilities: what the softmax gives.
    """

    scores: ir.Node
    mix: ir.Node
    probabilities: ir.Value

    @property
    def operands(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries, keys and values as the products read them."""
        query, key, value = self.scores.inputs[0], self.scores.inputs[1], self.mix.inputs[1]
        assert query is not None
        assert key is not None
        assert value is not None
        return query, key, value


def find_attention(
    model: ir.Model, kind: Format | None = None, products: Products = "both"
) -> tuple[Attention, ...]:
    """Every `MatMul(Softmax(MatMul(q, k) [+ mask]), v)` on computed operands of rank 4, in graph order.

    Args:
        model: float or lowered graph.
        kind: leave out those whose head size or length does not suit this format.
        products: what is to be quantized.
    """
    found = []
    for node in model.graph:
        if node.op_type != "Softmax":
            continue
        mix = sole_reader(node.outputs[0], "MatMul")
        scores = producer(node.inputs[0], "MatMul")
        masked = producer(node.inputs[0], "Add")
        if scores is None and masked is not None:
            scores = producer(masked.inputs[0], "MatMul") or producer(masked.inputs[1], "MatMul")
        if mix is None or scores is None or mix.inputs[0] is not node.outputs[0]:
            continue
        attention = Attention(scores, mix, node.outputs[0])
        computed = not any(value.is_initializer() for value in attention.operands)
        if computed and (kind is None or _suits(attention, kind, products)):
            found.append(attention)
    return tuple(found)


def _suits(attention: Attention, kind: Format, products: Products) -> bool:
    query, key, _ = attention.operands
    if query.shape is None or key.shape is None or len(query.shape) != 4 or len(key.shape) != 4:
        return False
    size, length = query.shape[-1], key.shape[-1]
    low, high = HEAD_SIZES[kind]
    short = products == "scores" or not isinstance(length, int) or length <= LONGEST[kind]
    return isinstance(size, int) and low <= size <= high and short


def attention_tensors(model: ir.Model, kind: Format, products: Products = "both") -> tuple[str, ...]:
    """The tensors whose abs-max `quantize_attention` needs, sorted."""
    count = 3 if products == "both" else 2
    return tuple(sorted({str(v.name) for a in find_attention(model, kind, products) for v in a.operands[:count]}))


def quantize_attention(
    model: ir.Model, ranges: Mapping[str, float], kind: Format, products: Products = "both"
) -> int:
    """Put the quantizers in, in place.

    Args:
        model: a lowered graph, float32.
        ranges: calibrated abs-max by value name.
        kind: number format.
        products: which of the two products are quantized.

    Returns:
        How many attentions are quantized.

    Raises:
        ScaleMissing: an operand has no range.
    """
    found = find_attention(model, kind, products)
    for attention in found:
        query, key, value = attention.operands
        places = [(attention.scores, 0, query), (attention.scores, 1, key)]
        if products == "both":
            places.append((attention.mix, 1, value))
            _put(model.graph, attention.mix, 0, PROBABILITY[kind], kind)
        for node, index, operand in places:
            _put(model.graph, node, index, _scale(str(operand.name), ranges, kind), kind)
    return len(found)


def stored_ranges(model: ir.Model, kind: Format) -> dict[str, float]:
    """The ranges that a graph's attention was quantized with, so that it can be lowered again."""
    found = {}
    for name, value in model.graph.initializers.items():
        operand = name.removesuffix(f"{SUFFIX}.scale")
        if operand != name and value.const_value is not None:
            scale = float(value.const_value.numpy())
            # A hair less: the scale is rounded up to the next number of the format, and must be this one again.
            found[operand] = scale * TOP[kind] / MARGIN[kind] * (1 - 2.0**-20)
    return found


def stored_products(model: ir.Model) -> Products | None:
    """Which products of a graph's attention are quantized; `None` for neither."""
    ending = f"{SUFFIX}.scale"
    scaled = {name.removesuffix(ending) for name in model.graph.initializers if name.endswith(ending)}
    if not scaled:
        return None
    return "both" if any(n.op_type == "Softmax" and n.outputs[0].name in scaled for n in model.graph) else "scores"


def _scale(name: str, ranges: Mapping[str, float], kind: Format) -> np.float32:
    if name not in ranges:
        raise ScaleMissing(
            f"attention operand {name!r}", found="no calibrated range", wanted="its abs-max",
            cause="the range scan was made for another graph", remedy="scan the ranges of this graph",
        )
    largest = MARGIN[kind] * ranges[name]
    if kind == "fp8":
        return np.float32(fp8_scale(np.float64(largest)))
    return np.float32(max(largest / TOP[kind], LEAST_SCALE))


def _put(graph: ir.Graph, node: ir.Node, index: int, scale: np.float32, kind: Format) -> None:
    value = node.inputs[index]
    assert value is not None
    name = f"{value.name}{SUFFIX}"
    dtype = ml_dtypes.float8_e4m3fn if kind == "fp8" else np.int8
    factor = add_constant(graph, np.asarray(scale), f"{name}.scale")
    zero = add_constant(graph, np.zeros((), dtype), f"{name}.zero_point")
    quantized = insert_node(node, "QuantizeLinear", [value, factor, zero]).outputs[0]
    real = insert_node(node, "DequantizeLinear", [quantized, factor, zero]).outputs[0]
    for made, suffix in ((quantized, "quantized"), (real, "dequantized")):
        made.name, made.shape = f"{name}.{suffix}", value.shape
        maker = made.producer()
        assert maker is not None
        maker.name = f"{made.name}/{maker.op_type}"
    quantized.dtype = ir.DataType.FLOAT8E4M3FN if kind == "fp8" else ir.DataType.INT8
    real.dtype = ir.DataType.FLOAT
    node.replace_input_with(index, real)
