"""Images from latents while a cache is fitted, for fidelity as a report measures it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import EngineOptions
from quantempo.engines.registry import open_engine
from quantempo.quality import Images
from quantempo.runtime.images import to_unit
from quantempo.stages.cache_runs import CacheParts
from quantempo.stages.calibration import ENGINE

ROWS = 8


def decoder_of(parts: CacheParts) -> Callable[[NDArray[Any]], Images]:
    """A function from latents (batch, …) to images (batch, height, width, channels) in [0, 1]."""
    from quantempo.export.graph_files import write_graphs

    decoder, graph = parts.exported.decoder, parts.exported.decoder_graph

    def scaled(latents: NDArray[Any]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = latents.astype(np.float32) / np.float32(decoder.scaling)
        return result + np.float32(decoder.shift)

    if graph is None:
        return lambda latents: to_unit(scaled(latents))
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        write_graphs(Path(folder), {"decoder": graph})
        engine = open_engine(ENGINE, Path(folder) / "decoder.onnx", EngineOptions(threads=parts.recipe.threads))
    (name, *_), (result, *_) = engine.inputs, engine.outputs

    def decode(latents: NDArray[Any]) -> Images:
        values = scaled(latents)
        parts = [engine.run({name: values[i : i + ROWS]})[result] for i in range(0, len(values), ROWS)]
        return to_unit(np.concatenate(parts))

    return decode
