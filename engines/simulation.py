"""Number formats that a CPU imitates: the numbers are those of the device, the speed is not.

E4M3 values are rounded exactly as on a device, then multiplied in float32 and added in float32.  A device adds in
float32 too, in another order.
"""

from __future__ import annotations

from pathlib import Path

from quantempo.engines.onnx_graph import OnnxGraph
from quantempo.engines.onnx_reader import read_graph

_PREFIX = "float8"


class SimulatedNotice(UserWarning):
    """The graph computes in a number format that this engine imitates: never report its speed."""


def narrow_floats(graph: OnnxGraph) -> int:
    """How many quantizers of a graph round to FP8."""
    zeros = (node.input(2) for node in graph.nodes if node.op_type == "QuantizeLinear")
    return sum((graph.dtype(name) or "").startswith(_PREFIX) for name in zeros if name)


def simulation_notice(graph: Path) -> str:
    """What is simulated when a CPU runs a graph file; empty where nothing is.

    Raises:
        EngineError: the file is not an ONNX model.
    """
    count = narrow_floats(read_graph(graph))
    return f"FP8 is simulated on this CPU ({count} quantizers, products in float32): do not time it" if count else ""
