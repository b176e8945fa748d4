"""Rules about quantizers: their types, their scales, and where they stand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from quantempo.engines.onnx_graph import OnnxNode
from quantempo.engines.rules import Finding, Subject
from quantempo.engines.saturation import saturating_weights

NONLINEAR = frozenset({
    "Sigmoid", "Gelu", "Erf", "Tanh", "Softmax", "HardSwish", "HardSigmoid", "Mish", "Swish", "Softplus", "Elu", "Exp",
})
FLOATS8 = ("float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz")
_MOVES = ("Reshape", "Transpose", "Slice", "Concat", "Split", "Gather", "Squeeze", "Unsqueeze", "Expand")


def zero_point(subject: Subject) -> Iterator[Finding]:
    """TensorRT takes symmetric quantizers alone: zero points are constant zeros, and none is unsigned."""
    remedy = "lower for this target: the `portable` dialect is symmetric"
    for node in subject.operators("DynamicQuantizeLinear"):
        yield Finding("refused", "zero-point", node.where, "DynamicQuantizeLinear, which has no importer", remedy)
    for node in subject.quantizers():
        name = node.input(2)
        if not name:
            continue
        tensor = subject.graph.origin(name)
        values = tensor.values() if tensor is not None else None
        if tensor is None:
            yield Finding("refused", "zero-point", node.where, "a zero point that is computed", remedy)
        elif tensor.dtype in ("uint8", "uint4", "uint16"):
            yield Finding("refused", "zero-point", node.where, f"a zero point of type {tensor.dtype}", remedy)
        elif values is not None and np.any(values):
            yield Finding("refused", "zero-point", node.where, f"a zero point of {values.reshape(-1)[0]}", remedy)


def scale(subject: Subject) -> Iterator[Finding]:
    """Scales are finite and above zero."""
    for node in subject.quantizers():
        tensor = subject.graph.constants.get(node.input(1))
        values = tensor.values() if tensor is not None else None
        if values is None or values.dtype.kind != "f":
            continue
        bad = values[~(np.isfinite(values) & (values > 0))]
        if bad.size:
            yield Finding(
                "refused", "scale", node.where, f"{bad.size} of {values.size} scales not above zero, e.g. {bad[0]}",
                "a channel that is always zero: give it any scale above zero, or compile again, which floors them",
            )


def int32_bias(subject: Subject) -> Iterator[Finding]:
    """A bias stored as INT32 with a DequantizeLinear."""
    for node in subject.operators("DequantizeLinear"):
        tensor = subject.graph.origin(node.input(0))
        if tensor is not None and tensor.dtype == "int32":
            yield Finding("refused", "int32-bias", node.where, "an INT32 bias", "keep biases in floating point")


def quantizer_before_activation(subject: Subject) -> Iterator[Finding]:
    """A dequantized value that goes through a nonlinearity: the product behind it computes in float."""
    for node in subject.operators("DequantizeLinear"):
        if subject.graph.is_constant(node.input(0)):
            continue
        for consumer in subject.graph.consumers.get(node.outputs[0], ()):
            if consumer.op_type in NONLINEAR and not _requantized(subject, consumer):
                yield Finding(
                    "slow", "quantizer-before-activation", node.where,
                    f"a quantizer in front of {consumer.op_type}: what follows computes in float",
                    f"quantize behind {consumer.op_type}",
                )


def _requantized(subject: Subject, node: OnnxNode) -> bool:
    """DQ, nonlinearity, Q is a pattern of its own, which some engines fuse."""
    readers = subject.graph.consumers.get(node.outputs[0], ())
    return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)


def scale_mul(subject: Subject) -> Iterator[Finding]:
    """A constant factor between DequantizeLinear and the product."""
    graph = subject.graph
    for product in graph.products():
        node = graph.producer(product.input(0))
        if node is None or node.op_type not in ("Mul", "Div") or graph.producer(node.input(0)) is None:
            continue
        source = graph.producer(node.input(0))
        factor = graph.constants.get(node.input(1))
        if source is not None and source.op_type == "DequantizeLinear" and factor is not None and factor.size == 1:
            yield Finding(
                "slow", "scale-mul", node.where,
                f"{node.op_type} by a constant between quantizer and {subject.site(product)}",
                "multiply in front of the quantizer",
            )


def runtime_scale(subject: Subject) -> Iterator[Finding]:
    """A scale that comes out of the graph: right for ONNX Runtime, a silent float fallback for the compilers."""
    remedy = "lower for this target: the `portable` dialect multiplies in front of a constant quantizer"
    constant_only = subject.on("tensorrt") and subject.before("10.13")
    for node in subject.operators("QuantizeLinear"):
        if subject.graph.is_constant(node.input(1)):
            continue
        if constant_only:
            found = f"a computed scale; version {subject.version} takes constants alone"
            yield Finding("refused", "runtime-scale", node.where, found, remedy)
        elif subject.on("openvino"):
            found = "a computed scale: the quantizer is not fused, four more passes over the activation"
            yield Finding("slow", "runtime-scale", node.where, found, remedy)
        else:
            found = "a computed scale: quantizes and dequantizes for nothing, and the product computes in float"
            yield Finding("slow", "runtime-scale", node.where, found, remedy)


def channel_scale(subject: Subject) -> Iterator[Finding]:
    """An activation with a scale per channel: no integer product can take it out of the sum."""
    for node in subject.operators("QuantizeLinear"):
        tensor = subject.graph.constants.get(node.input(1))
        if tensor is not None and tensor.size > 1 and not subject.graph.is_constant(node.input(0)):
            yield Finding(
                "slow", "channel-scale", node.where, f"an activation with {tensor.size} scales: computes in float",
                "one scale per tensor; move differences between channels into the weight (smoothing)",
            )


def scalar_input(subject: Subject) -> Iterator[Finding]:
    """A quantizer on a scalar."""
    for node in subject.operators("QuantizeLinear"):
        if subject.graph.shape(node.input(0)) == () and not subject.graph.is_constant(node.input(0)):
            known = node.input(0) in {**subject.graph.inputs, **subject.graph.types}
            if known:
                yield Finding("refused", "scalar-input", node.where, "a quantizer on a scalar", "leave it in float")


def scale_type(subject: Subject) -> Iterator[Finding]:
    """Before TensorRT 10.13 a scale must have the type of the data."""
    if not subject.before("10.13"):
        return
    for node in subject.operators("QuantizeLinear"):
        data, kind = subject.graph.dtype(node.input(0)), subject.graph.dtype(node.input(1))
        if data and kind and data != kind:
            yield Finding(
                "refused", "scale-type", node.where, f"a {kind} scale for {data} data (version {subject.version})",
                f"store scales as {data}",
            )


def number_format(subject: Subject) -> Iterator[Finding]:
    """A number format that the target does not compute in."""
    formats = subject.target.formats
    best = f"this target has {', '.join(formats)}"
    for node in subject.quantizers():
        words = {subject.graph.dtype(name) for name in (node.input(0), node.input(2), *node.outputs) if name}
        if words & set(FLOATS8) and "fp8" not in formats:
            yield Finding("refused", "number-format", node.where, "FP8, which the device does not have", best)
        elif words & {"int4", "uint4"} and "int4-weights" not in formats:
            yield Finding("slow", "number-format", node.where, "INT4 weights, which are widened here", best)
        elif "float4e2m1" in words and "nvfp4" not in formats:
            yield Finding("refused", "number-format", node.where, "FP4, which the device does not have", best)


def detached_quantizer(subject: Subject) -> Iterator[Finding]:
    """Something that moves data between a quantizer and its product."""
    graph = subject.graph
    for product in graph.products():
        node = graph.producer(product.input(0))
        moved = node
        while node is not None and node.op_type in _MOVES:
            node = graph.producer(node.input(0))
        if node is not None and moved is not None and node is not moved and node.op_type == "DequantizeLinear":
            if graph.is_constant(node.input(0)):
                continue
            yield Finding(
                "refused", "detached-quantizer", subject.site(product),
                f"{moved.op_type} between the quantizer and the product: the compiler cannot infer its type",
                "quantize right in front of the product",
            )


def saturation(subject: Subject) -> Iterator[Finding]:
    """U8 activations and wide weights on a CPU that adds two products into 16 bits."""
    integers = subject.target.integers
    for tensor, low, high in saturating_weights(subject.graph, integers):
        yield Finding(
            "refused", "saturation", tensor.name, f"weights of {low} to {high}: {integers.reason}",
            f"compile with --target {subject.target.name} on such a CPU ({integers.weight_bits}-bit weights); "
            + ("or run it as it is: ONNX Runtime is then put into its precise mode, which is slower"
               if subject.on("ort") else "or run it with the engine 'ort', which has a precise mode"),
        )


def weight_axis(subject: Subject) -> Iterator[Finding]:
    """A weight scale along another axis than the output channels."""
    for product in subject.graph.products():
        node = subject.graph.producer(product.input(1))
        if node is None or node.op_type != "DequantizeLinear":
            continue
        weight, scales = subject.graph.origin(node.input(0)), subject.graph.constants.get(node.input(1))
        if weight is None or scales is None or scales.size == 1 or len(scales.shape) != 1:
            continue
        axis = node.integer("axis", 1) % len(weight.shape)
        swapped = product.op_type == "Gemm" and product.integer("transB", 0) == 1
        wanted = 0 if product.op_type == "Conv" or swapped else len(weight.shape) - 1
        if product.op_type == "ConvTranspose":
            wanted = 1
        if axis != wanted:
            yield Finding(
                "slow", "weight-axis", subject.site(product), f"weight scales along axis {axis}: computes in float",
                f"one scale per output channel, axis {wanted}",
            )


def integer_convolution(subject: Subject) -> Iterator[Finding]:
    """A quantized convolution where the library has no kernels for it."""
    for product in subject.operators("Conv"):
        if subject.is_quantized(product):
            yield Finding(
                "refused", "integer-convolution", subject.site(product),
                "an INT8 convolution: it would compute in half, on weights that are dequantized at every call",
                f"compile with --target {subject.target.name}: dialect `unfold` makes a matrix product of it",
            )
