"""The `ort` dialect: INT8 for ONNX Runtime's CPU kernels, with scales and zero points that are looked up at run time.

Activations are unsigned (`U8`), weights signed (`S8`): the pair that x86 processors multiply directly.  All activation
scales of a graph lie in one table `[group, tensor]` and all zero points in another; the scalar input `scale_group`
picks a row of each.  A matrix product becomes `com.microsoft.MatMulIntegerToFloat` with its bias, a convolution
`QuantizeLinear → QLinearConv → DequantizeLinear → Add(bias)`.  These operators are written out, not left to the
runtime's pattern matching: its fusions miss matrix products of rank 2, whose bias it merges into a float Gemm first.

Fewer than 8 activation bits are simulated: a `Clip` to the range of the narrower format, then the 8-bit quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.export.for_ort import tune
from quantempo.export.lowering import (
    CONTRIB,
    ActivationKey,
    Lowering,
    LoweringOptions,
    PlacedSite,
    describe,
)
from quantempo.export.weights import QuantizedWeight

Quantizer = tuple[ir.Value, ir.Value]
"""Scale and zero point, as values of the graph."""


def lower_ort(
    model: ir.Model,
    plan: QuantPlan,
    table: ScaleTable,
    weights: Mapping[str, QuantizedWeight] | None = None,
    options: LoweringOptions | None = None,
) -> ir.Model:
    """The quantized graph for ONNX Runtime.

    Args:
        model: float graph in normal form; it is left as it is.
        plan: what to quantize.
        table: scales of exactly the plan's tensors.
        weights: from `quantize_weights(model, plan)`; computed here where absent.  Pass them to share the bytes with
            the other dialect.
        options: see there.

    Returns:
        A new model with the further input `scale_group` (int64, shape `()`).

    Raises:
        NoSites: the plan quantizes nothing.
        ScaleMissing: table and plan name different tensors.
        PlanError: the plan does not fit the graph.
    """
    lowering = Lowering.start(model, plan, table, weights, options or LoweringOptions())
    if lowering.options.quantization:
        _integers(lowering)
    else:
        for place in lowering.places:
            _float(lowering, place)
    lowered = lowering.finish("ort")
    tune(lowered)
    lowered.opset_imports.setdefault(CONTRIB, 1)
    return lowered


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
    """Scale and zero point of every quantizer for the current group: two Gathers and two Splits for the whole graph."""
    keys = sorted(
        {activation_key(place) for place in lowering.places}
        | {output_key(place) for place in lowering.places if place.site.op == "conv"}
    )
    columns = [lowering.scales(key) for key in keys]
    scales = np.stack([scale for scale, _ in columns], 1).astype(np.float32)
    points = np.stack([point for _, point in columns], 1).astype(np.uint8)
    if lowering.options.group is not None:
        row = lowering.options.group
        return {
            key: (
                lowering.constant(f"{_name(key)}.scale", scales[row, i]),
                lowering.constant(f"{_name(key)}.zero_point", points[row, i]),
            )
            for i, key in enumerate(keys)
        }
    parts: list[tuple[ir.Value, ...]] = []
    for kind, table in (("scale", scales), ("zero_point", points)):
        now = lowering.lookup(f"activation.{kind}", table)
        names = [f"{_name(key)}.{kind}" for key in keys]
        split = lowering.nodes(None, "Split", [now], names, axis=0, num_outputs=len(keys))
        for value in split:
            describe(value, now.dtype, ir.Shape([1]))
        parts.append(split)
    return {key: (parts[0][i], parts[1][i]) for i, key in enumerate(keys)}


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
    if place.bias is not None:
        inputs += [None, _bias_row(lowering, place)]
    result = lowering.node(
        place.node, f"{CONTRIB}::MatMulIntegerToFloat", inputs, f"{place.site.output}.product"
    )
    lowering.replace(place, result, bias_included=True)


def _bias_row(lowering: Lowering, place: PlacedSite) -> ir.Value:
    """The bias as `[n]`, which is what the operator takes."""
    bias = place.bias
    assert bias is not None
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
        if place.bias is not None:
            row = _bias_row(lowering, place)
            result = lowering.node(place.node, "Add", [result, row], f"{place.site.output}.biased")
        lowering.replace(place, result, bias_included=True)
        return
    result = lowering.node(place.node, "Conv", [place.activation, weight], f"{place.site.output}.product")
    producer = result.producer()
    assert producer is not None
    for attribute in place.node.attributes.values():
        producer.attributes.add(attribute)
    lowering.replace(place, result, bias_included=False)
