"""The `ort` dialect: INT8 for ONNX Runtime's CPU kernels, with scales and zero points that are looked up at run time.

Activations are unsigned (`U8`), weights signed (`S8`): the pair that x86 processors multiply directly.  All activation
scales of a graph lie in one table `[group, tensor]` and the zero points in another; the scalar input `scale_group`
picks a row of each.  A matrix product becomes `com.microsoft.MatMulIntegerToFloat` with its bias, a convolution
`QuantizeLinear → QLinearConv → DequantizeLinear → Add(bias)`.  These operators are written out, not left to the
runtime's pattern matching: its fusions miss matrix products of rank 2, whose bias it merges into a float Gemm first.

Fewer than 8 activation bits are simulated: a `Clip` to the range of the narrower format, then the 8-bit quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantempo.export.for_ort import tune
from quantempo.export.lowering import (
    CONTRIB,
    ActivationKey,
    Lowering,
    PlacedSite,
    describe,
    dialect,
)

Quantizer = tuple[ir.Value, ir.Value]
"""Scale and zero point, as values of the graph."""


@dialect()
def lower_ort(lowering: Lowering) -> ir.Model:
    """The quantized graph for ONNX Runtime."""
    if lowering.options.quantization:
        _integers(lowering)
    else:
        for place in lowering.places:
            _float(lowering, place)
    lowered = lowering.finish("ort")
    tune(lowered)
    forget_inner_shapes(lowered)
    lowered.opset_imports.setdefault(CONTRIB, 1)
    return lowered


def forget_inner_shapes(model: ir.Model) -> None:
    """Drop types and shapes of inner values, in place; sums keep theirs.

    ONNX Runtime infers what it needs, a session holds less, and a file is a fifth smaller.  Only its fusion of a sum
    with the norm that reads it goes by what the file says: without it the graphs of one model would be fused unlike.
    """
    outputs = set(model.graph.outputs)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value not in outputs and node.op_type != "Add":
                value.type = value.shape = None


def _integers(lowering: Lowering) -> None:
    quantizers = _look_up(lowering)
    quantized: dict[ActivationKey, ir.Value] = {}
    for place in lowering.places:
        key = activation_key(place)
        if key not in quantized:
            quantized[key] = _quantize(lowering, place, key, quantizers[key])
        if place.site.op == "matmul":
            _matmul(lowering, place, quantized[key], quantizers[key])
        else:
            _conv(lowering, place, quantized[key], quantizers[key], quantizers[output_key(place)])


def activation_key(place: PlacedSite) -> ActivationKey:
    """The quantizer that a site reads its activation through."""
    return ActivationKey(place.site.tensor, place.settings.symmetric, place.settings.activation_bits)


def output_key(place: PlacedSite) -> ActivationKey:
    """The quantizer of a convolution's output: always 8 bits, since it is only there for `QLinearConv`."""
    return ActivationKey(place.site.output, False, 8)


def _look_up(lowering: Lowering) -> dict[ActivationKey, Quantizer]:
    """Scale and zero point of every quantizer for the current group: two Gathers and two Splits for the whole graph.

    A zero point that is the same in all groups becomes a constant: with it ONNX Runtime packs a convolution's weight
    for its faster kernel (measured: a tenth of the convolution's time).
    """
    keys = sorted(
        {activation_key(place) for place in lowering.places}
        | {output_key(place) for place in lowering.places if place.site.op == "conv"}
    )
    scales = {key: lowering.scales(key)[0].astype(np.float32) for key in keys}
    points = {key: lowering.scales(key)[1].astype(np.uint8) for key in keys}
    scale_values = _rows(lowering, "scale", scales)
    point_values = _rows(lowering, "zero_point", {key: row for key, row in points.items() if np.ptp(row) > 0})
    for key, row in points.items():
        if key not in point_values:
            point_values[key] = lowering.constant(f"zero_point.{row[0]}", row[0])
    return {key: (scale_values[key], point_values[key]) for key in keys}


