"""The `portable` dialect: standard QDQ with constant symmetric scales, for TensorRT, TensorRT-RTX and OpenVINO.

These compilers want a constant, symmetric `S8` scale; a scale that comes out of a table makes them fall back to float.
So the change from group to group is moved out of the quantizer.  With `s_g`, `z_g` a tensor's scale and zero point in
group `g`, `h = 2^(bits-1)` and a constant `s0`, the largest power of two that is at most every `s_g`:

    r_g = s0 / s_g,   c_g = (z_g - h) · s0
    q   = Q(x · r_g + c_g; s0)            the integers of the affine quantizer, minus h
    y   = (DQ(q) @ W) / r_g - (c_g / r_g) · colsum(W) + b

`r_g <= 1`, so no intermediate grows, and `c_g` is an integer times a power of two: engines that compute the rest of the
graph in 16 bits shift by exactly that number.  `colsum(W)` is taken over the dequantized weight: the correction is
exact for the values that the product really uses.  A convolution's padding must stay exactly zero, so its quantizer is
symmetric and `c_g = 0`; outputs are not quantized.  With one group or a symmetric quantizer the parts that do nothing
are left out.

Fewer than 8 activation bits are simulated: a `Clip` in front of the 8-bit quantizer, to `[-h · s0, (h - 1) · s0]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantempo.contracts.plan import Site
from quantempo.export.lowering import (
    GROUP_INPUT,
    ActivationKey,
    Lowering,
    PlacedSite,
    describe,
    dialect,
)
from quantempo.export.weights import output_axis, weight_of


@dialect()
def lower_portable(lowering: Lowering) -> ir.Model:
    """The quantized graph in standard ONNX."""
    rescaled: dict[ActivationKey, Rescaled] = {}
    for place in lowering.places:
        key = activation_key(place)
        if key not in rescaled:
            rescaled[key] = _quantize(lowering, place, key)
        product(lowering, place, rescaled[key])
    outputs = {site.output for site in lowering.plan.quantized() if site.op == "conv"}
    read = {key.tensor for key in rescaled}
    _share_look_ups(lowering)
    return lowering.finish("portable", unused=outputs - read)


def _share_look_ups(lowering: Lowering) -> None:
    """Look all single numbers up at once: one row of one table, then split.

    A graph has hundreds of them, and on OpenVINO a Gather of its own costs more than the arithmetic that it feeds
    (measured: 3 % of the time of DiT-S/2).
    """
    graph = lowering.graph
    single = [node for node in graph if _looks_one_number_up(node)]
    if len(single) < 2:
        return
    tables = [value for node in single if (value := node.inputs[0]) is not None]
    columns = [value.const_value.numpy() for value in tables if value.const_value is not None]
    table = lowering.constant("scalars.table", np.stack(columns, 1))
    row = lowering.node(None, "Gather", [table, single[0].inputs[1]], "scalars", axis=0)
    describe(row, table.dtype, ir.Shape([len(single)]))
    names = [f"{node.outputs[0].name}.split" for node in single]
    numbers = lowering.nodes(None, "Split", [row], names, axis=0, num_outputs=len(names))
    for node, number, old in zip(single, numbers, tables, strict=True):
        describe(number, table.dtype, ir.Shape([1]))
        name = node.outputs[0].name
        node.outputs[0].replace_all_uses_with(number)
        graph.remove(node, safe=True)
        node.outputs[0].name, number.name = None, name
        del graph.initializers[old.name or ""]


def _looks_one_number_up(node: ir.Node) -> bool:
    table, group = (*node.inputs, None, None)[:2]
    return (
        node.op_type == "Gather" and group is not None and group.name == GROUP_INPUT
        and table is not None and table.const_value is not None and len(table.const_value.shape) == 1
    )


def activation_key(place: PlacedSite) -> ActivationKey:
    """The quantizer that a site reads its activation through; a convolution's is always symmetric."""
    symmetric = place.settings.symmetric or place.site.op == "conv"
    return ActivationKey(place.site.tensor, symmetric, place.settings.activation_bits)


@dataclass(frozen=True, eq=False)
class AffineForm:
    """One tensor's quantizer with the groups moved out of it; arrays have the length `groups`.

    Args:
        base: `s0`.
        shrink: `r_g`, rounded to float32 before the rest is derived from it, so that all parts agree.
        offset: `c_g`.
        grow: `1 / r_g`.
        correction: `c_g / r_g`.
    """

    base: np.float32
    shrink: NDArray[np.float32]
    offset: NDArray[np.float32]
    grow: NDArray[np.float32]
    correction: NDArray[np.float32]

    @staticmethod
    def of(scale: NDArray[np.float32], zero_point: NDArray[np.int32], bits: int) -> AffineForm:
        """The form of a quantizer with the given scale and zero point per group."""
        # With one scale there is nothing to rescale; otherwise a power of two keeps the offset exact in half precision.
        varies = scale.min() < scale.max()
        base = np.float32(2.0 ** np.floor(np.log2(scale.min()))) if varies else np.float32(scale.min())
        shrink = (base / scale.astype(np.float64)).astype(np.float32)
        offset = ((zero_point - 2 ** (bits - 1)) * np.float64(base)).astype(np.float32)
        exact = shrink.astype(np.float64)
        return AffineForm(
            base, shrink, offset, (1 / exact).astype(np.float32), (offset / exact).astype(np.float32)
        )


