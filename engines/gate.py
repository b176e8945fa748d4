"""The fusion gate: a quantized graph must really be computed on quantized operands.

A compiler that does not recognise a pattern says nothing: the numbers are right, and the products run in float on
weights that are dequantized at every call.  The gate looks at what the engine runs and fails the build.  It holds no
engine library: callers hand over a plan, the inspector's JSON or the graph that an engine saved.

Two parts, both on every build.  *Structure*: patterns that are known to break fusion, in the graph itself, before
minutes are spent on a build.  *Execution*: every site of the graph is found among the executed products, with
quantized operands, and no quantized weight is read by anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from quantempo.engines import rules_quantizers
from quantempo.engines.kernels import INTEGERS, Kernel, inspector_kernels, plan_kernels
from quantempo.engines.onnx_graph import PRODUCTS, OnnxGraph, OnnxNode
from quantempo.engines.rules import Subject
from quantempo.engines.targets import Target
from quantempo.errors import FusionError

SMALLEST_WEIGHT = 64
"""Stored values from which on a quantized constant counts as a weight."""
_RULES = (
    rules_quantizers.int32_bias, rules_quantizers.scale_mul, rules_quantizers.quantizer_before_activation,
    rules_quantizers.channel_scale, rules_quantizers.weight_axis,
)
_COMPILER_RULES = (*_RULES, rules_quantizers.runtime_scale, rules_quantizers.zero_point)
_ORT_PRODUCTS = ("MatMulIntegerToFloat", "QLinearConv", "QLinearMatMul")
_FLOAT_PRODUCTS = ("MatMul", "Gemm", "Conv", "FusedMatMul", "FusedGemm", "FusedConv", "MatMulNBits", "NhwcFusedConv")


_BETWEEN = frozenset({
    "Mul", "Div", "Add", "Sub", "Cast", "Clip", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity",
    *rules_quantizers.NONLINEAR, "Relu", "LeakyRelu",
})


@dataclass(frozen=True)
class Breach:
    """One place where a build falls short.

    Args:
        where: the site's node, or the kernel.
        found: what happens there.
    """

    where: str
    found: str


@dataclass(frozen=True)
class GateReport:
    """What the gate saw.

    Args:
        backend: engine.
        sites: products that are meant to be quantized.
        formats: how many of them run on which operands: `int8`, `fp8`.
        kernels: kernels that work on tensors, where the engine lists them; 0 where not.
        products: kernels that are products; several sites may share one.
        breaches: empty is what one wants.
    """

    backend: str
    sites: int
    formats: Mapping[str, int]
    kernels: int
    products: int
    breaches: tuple[Breach, ...]

    @property
    def passed(self) -> bool:
        """Whether there is no breach."""
        return not self.breaches

    def __str__(self) -> str:
        formats = ", ".join(f"{count} on {kind}" for kind, count in sorted(self.formats.items())) or "none"
        kernels = f"; {self.kernels} kernels, {self.products} of them products" if self.kernels else ""
        verdict = "passed" if self.passed else f"{len(self.breaches)} breaches"
        return f"fusion gate, {self.backend}: {self.sites} sites, {formats}{kernels}: {verdict}"

    def require(self, where: str) -> None:
        """Fail the build unless the gate passed.

        Raises:
            FusionError: names the first breaches.
        """
        if self.passed:
            return
        first = "; ".join(f"{breach.where}: {breach.found}" for breach in self.breaches[:3])
        rest = f"; and {len(self.breaches) - 3} more" if len(self.breaches) > 3 else ""
        raise FusionError(
            where, found=f"{first}{rest}", wanted=f"all {self.sites} quantized sites on quantized operands",
            cause="the graph holds a pattern that this version of the engine does not fuse",
            remedy="keep these layers in float (--keep PATTERN), or report it with the graph and the engine's version",
        )


def intended_sites(graph: OnnxGraph, weight_only: Collection[str] = ()) -> tuple[OnnxNode, ...]:
    """The products of a graph that are meant to run on quantized operands.

    In the QDQ dialects that is each product of two dequantized operands, also where something stands between a
    dequantizer and the product that should not; in the `ort` dialect each integer operator.  A product that reads a
    dequantized weight and a float activation computes in float by intent: its weight is only stored in integers.

    Args:
        graph: the graph that was given to the engine.
        weight_only: further products (`Site.output`, or node names) that compute in float by plan.
    """
    kept = set(weight_only)
    found = []
    for node in graph.nodes:
        if node.op_type in _ORT_PRODUCTS:
            found.append(node)
        elif node.op_type not in PRODUCTS or node.domain or kept & {*node.outputs, node.name}:
            continue
        elif all(_dequantized(graph, node.input(i)) for i in (0, 1)):
            found.append(node)
    return tuple(found)


def _dequantized(graph: OnnxGraph, name: str) -> bool:
    """Whether a value comes out of a dequantizer, seen through pointwise operators and what moves data."""
    front, seen = [name], set[str]()
    while front:
        value = front.pop()
        node = graph.producer(value)
        if node is None or value in seen:
            continue
        seen.add(value)
        if node.op_type == "DequantizeLinear":
            return True
        if node.op_type in _BETWEEN:
            front += [other for other in node.inputs if other]
    return False


def check_structure(graph: OnnxGraph, target: Target) -> tuple[Breach, ...]:
    """The patterns in a graph that are known to break fusion on a target."""
    subject = Subject(graph, target, target.versions[0] or "0")
    rules = _RULES if target.backend == "ort" else _COMPILER_RULES
    findings = (finding for rule in rules for finding in rule(subject))
    return tuple(Breach(finding.where, finding.found) for finding in findings)


def check_rtx(plan: bytes, graph: OnnxGraph, target: Target, weight_only: Collection[str] = ()) -> GateReport:
    """Judge a TensorRT-RTX plan; needs no GPU.

    Args:
        plan: built with detailed profiling verbosity.
        graph: the ONNX graph that it was built from.
        target: what it was built for.
        weight_only: see `intended_sites`.

    Raises:
        EngineError: the plan holds no kernel list.
    """
    return _check_kernels(plan_kernels(plan), graph, target, weight_only)


def check_inspector(text: str, graph: OnnxGraph, target: Target, weight_only: Collection[str] = ()) -> GateReport:
    """Judge a loaded TensorRT engine by its inspector's JSON; else like `check_rtx`.

    Raises:
        EngineError: the text is no inspector output.
    """
    return _check_kernels(inspector_kernels(text), graph, target, weight_only)


def _check_kernels(
    kernels: tuple[Kernel, ...], graph: OnnxGraph, target: Target, weight_only: Collection[str]
) -> GateReport:
    sites = intended_sites(graph, weight_only)
    breaches = list(check_structure(graph, target))
    by_layer: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        if kernel.product:
            for layer in {*kernel.layers, *kernel.name.split("+")}:
                by_layer.setdefault(layer, []).append(kernel)
    formats: Counter[str] = Counter()
    for site in sites:
        name = site.name or site.outputs[0]
        found = _site_format(by_layer.get(name, []))
        if found.startswith("!"):
            breaches.append(Breach(name, found[1:]))
        else:
            formats[found] += 1
    kept = _kept_layers(graph, sites)
    breaches += [breach for kernel in kernels for breach in _dequantized_weights(kernel, kept)]
    outer = [kernel for kernel in kernels if not kernel.inner and not kernel.sizes_only]
    products = sum(kernel.product or kernel.kind == "runtime_fusion" for kernel in outer)
    return GateReport(target.backend, len(sites), dict(formats), len(outer), products, tuple(breaches))


def _site_format(kernels: Iterable[Kernel]) -> str:
    """`int8` or `fp8`; an exclamation mark and what is wrong otherwise."""
    found = list(kernels)
    if not found:
        return "!no kernel computes it as a product"
    for kernel in found:
        operands = kernel.inputs[: 3 if kernel.attention else 2]
        if len(operands) < 2 or not all(operand.narrow for operand in operands):
            types = " × ".join(operand.dtype for operand in operands) or "nothing"
            return f"!the product runs on {types}"
    return "int8" if found[0].inputs[0].dtype in INTEGERS else "fp8"


def _kept_layers(graph: OnnxGraph, sites: Iterable[OnnxNode]) -> set[str]:
    """Dequantizers of weights that no site reads: what is kept in float and stored in integers."""
    read = {node.name for site in sites if (node := graph.dequantizer(site.input(1))) is not None}
    return {node.name for node in graph.nodes if node.op_type == "DequantizeLinear" and node.name not in read}


def _dequantized_weights(kernel: Kernel, kept: set[str]) -> Iterable[Breach]:
    if kernel.product or kernel.kind == "runtime_fusion" or kept & set(kernel.layers):
        return
    for operand in kernel.inputs:
        if operand.constant and operand.narrow and operand.size >= SMALLEST_WEIGHT:
            to = kernel.outputs[0].dtype if kernel.outputs else "?"
            layer = kernel.layers[0] if kernel.layers else operand.name
            yield Breach(layer, f"a weight of {operand.size} values is dequantized to {to} at every call")


def check_ort(
    optimized: OnnxGraph, graph: OnnxGraph, target: Target, weight_only: Collection[str] = ()
) -> GateReport:
    """Judge what ONNX Runtime runs.

    Args:
        optimized: the graph that it saved after its optimizations.
        graph: the graph that it was given.
        target: `cpu`.
        weight_only: see `intended_sites`.
    """
    sites = intended_sites(graph, weight_only)
    breaches = list(check_structure(graph, target))
    integer = [node for node in optimized.nodes if node.op_type in _ORT_PRODUCTS]
    for node in optimized.nodes:
        if node.op_type in _FLOAT_PRODUCTS and _reads_quantized(optimized, node, weight_only):
            breaches.append(Breach(node.where, f"{node.op_type} on dequantized operands"))
    if len(integer) < len(sites):
        missing = len(sites) - len(integer)
        breaches.append(Breach("optimized graph", f"{len(integer)} integer products; {missing} sites run in float"))
    return GateReport("ort", len(sites), {"int8": len(integer)}, len(optimized.nodes), len(integer), tuple(breaches))


def _reads_quantized(graph: OnnxGraph, node: OnnxNode, weight_only: Collection[str]) -> bool:
    if set(weight_only) & {*node.outputs, node.name}:
        return False
    narrow = any(graph.dtype(name) in ("int8", "uint8") for name in node.inputs[:2] if name)
    return narrow or any(graph.dequantizer(node.input(i)) is not None for i in (0, 1)) or node.op_type == "MatMulNBits"


def check_openvino(
    integer: Collection[str], graph: OnnxGraph, target: Target, weight_only: Collection[str] = ()
) -> GateReport:
    """Judge what OpenVINO runs.

    Args:
        integer: original names of the layers whose product has an integer activation
            (`quantempo.engines.openvino.integer_layers`).
        graph: the graph that it was given.
        target: `openvino`.
        weight_only: see `intended_sites`.
    """
    sites = intended_sites(graph, weight_only)
    # With a computed scale some graphs keep integer products and some do not: the executed types decide.
    breaches = [b for b in check_structure(graph, target) if "computed scale" not in b.found]
    names = [site.name or site.outputs[0] for site in sites]
    # OpenVINO names a fused layer after its parts, with suffixes such as `/DequantizationMultiply`.
    done = {name for name in names if any(layer == name or layer.startswith(f"{name}/") for layer in integer)}
    breaches += [Breach(name, "the product runs in float") for name in names if name not in done]
    return GateReport("openvino", len(sites), {"int8": len(done)}, 0, 0, tuple(breaches))