def _rows(
    lowering: Lowering, kind: str, columns: Mapping[ActivationKey, NDArray[np.generic]]
) -> dict[ActivationKey, ir.Value]:
    """The current group's entry of every column: one table, one Gather, one Split."""
    if lowering.options.group is not None:
        row = lowering.options.group
        return {key: lowering.constant(f"{_name(key)}.{kind}", column[row]) for key, column in columns.items()}
    if not columns:
        return {}
    now = lowering.lookup(f"activation.{kind}", np.stack(list(columns.values()), 1))
    names = [f"{_name(key)}.{kind}" for key in columns]
    split = lowering.nodes(None, "Split", [now], names, axis=0, num_outputs=len(names))
    for value in split:
        describe(value, now.dtype, ir.Shape([1]))
    return dict(zip(columns, split, strict=True))


def _name(key: ActivationKey) -> str:
    form = "symmetric" if key.symmetric else "affine"
    return f"{key.tensor}.{form}{key.bits}"


def _quantize(lowering: Lowering, place: PlacedSite, key: ActivationKey, quantizer: Quantizer) -> ir.Value:
    value = place.activation
    if key.bits < 8:
        scale, point = lowering.scales(key)
        low = (-point * scale.astype(np.float64)).astype(np.float32)
        high = ((2**key.bits - 1 - point) * scale.astype(np.float64)).astype(np.float32)
        bounds = [lowering.lookup(f"{_name(key)}.low", low), lowering.lookup(f"{_name(key)}.high", high)]
        value = lowering.node(place.node, "Clip", [value, *bounds], f"{_name(key)}.clipped")
        describe(value, ir.DataType.FLOAT, place.activation.shape)
    quantized = lowering.node(place.node, "QuantizeLinear", [value, *quantizer], f"{_name(key)}.quantized")
    describe(quantized, ir.DataType.UINT8, place.activation.shape)
    return quantized


def _matmul(lowering: Lowering, place: PlacedSite, activation: ir.Value, quantizer: Quantizer) -> None:
    weight, weight_scale = lowering.weight_constants(place.site)
    inputs: list[ir.Value | None] = [activation, weight, quantizer[0], weight_scale, quantizer[1]]
    row = _bias_row(lowering, place)
    if row is not None:
        inputs += [None, row]
    result = lowering.node(
        place.node, f"{CONTRIB}::MatMulIntegerToFloat", inputs, f"{place.site.output}.product"
    )
    lowering.replace(place, result, bias_included=True)


def _bias_row(lowering: Lowering, place: PlacedSite) -> ir.Value | None:
    """The bias as `[n]`, which is what the operator takes; that of the group where the tensor is centred."""
    rows = lowering.bias_rows(place)
    if rows is not None:
        return lowering.lookup(f"{place.site.output}.bias", rows.astype(np.float32))
    bias = place.bias
    if bias is None:
        return None
    assert bias.const_value is not None
    if len(bias.const_value.shape) == 1:
        return bias
    return lowering.constant(f"{bias.name}.row", bias.const_value.numpy().reshape(-1))


def _conv(
    lowering: Lowering, place: PlacedSite, activation: ir.Value, quantizer: Quantizer, output: Quantizer
) -> None:
    weight, weight_scale = lowering.weight_constants(place.site)
    zero = lowering.constant("weight.zero_point", np.int8(0))
    product = place.node.outputs[0]
    quantized = lowering.node(
        place.node,
        "QLinearConv",
        [activation, quantizer[0], quantizer[1], weight, weight_scale, zero, output[0], output[1]],
        f"{place.site.output}.quantized",
    )
    producer = quantized.producer()
    assert producer is not None
    for attribute in place.node.attributes.values():
        producer.attributes.add(attribute)
    describe(quantized, ir.DataType.UINT8, product.shape)
    real = lowering.node(
        place.node, "DequantizeLinear", [quantized, *output], f"{place.site.output}.dequantized"
    )
    lowering.replace(place, real, bias_included=False)


def _float(lowering: Lowering, place: PlacedSite) -> None:
    """The same edit without integers."""
    lowering.tensor_scales(place.site.tensor)
    weight = place.node.inputs[1]
    if place.site.op == "matmul":
        result = lowering.node(place.node, "MatMul", [place.activation, weight], f"{place.site.output}.product")
        row = _bias_row(lowering, place)
        if row is not None:
            result = lowering.node(place.node, "Add", [result, row], f"{place.site.output}.biased")
        lowering.replace(place, result, bias_included=True)
        return
    result = lowering.node(place.node, "Conv", [place.activation, weight], f"{place.site.output}.product")
    producer = result.producer()
    assert producer is not None
    for attribute in place.node.attributes.values():
        producer.attributes.add(attribute)
    lowering.replace(place, result, bias_included=False)
