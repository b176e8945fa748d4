"""Whether a graph's integers can be multiplied on this CPU without loss, asked before the graph is opened."""

from __future__ import annotations

from pathlib import Path

from quantempo.engines.cpu import CpuFeatures, IntegerTypes, integer_types, saturates
from quantempo.engines.onnx_graph import OnnxGraph, OnnxTensor
from quantempo.engines.onnx_reader import read_graph

SAMPLED_WEIGHTS = 1 << 16
"""Weight values that are looked at per tensor where a CPU saturates."""


class SaturationNotice(UserWarning):
    """The CPU adds products of 8-bit integers into 16 bits, and the graph's weights do not fit that."""


def saturating_weights(graph: OnnxGraph, integers: IntegerTypes) -> list[tuple[OnnxTensor, int, int]]:
    """The INT8 weights whose products can saturate on a CPU, each with its lowest and highest sampled value.

    Nothing is read where the CPU adds into 32 bits.
    """
    if integers.exact:
        return []
    found = []
    for tensor in graph.constants.values():
        if tensor.dtype != "int8" or len(tensor.shape) < 2:
            continue
        values = tensor.sample(SAMPLED_WEIGHTS)
        if values is not None and values.size:
            low, high = int(values.min()), int(values.max())
            if saturates(integers, low, high):
                found.append((tensor, low, high))
    return found


def unsafe_reason(graph: Path, cpu: CpuFeatures) -> str:
    """Why a graph file's integers are unsafe on a CPU; empty where they are safe.

    Raises:
        EngineError: the file is not an ONNX model.
    """
    integers = integer_types(cpu)
    found = [] if integers.exact else saturating_weights(read_graph(graph), integers)
    if not found:
        return ""
    tensor, low, high = found[0]
    return f"{len(found)} weights such as {tensor.name} ({low} to {high}): {integers.reason}"
