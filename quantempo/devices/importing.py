"""A bundle with the activation scales of a checkpoint that another tool calibrated."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantempo.calib.modelopt import Imported, import_maxima, read_maxima
from quantempo.devices.rewriting import plan_and_float_graph, quantized_dialects, rewrite_bundle, weights_of
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.stages.dialects import Attention, GraphChoice, lower_graphs


def with_imported_scales(
    source: Path, checkpoint: Path, out: Path, overwrite: bool = False
) -> tuple[OpenBundle, Imported]:
    """A bundle like another one, down to the integer weights, with the scales of a ModelOpt checkpoint.

    Args:
        source: a quantized bundle with its reference.
        checkpoint: see `quantempo.calib.modelopt`.
        out: the bundle to be.
        overwrite: replace an older bundle.

    Raises:
        BundleError: no quantized bundle, or one without its reference.
        CalibrationError: the checkpoint holds no scales for this model.
    """
    from safetensors.numpy import save

    from quantempo.export.graph_files import load_graph
    from quantempo.export.quantize_attention import stored_products, stored_ranges

    maxima = read_maxima(checkpoint)
    bundle = read_bundle(source)
    plan, graph = plan_and_float_graph(bundle)
    table = bundle.scale_table()
    assert table is not None  # a bundle with a plan has a table
    imported = import_maxima(table, plan, maxima)
    dialects = quantized_dialects(bundle)
    portable = load_graph(bundle.path(bundle.manifest.graphs[dialects["portable"]].file))
    weights = weights_of(bundle, plan)
    # The checkpoint says nothing about the inside of attention: what was calibrated stays.
    attention: dict[str | None, Attention] = {"both": "quantized", "scores": "auto", None: "float"}
    choice = GraphChoice(
        tuple(f"{dialect}-f32" for dialect in dialects), attention[stored_products(portable)],
        ranges=stored_ranges(portable, "int8"),
    )
    graphs = lower_graphs(graph, plan, imported.table, weights, choice)
    arrays = {name: np.ascontiguousarray(array) for name, array in imported.table.arrays().items()}
    files = {str(bundle.manifest.tables): save(arrays)}
    return rewrite_bundle(bundle, out, graphs, files, {}, {"full": plan}, overwrite), imported