@dataclass(frozen=True, eq=False)
class Rescaled:
    """A quantized and dequantized activation, and what undoes its rescaling; `None` where there is nothing to undo.

    Args:
        corrections: `c_g / r_g` per group.
    """

    name: str
    value: ir.Value
    grow: ir.Value | None = None
    corrections: NDArray[np.float32] | None = None


def _quantize(lowering: Lowering, place: PlacedSite, key: ActivationKey) -> Rescaled:
    form = AffineForm.of(*lowering.scales(key), key.bits)
    name = f"{key.tensor}.{'symmetric' if key.symmetric else 'affine'}{key.bits}"
    here, shape = place.node, place.activation.shape
    value = place.activation
    state = Rescaled(name, value)

    def step(operator: str, inputs: list[ir.Value], suffix: str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        result = lowering.node(here, operator, inputs, f"{name}.{suffix}")
        describe(result, dtype, shape)
        return result

    if np.any(form.shrink != 1):
        value = step("Mul", [value, lowering.lookup(f"{name}.shrink", form.shrink)], "shrunk")
        state = replace(state, grow=lowering.lookup(f"{name}.grow", form.grow))
    if np.any(form.offset != 0):
        value = step("Add", [value, lowering.lookup(f"{name}.offset", form.offset)], "shifted")
        state = replace(state, corrections=form.correction)
    if lowering.options.quantization:
        if key.bits < 8:
            half = 2 ** (key.bits - 1)
            low = lowering.constant(f"{name}.low", np.float32(-half * np.float64(form.base)))
            high = lowering.constant(f"{name}.high", np.float32((half - 1) * np.float64(form.base)))
            value = step("Clip", [value, low, high], "clipped")
        scale = lowering.constant(f"{name}.scale", form.base)
        zero = lowering.constant("activation.zero_point", np.int8(0))
        value = step("QuantizeLinear", [value, scale, zero], "quantized", ir.DataType.INT8)
        value = step("DequantizeLinear", [value, scale, zero], "dequantized")
    return replace(state, value=value)


def product(lowering: Lowering, place: PlacedSite, activation: Rescaled) -> None:
    """Put the product of a quantized activation and the site's quantized weight in the site's place."""
    site, here = place.site, place.node
    weight = place.node.inputs[1]
    if lowering.options.quantization:
        integers, scale = lowering.weight_constants(site)
        weight = lowering.node(
            here, "DequantizeLinear", [integers, scale], f"{site.output}.weight", axis=output_axis(site)
        )
        describe(weight, ir.DataType.FLOAT, integers.shape)
    operator = "MatMul" if site.op == "matmul" else "Conv"
    result = lowering.node(here, operator, [activation.value, weight], f"{site.output}.product")
    shape = here.outputs[0].shape
    describe(result, ir.DataType.FLOAT, shape)
    producer = result.producer()
    assert producer is not None
    for attribute in here.attributes.values():
        producer.attributes.add(attribute)
    if activation.grow is not None:
        result = lowering.node(here, "Mul", [result, activation.grow], f"{site.output}.grown")
        describe(result, ir.DataType.FLOAT, shape)
    row = _row(lowering, place, activation) if site.op == "matmul" else None
    if row is not None:
        result = lowering.node(here, "Add", [result, row], f"{site.output}.biased")
    # A convolution's bias, if any, stays the Add that it is.
    lowering.replace(place, result, bias_included=row is not None)


def _row(lowering: Lowering, place: PlacedSite, activation: Rescaled) -> ir.Value | None:
    """`b - (c_g / r_g) · colsum(W)`, a row of `n` values; `None` where there is neither bias nor correction."""
    site = place.site
    # Of the product's rank: ONNX Runtime makes a Gemm of a product with a bias of rank 1, and on graphs of this opset
    # its optimizer then trips over the quantizer in front of it ("output_dtype INT8 does not match").
    shape = [1] * (site.rank - 1) + [site.n]
    rows = lowering.bias_rows(place)
    if rows is not None:
        # The bias differs from group to group anyway, so the correction goes into it.
        if activation.corrections is not None:
            rows = rows - activation.corrections.astype(np.float64)[:, None] * _column_sums(lowering, site)
        return lowering.lookup(f"{site.output}.bias", rows.astype(np.float32).reshape(-1, *shape))
    bias = None
    if place.bias is not None:
        assert place.bias.const_value is not None
        bias = lowering.constant(f"{place.bias.name}.row", place.bias.const_value.numpy().reshape(shape))
    if activation.corrections is None:
        return bias
    # Negated sums, so that a missing bias costs no further node.
    column = lowering.constant(f"{site.weight}.minus_column_sums", -_column_sums(lowering, site).reshape(shape))
    correction = lowering.lookup(f"{activation.name}.correction", activation.corrections)
    row = lowering.node(place.node, "Mul", [column, correction], f"{site.output}.correction")
    if bias is not None:
        row = lowering.node(place.node, "Add", [row, bias], f"{site.output}.bias")
    return row


def _column_sums(lowering: Lowering, site: Site) -> NDArray[np.float32]:
    if lowering.options.quantization:
        return lowering.weights[site.weight].column_sums()
    sums: NDArray[np.float32] = weight_of(lowering.model, site).sum(0, np.float64).astype(np.float32)
    return sums
