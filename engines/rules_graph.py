"""Rules about operators, types and the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from quantempo.engines.onnx_graph import OnnxNode
from quantempo.engines.rules import Finding, Subject

PROTOBUF_LIMIT = (1 << 31) - 1
SMALLEST = 16
"""Products with fewer inputs or outputs than this gain nothing from integers."""

_NO_IMPORTER = ("MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul", "QLinearAdd")
_SINCE = {"RMSNormalization": "10.15", "Swish": "11.0"}
_FLOAT_TYPES = ("float32", "float16", "bfloat16")


def opset(subject: Subject) -> Iterator[Finding]:
    """Versions of ONNX's own operators outside the target's range."""
    low, high = subject.target.opset
    found = subject.graph.opset
    if not low <= found <= high:
        yield Finding(
            "refused", "opset", subject.graph.path.name, f"opset {found}; the target takes {low} to {high}",
            f"export with opset {min(max(found, low), high)}",
        )


def operator_set(subject: Subject) -> Iterator[Finding]:
    """Operators that TensorRT's parser does not have, or not yet."""
    for node in subject.operators(*_NO_IMPORTER):
        yield Finding(
            "refused", "operator-set", node.where, f"{node.op_type}, which has no importer",
            "lower for this target: the `portable` dialect is made of standard quantizers",
        )
    for node in subject.operators(*_SINCE):
        since = _SINCE[node.op_type]
        if subject.on("tensorrt") and subject.before(since):
            yield Finding(
                "refused", "operator-set", node.where, f"{node.op_type}, which is read from {since} on",
                f"export it decomposed, or use version {since}",
            )


def contrib(subject: Subject) -> Iterator[Finding]:
    """Operators outside ONNX."""
    for node in subject.graph.nodes:
        if not node.domain or node.domain == "ai.onnx.ml":
            continue
        if subject.on("ort") and node.domain.startswith("com.microsoft"):
            continue
        known = subject.on("openvino") and node.operator == "com.microsoft.MatMulIntegerToFloat"
        yield Finding(
            "slow" if known else "refused", "contrib", node.where,
            f"{node.operator}, which {'OpenVINO computes in float' if known else 'is not an ONNX operator'}",
            "use the `portable` graph of the bundle",
        )


def group_norm(subject: Subject) -> Iterator[Finding]:
    """GroupNormalization with scale and bias per channel, before TensorRT 10.9."""
    if subject.graph.opset < 21 or not subject.before("10.9"):
        return
    for node in subject.operators("GroupNormalization"):
        yield Finding(
            "refused", "group-norm", node.where,
            f"GroupNormalization of opset {subject.graph.opset}, which is read from 10.9 on (here {subject.version})",
            "rewrite it as Reshape, InstanceNormalization, Mul and Add",
        )


def group_norm_one(subject: Subject) -> Iterator[Finding]:
    """GroupNormalization over all channels at once."""
    for node in subject.operators("GroupNormalization"):
        if node.integer("num_groups", 0) == 1:
            yield Finding(
                "refused", "group-norm-one", node.where,
                "GroupNormalization with one group, which TensorRT 10.16 computes per channel: wrong numbers",
                "rewrite it as LayerNormalization over all axes but the batch",
            )


def attention(subject: Subject) -> Iterator[Finding]:
    """Attention as one operator."""
    for node in subject.operators("Attention"):
        if subject.on("tensorrt") and subject.before("10.14"):
            yield Finding(
                "refused", "attention", node.where, f"Attention, which is read from 10.14 on (here {subject.version})",
                "export with opset 21: attention comes decomposed",
            )
        else:
            yield Finding(
                "kept", "attention", node.where, "Attention as one operator: its products cannot be quantized",
                "export with opset 21: attention comes decomposed",
            )


def control_flow(subject: Subject) -> Iterator[Finding]:
    """If and Loop."""
    for node in subject.operators("If", "Loop", "Scan"):
        yield Finding(
            "slow", "control-flow", node.where, f"{node.op_type}: the host decides, so calls cannot be captured",
            "one graph per branch",
        )


def float_type(subject: Subject) -> Iterator[Finding]:
    """Weights of a float type that the target emulates or does not have."""
    kinds = Counter(
        tensor.dtype for tensor in subject.graph.constants.values()
        if tensor.dtype in _FLOAT_TYPES and len(tensor.shape) >= 2
    )
    legal = {kind for _, kind in subject.target.graphs}
    for kind, number in sorted(kinds.items()):
        if kind not in legal:
            yield Finding(
                "slow", "float-type", subject.graph.path.name, f"{number} {kind} weights: casts around every product",
                f"use a graph of type {subject.target.graphs[0][1]}",
            )


