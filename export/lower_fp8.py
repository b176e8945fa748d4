"""The `fp8` dialect: standard QDQ in E4M3, for GPUs from Ada and Hopper on.

A floating-point format hardly cares about ranges, so a tensor has one constant scale for all groups, `abs-max / 448`.
Only where the largest magnitude changes by more than 2^6 from group to group would some group lose bits to the
subnormals; there the groups are moved out of the quantizer as in the `portable` dialect, with powers of two:

    r_g = 2^-ceil(log2(s_g / s0)),   q = Q(x · r_g; s0),   y = (DQ(q) @ W) / r_g + b

They are exact in every float type.  Quantizers are symmetric, biases stay float, outputs are not quantized.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantempo.export.fp8 import E4M3_MAX, fp8_scale, fp8_weights
from quantempo.export.lower_portable import Rescaled, product
from quantempo.export.lowering import ActivationKey, Lowering, PlacedSite, describe, dialect

SPREAD = 2.0**6
"""Ratio of the largest to the smallest abs-max over the groups from which on a tensor is rescaled per group."""


@dialect(fp8_weights)
def lower_fp8(lowering: Lowering) -> ir.Model:
    """The quantized graph in E4M3, from the symmetric scales; on a device without FP8 it is simulated."""
    done: dict[str, Rescaled] = {}
    for place in lowering.places:
        if place.site.tensor not in done:
            done[place.site.tensor] = _quantize(lowering, place)
        product(lowering, place, done[place.site.tensor])
    outputs = {site.output for site in lowering.plan.quantized() if site.op == "conv"}
    return lowering.finish("fp8", unused=outputs - done.keys())


def scales_of(symmetric: NDArray[np.float32], bits: int = 8) -> tuple[np.float32, NDArray[np.float32]]:
    """The constant scale `s0`, and `r_g` per group, from the INT8 scales of a tensor.

    Args:
        symmetric: per group; `2^(bits-1)` of them reach the largest magnitude.
        bits: of these scales.
    """
    largest = symmetric.astype(np.float64) * 2 ** (bits - 1)
    if largest.max() <= SPREAD * largest.min():
        return np.float32(fp8_scale(largest.max())), np.ones(len(largest), np.float32)
    base = np.float32(fp8_scale(largest.min()))
    return base, np.exp2(-np.maximum(np.ceil(np.log2(largest / (base * E4M3_MAX))), 0)).astype(np.float32)


def _quantize(lowering: Lowering, place: PlacedSite) -> Rescaled:
    key = ActivationKey(place.site.tensor, True, 8)
    base, shrink = scales_of(lowering.scales(key)[0])
    name, value, shape = f"{key.tensor}.e4m3", place.activation, place.activation.shape
    grow = None
    if np.any(shrink != 1):
        factor = lowering.lookup(f"{name}.shrink", shrink)
        value = lowering.node(place.node, "Mul", [value, factor], f"{name}.shrunk")
        describe(value, ir.DataType.FLOAT, shape)
        grow = lowering.lookup(f"{name}.grow", 1 / shrink)
    if lowering.options.quantization:
        scale = lowering.constant(f"{name}.scale", base)
        value = quantize_dequantize(lowering, place.node, value, scale, name)
    return Rescaled(name, value, grow)


def quantize_dequantize(
    lowering: Lowering, before: ir.Node, value: ir.Value, scale: ir.Value, name: str
) -> ir.Value:
    """E4M3 there and back."""
    zero = lowering.constant("activation.zero_point", np.zeros((), ml_dtypes.float8_e4m3fn))
    shape = value.shape
    quantized = lowering.node(before, "QuantizeLinear", [value, scale, zero], f"{name}.quantized")
    describe(quantized, ir.DataType.FLOAT8E4M3FN, shape)
    real = lowering.node(before, "DequantizeLinear", [quantized, scale, zero], f"{name}.dequantized")
    describe(real, ir.DataType.FLOAT, shape)
    return real
