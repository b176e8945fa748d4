"""What a rule of `check` gets to see, and what it reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from quantempo.engines.onnx_graph import OnnxGraph, OnnxNode, OnnxTensor
from quantempo.engines.targets import Backend, Target, parse_version

Level = Literal["refused", "slow", "kept"]


@dataclass(frozen=True)
class Finding:
    """One thing that will not go as wished on a target.

    Args:
        level: `refused` (it does not build, or gives wrong numbers), `slow`, or `kept` (computes in higher precision).
        rule: name of the rule.
        where: module path, node or tensor.
        found: what is there and what comes of it.
        remedy: what to do.
    """

    level: Level
    rule: str
    where: str
    found: str
    remedy: str


@dataclass(frozen=True)
class Subject:
    """A graph and what it is checked for.

    Args:
        version: of the target's library; the lowest of its range where nobody knows better.
    """

    graph: OnnxGraph
    target: Target
    version: str

    def before(self, version: str) -> bool:
        """Whether the library is older than this version."""
        return parse_version(self.version) < parse_version(version)

    def on(self, *backends: Backend) -> bool:
        """Whether the target runs on one of these backends."""
        return self.target.backend in backends

    def operators(self, *types: str) -> Iterator[OnnxNode]:
        """The graph's nodes of these types, of ONNX's own domain."""
        return (node for node in self.graph.nodes if node.op_type in types and not node.domain)

    def quantizers(self) -> Iterator[OnnxNode]:
        """All QuantizeLinear and DequantizeLinear nodes."""
        return self.operators("QuantizeLinear", "DequantizeLinear")

    def activation_quantizers(self) -> Iterator[OnnxNode]:
        """Those that work on something computed."""
        return (node for node in self.quantizers() if not self.graph.is_constant(node.input(0)))

    def weight(self, product: OnnxNode) -> OnnxTensor | None:
        """The constant weight of a product."""
        return self.graph.origin(product.input(1))

    def sizes(self, product: OnnxNode) -> tuple[int, int] | None:
        """Reduction length and output channels; `None` without a weight.

        For a convolution, input channels per group stand for the reduction length.
        """
        weight = self.weight(product)
        if weight is None or len(weight.shape) < 2:
            return None
        shape = weight.shape
        if product.op_type == "Conv":
            return shape[1], shape[0]
        if product.op_type == "ConvTranspose":
            return shape[0], shape[1]
        swapped = product.op_type == "Gemm" and product.integer("transB", 0) == 1
        return (shape[-1], shape[-2]) if swapped else (shape[-2], shape[-1])

    def site(self, product: OnnxNode) -> str:
        """How a person finds a product: module path, else the name of its weight without suffixes, else the node."""
        weight = self.weight(product)
        if product.module or weight is None:
            return product.where
        return weight.name.removesuffix(".int8").removesuffix(".weight") or product.where

    def is_quantized(self, product: OnnxNode) -> bool:
        """Whether both operands of a product come out of a DequantizeLinear."""
        return all(self.graph.dequantizer(product.input(index)) is not None for index in (0, 1))
