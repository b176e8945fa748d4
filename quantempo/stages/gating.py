"""The fusion gate over the graphs of a bundle that is being written: what is quantized must run on integers.

ONNX Runtime is always there, since it calibrates; the graphs of OpenVINO are judged where it is installed, in a process
of its own.  Graphs in half precision and in FP8 are for devices; `quantempo build` judges what it makes of them
(`quantempo.building`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from quantempo.contracts.manifest import GraphEntry
from quantempo.contracts.plan import QuantPlan
from quantempo.engines.gate import GateReport, check_openvino, check_ort, intended_sites
from quantempo.engines.onnx_graph import OnnxGraph
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.ort import optimized_graph
from quantempo.engines.registry import installed_backends
from quantempo.engines.targets import target
from quantempo.errors import EngineError, ExportError

ROWS = 2
"""Rows of the sizes that OpenVINO compiles for: one guided sample."""


class NotGated(UserWarning):
    """An engine that is installed refuses a graph of the bundle, so the fusion gate says nothing about it."""


def gate_graphs(
    root: Path, entries: Mapping[str, GraphEntry], plans: Mapping[str, QuantPlan | None]
) -> dict[str, GateReport]:
    """Judge the float32 graphs of a bundle on the engines of this machine.

    Args:
        root: folder of the bundle.
        entries: graphs by name.
        plans: what each variant quantizes; `None` for nothing.  Variants without an entry are left out.

    Returns:
        What was seen, by graph; graphs without quantized sites have no entry.

    Raises:
        FusionError: a quantized site runs in float.
        ExportError: a graph holds another number of sites than it should.
    """
    found = {}
    for name, entry in entries.items():
        if entry.float_type == "float32" and entry.dialect in ("ort", "portable") and entry.variant in plans:
            plan = plans[entry.variant]
            sites = 0 if plan is None else len(plan.for_graph(f"{entry.dialect}-f32").quantized())
            report = gate_graph(root / entry.file, entry.dialect, sites)
            if report is not None:
                found[name] = report
    return found


def gate_graph(graph: Path, dialect: str, sites: int) -> GateReport | None:
    """Judge one graph; `None` where nothing is quantized, or where its engine is not installed or refuses it.

    Args:
        graph: file.
        dialect: `ort` or `portable`.
        sites: quantized sites of the plan; products inside attention come on top.

    Raises:
        FusionError, ExportError: see `gate_graphs`.
    """
    structure = read_graph(graph)
    products = intended_sites(structure)
    # Products inside attention are none of the plan's sites; they have no weight.
    there = sum(dialect == "ort" or structure.origin(node.input(1)) is not None for node in products)
    if there != sites:
        raise ExportError(
            f"graph {graph.name}", found=f"{there} quantized products", wanted=f"{sites}, one per quantized site",
            cause="a mistake in the lowering", remedy="report this with the plan",
        )
    if not products:
        return None
    report = _on_ort(graph, structure) if dialect == "ort" else _on_openvino(graph, structure)
    if report is not None:
        report.require(f"{graph.name}, as {report.backend} runs it")
    return report


def _on_ort(graph: Path, structure: OnnxGraph) -> GateReport:
    return check_ort(optimized_graph(graph), structure, target("cpu"))


def _on_openvino(graph: Path, structure: OnnxGraph) -> GateReport | None:
    if "openvino" not in installed_backends():
        return None
    from quantempo.engines.openvino_apart import integer_layers

    sizes = {
        size: ROWS if axis == 0 else 1
        for spec in structure.inputs.values() for axis, size in reversed(list(enumerate(spec.shape)))
        if isinstance(size, str)
    }  # fmt: skip
    try:
        layers = integer_layers(graph, sizes)
    except EngineError as error:
        warnings.warn(f"{graph.name} is not judged: {error.where}: {error.found}", NotGated, stacklevel=4)
        return None
    return check_openvino(layers, structure, target("openvino"))
