"""Runs a graph with ONNX Runtime on one thread: the reference engine of the export tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray


def run(path: Path | str | bytes, feeds: Mapping[str, NDArray[Any]], optimize: bool = True) -> dict[str, NDArray[Any]]:
    """Outputs by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def run_model(model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same for a model in memory, without the engine's own optimizer."""
    return run(ir.to_proto(model).SerializeToString(), feeds, optimize=False)


def relative_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float(np.max(np.abs(a.astype(np.float64) - b)) / max(np.max(np.abs(b)), 1e-30))