def tiny_product(subject: Subject) -> Iterator[Finding]:
    """Products that are too small for integers to pay."""
    for product in subject.graph.products():
        sizes = subject.sizes(product)
        if sizes is None or min(sizes) >= SMALLEST:
            continue
        k, n = sizes
        if subject.is_quantized(product):
            yield Finding(
                "slow", "tiny-product", subject.site(product), f"a quantized product of {k} by {n}", "keep it in float"
            )
        else:
            found = f"{k} by {n}: too small for integers"
            yield Finding("kept", "tiny-product", subject.site(product), found, "nothing to do")


def kept_product(subject: Subject) -> Iterator[Finding]:
    """Products with constant weights that compute in float although the graph is quantized."""
    if not any(True for _ in subject.activation_quantizers()):
        return
    for product in subject.graph.products():
        sizes = subject.sizes(product)
        if sizes is None or min(sizes) < SMALLEST or subject.graph.dequantizer(product.input(0)) is not None:
            continue
        stored = "INT8 weights" if subject.graph.dequantizer(product.input(1)) is not None else "float weights"
        yield Finding(
            "kept", "kept-product", subject.site(product), f"computes in float ({sizes[0]} by {sizes[1]}, {stored})",
            "see the plan for the reason; edit its decision to quantize",
        )


def weight_only(subject: Subject) -> Iterator[Finding]:
    """A lone DequantizeLinear on a weight: ONNX Runtime rounds the activations as well."""
    for product in subject.graph.products():
        node = subject.graph.producer(product.input(1))
        if node is None or node.op_type != "DequantizeLinear" or product.op_type != "MatMul":
            continue
        if subject.graph.dequantizer(product.input(0)) is None and subject.weight(product) is not None:
            yield Finding(
                "slow", "weight-only", subject.site(product),
                "INT8 weights alone: becomes MatMulNBits, which rounds activations to 8 bits and is slower than float",
                "store the weight as Cast and Mul (the `ort` dialect does), or set the accuracy level to 1",
            )


def bias_rank(subject: Subject) -> Iterator[Finding]:
    """A quantized product whose bias makes a Gemm of it."""
    graph = subject.graph
    for product in subject.operators("MatMul"):
        if not subject.is_quantized(product):
            continue
        for reader in graph.consumers.get(product.outputs[0], ()):
            others = [name for name in reader.inputs if name != product.outputs[0]]
            bias = graph.constants.get(others[0]) if reader.op_type == "Add" and others else None
            shape = graph.shape(product.input(0)) or graph.shape(product.outputs[0])
            if bias is None or (len(bias.shape) != 1 and (shape is None or len(shape) != 2)):
                continue
            yield Finding(
                "slow", "bias-rank", subject.site(product),
                f"a bias of shape {list(bias.shape)}: the product becomes a Gemm before it is fused, in float",
                "use the `ort` graph of the bundle, or add the bias with the product's rank",
            )


def unfused(subject: Subject) -> Iterator[Finding]:
    """Quantized products that ONNX Runtime computes in float."""
    graph = subject.graph
    for product in graph.quantized_products():
        if product.op_type == "Gemm":
            yield Finding(
                "slow", "unfused", subject.site(product), "a quantized Gemm, which gains nothing", "use MatMul and Add"
            )
        elif product.op_type == "Conv" and not _ends_in_quantizer(subject, product):
            yield Finding(
                "slow", "unfused", subject.site(product), "a quantized convolution without a quantizer on its output",
                "use the `ort` graph of the bundle, which quantizes the output too",
            )


def _ends_in_quantizer(subject: Subject, product: OnnxNode) -> bool:
    readers = subject.graph.consumers.get(product.outputs[0], ())
    return bool(readers) and all(reader.op_type in ("QuantizeLinear", "Relu", "Clip") for reader in readers)


def inline_weights(subject: Subject) -> Iterator[Finding]:
    """A file above protobuf's limit."""
    if subject.graph.file_bytes > PROTOBUF_LIMIT:
        size = subject.graph.file_bytes / 2**30
        yield Finding(
            "refused", "inline-weights", subject.graph.path.name, f"{size:.1f} GiB in one file; protobuf ends at 2",
            "store weights as external data",
        )


def unsafe_path(subject: Subject) -> Iterator[Finding]:
    """Weights outside the graph's folder."""
    places = {tensor.location for tensor in subject.graph.constants.values() if not tensor.safe}
    for place in sorted(str(place) for place in places):
        yield Finding(
            "refused", "unsafe-path", subject.graph.path.name, f"weights at {place!r}, outside the graph's folder",
            "do not use this graph, or put its weights beside it",
        )


def library_version(subject: Subject) -> Iterator[Finding]:
    """A library outside the profile's range."""
    low, high = subject.target.versions
    if subject.before(low or "0") or (high and not subject.before(high)):
        wanted = " ".join(part for part in (low and f"at least {low}", high and f"below {high}") if part)
        yield Finding(
            "refused", "library-version", subject.target.library,
            f"version {subject.version}; the profile is for {wanted}",
            f"install {subject.target.library} {wanted}",
        )
