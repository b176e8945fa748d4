"""Quantized graphs and the bundle that holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantempo import __version__
from quantempo.contracts.codec import canonical_json, digest
from quantempo.contracts.manifest import Denoiser, GraphEntry, Manifest, ProgramIndex
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.engines.ort import executed_operators
from quantempo.errors import ExportError
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.bundle_writer import BundleWriter
from quantempo.stages.calibration import Calibration
from quantempo.stages.model import Exported

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph
    from quantempo.export.weights import QuantizedWeight

GROUP_INPUT = "scale_group"


def lower_graphs(
    graph: Graph,
    plan: QuantPlan,
    table: ScaleTable,
    weights: Mapping[str, QuantizedWeight],
    dialects: Iterable[str],
) -> dict[str, Graph]:
    """Quantized graphs by name, all with the same weights."""
    from quantempo.export.lower_ort import lower_ort
    from quantempo.export.lower_portable import lower_portable

    lowerings = {"ort": lower_ort, "portable": lower_portable}
    return {f"full.{name}-f32": lowerings[name](graph, plan, table, weights) for name in dialects}


def round_weights(
    exported: Exported, plan: QuantPlan, recipe: Recipe, collected: Calibration, table: ScaleTable
) -> Mapping[str, QuantizedWeight]:
    from quantempo.export.weights import quantize_weights

    if recipe.weight_method == "gptq":
        return quantize_weights(exported.graph, plan, "mse", collected.grams.matrices(table))
    return quantize_weights(exported.graph, plan, recipe.weight_method)


def write_quantized(
    writer: BundleWriter,
    exported: Exported,
    plan: QuantPlan,
    table: ScaleTable,
    weights: Mapping[str, QuantizedWeight],
    recipe: Recipe,
) -> Manifest:
    from safetensors.numpy import save

    graphs = lower_graphs(exported.graph, plan, table, weights, ("ort", "portable"))
    denoiser = dataclasses.replace(exported.denoiser, group_input=GROUP_INPUT)
    manifest = _write_common(writer, exported, graphs, denoiser, recipe)
    check_fused(writer.root / "graphs" / "full.ort-f32.onnx", plan)
    writer.add_bytes("tables.safetensors", save({k: np.ascontiguousarray(v) for k, v in table.arrays().items()}))
    writer.add_json("plan.json", plan)
    return dataclasses.replace(
        manifest, precision="int8", requires=("scale-groups-1", "step-program-1"), partition=table.partition,
        tables="tables.safetensors", plan="plan.json",
    )


def write_float(exported: Exported, recipe: Recipe, out: Path, overwrite: bool) -> OpenBundle:
    with BundleWriter(out, overwrite=overwrite) as writer:
        manifest = _write_common(writer, exported, {"full.float-f32": exported.graph}, exported.denoiser, recipe)
        writer.finish(manifest)
    return read_bundle(out)


def _write_common(
    writer: BundleWriter,
    exported: Exported,
    graphs: Mapping[str, Graph],
    denoiser: Denoiser,
    recipe: Recipe,
) -> Manifest:
    """Graphs, programs and recipe; the manifest of a float bundle with them."""
    from quantempo.export.graph_files import write_graphs

    models = dict(graphs)
    decoder = exported.decoder
    if exported.decoder_graph is not None:
        models["decoder.float-f32"] = exported.decoder_graph
        decoder = dataclasses.replace(decoder, graph="decoder.float-f32")
    folder = writer.path("graphs/x").parent
    written = write_graphs(folder, models)
    entries = {name: _entry(name, models[name], file.file, file.data) for name, file in written.items()}
    files = {}
    for steps, program in exported.programs.items():
        files[str(steps)] = f"programs/{steps:04d}.json"
        writer.add_json(files[str(steps)], program)
    writer.add_bytes("scheduler_config.json", exported.scheduler_json)
    writer.add_json("recipe.json", recipe)
    return Manifest(
        name=exported.name, precision="float32", requires=("step-program-1",), files={}, graphs=entries,
        denoiser=denoiser, decoder=decoder, default_guidance=recipe.default_guidance,
        programs=ProgramIndex(
            exported.scheduler, exported.scheduler_digest, files, "scheduler_config.json", recipe.steps[0]
        ),
        provenance=_provenance(exported, recipe),
    )


def _entry(name: str, model: Graph, file: str, data: Sequence[str]) -> GraphEntry:
    from quantempo.export.graph_files import specs

    variant, _, dialect = name.partition(".")
    return GraphEntry(
        file=f"graphs/{file}", data=tuple(f"graphs/{d}" for d in data), variant=variant,
        dialect=dialect.removesuffix("-f32"), float_type="float32",  # type: ignore[arg-type]  # names are ours
        inputs=specs(model.graph.inputs), outputs=specs(model.graph.outputs),
    )


def _provenance(exported: Exported, recipe: Recipe) -> dict[str, str]:
    from importlib.metadata import version

    packages = ("diffusers", "numpy", "onnx", "onnxruntime", "torch")
    return {
        "quantempo": __version__, **{name: version(name) for name in packages}, "model": exported.digest,
        "model_class": exported.class_name, "float_graph": exported.graph_digest,
        "recipe": digest(canonical_json(recipe)), "seed": str(recipe.seed),
    }


def check_fused(graph: Path, plan: QuantPlan) -> None:
    """Post-condition: the optimized graph runs every quantized site on integer operators.

    Raises:
        ExportError: it does not.
    """
    ran = executed_operators(graph)
    sites = plan.quantized()
    wanted = {
        "com.microsoft.MatMulIntegerToFloat": sum(site.op == "matmul" for site in sites),
        "QLinearConv": sum(site.op == "conv" for site in sites),
    }
    nhwc = ran.get("com.microsoft.QLinearConv", 0)
    found = {name: ran.get(name, 0) + (nhwc if name == "QLinearConv" else 0) for name in wanted}
    if found != wanted:
        raise ExportError(
            f"optimized graph of {graph.name}", found=str(found), wanted=str(wanted),
            cause="this version of ONNX Runtime rewrites the quantized operators",
            remedy="report it with the output of `pip list`; onnxruntime 1.23 to 1.31 are known to work",
        )
