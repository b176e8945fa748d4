"""Quantized graphs and the bundle that holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantempo import __version__
from quantempo.contracts.codec import canonical_json, digest
from quantempo.contracts.manifest import Decoder, Denoiser, FileEntry, GraphEntry, Manifest, ProgramIndex
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.progress import Advance, silent
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.bundle_writer import BundleWriter
from quantempo.stages.dialects import GraphChoice, lower_graphs, split_name
from quantempo.stages.gating import gate_graphs
from quantempo.stages.model import FULL, SECOND, Exported

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph
    from quantempo.export.weights import QuantizedWeight
    from quantempo.stages.cache_stage import FittedCache

GROUP_INPUT = "scale_group"


def write_quantized(
    writer: BundleWriter,
    exported: Exported,
    plan: QuantPlan,
    table: ScaleTable,
    weights: Mapping[str, QuantizedWeight],
    recipe: Recipe,
    choice: GraphChoice,
    cache: FittedCache | None = None,
    second: Mapping[str, QuantizedWeight] | None = None,
    advance: Advance = silent,
) -> Manifest:
    """Write everything but the manifest of a quantized bundle; the graphs of `cache` join or replace the others.

    The weights of a second expert are `second`; it shares the plan and the scales, which differ by timestep.  `advance`
    is told the number of graphs written and in all.
    """
    from safetensors.numpy import save

    graphs = lower_graphs(exported.graph, plan, table, weights, choice)
    if exported.second is not None and second is not None:
        lowered = lower_graphs(exported.second.graph, plan, table, second, choice)
        graphs |= {SECOND + name.removeprefix(FULL): graph for name, graph in lowered.items()}
    if cache is not None:
        graphs |= cache.lower(plan, weights, choice)
    denoiser = dataclasses.replace(exported.denoiser, group_input=GROUP_INPUT)
    manifest = _write_common(writer, exported, graphs, denoiser, recipe, advance)
    plans = dict.fromkeys(exported.graphs(), plan)
    gate_graphs(writer.root, manifest.graphs, plans if cache is None else plans | cache.plans(plan))
    writer.add_bytes("tables.safetensors", save({k: np.ascontiguousarray(v) for k, v in table.arrays().items()}))
    writer.add_json("plan.json", plan)
    manifest = dataclasses.replace(
        manifest, precision=recipe.precision, requires=_requires(denoiser, "scale-groups-1", "step-program-1"),
        partition=table.partition,
        tables="tables.safetensors", plan="plan.json",
    )
    return manifest if cache is None else cache.write(writer, manifest)


def _requires(denoiser: Denoiser, *features: str) -> tuple[str, ...]:
    """The features of a manifest, with what its denoiser adds."""
    return (*features, *(["pinned-inputs-1"] if denoiser.pinned else []))


def write_float(
    exported: Exported, recipe: Recipe, out: Path, overwrite: bool, advance: Advance = silent
) -> OpenBundle:
    """A float bundle; `advance` is told the number of graphs written and in all."""
    with BundleWriter(out, overwrite=overwrite) as writer:
        graphs = {f"{variant}.float-f32": graph for variant, graph in exported.graphs().items()}
        manifest = _write_common(writer, exported, graphs, exported.denoiser, recipe, advance)
        writer.finish(manifest)
    return read_bundle(out)


def float_view(exported: Exported, recipe: Recipe) -> OpenBundle:
    """The exported denoiser as a bundle to run, where it lies: no file is copied, and none is a step program."""
    files: dict[str, FileEntry] = {}
    entries = {}
    for variant, each in ((FULL, exported), (SECOND, exported.second)):
        if each is None:
            continue
        paths = [path for path in (each.graph_file, each.graph_file.with_name(f"{each.graph_file.name}.data"))
                 if path.is_file()]  # fmt: skip
        # Those of a second expert lie in another folder; this bundle is never written.
        names = [path.name if each is exported else str(path) for path in paths]
        files |= {name: FileEntry("", path.stat().st_size) for name, path in zip(names, paths, strict=True)}
        entry = graph_entry(f"{variant}.float-f32", each.graph, names[0], names[1:])
        entries[f"{variant}.float-f32"] = dataclasses.replace(entry, file=names[0], data=tuple(names[1:]))
    manifest = Manifest(
        name=exported.name, precision="float32", requires=(),
        files=files, graphs=entries,
        denoiser=exported.denoiser, decoder=Decoder(), default_guidance=recipe.default_guidance,
        programs=ProgramIndex(exported.scheduler, exported.scheduler_digest, {}, "", recipe.steps[0]),
        provenance={"float_graph": exported.identity},
    )
    return OpenBundle(exported.graph_file.parent, manifest, exported.identity)


def _write_common(
    writer: BundleWriter,
    exported: Exported,
    graphs: Mapping[str, Graph],
    denoiser: Denoiser,
    recipe: Recipe,
    advance: Advance,
) -> Manifest:
    """Graphs, programs and recipe; the manifest of a float bundle with them."""
    from quantempo.export.graph_files import write_graphs

    models = dict(graphs)
    decoder = exported.decoder
    if exported.decoder_graph is not None:
        models["decoder.float-f32"] = exported.decoder_graph
        decoder = dataclasses.replace(decoder, graph="decoder.float-f32")
    folder = writer.path("graphs/x").parent
    written = write_graphs(folder, models, advance)
    entries = {name: graph_entry(name, models[name], file.file, file.data) for name, file in written.items()}
    files = {}
    for steps, path in exported.programs.items():
        files[str(steps)] = f"programs/{steps:04d}.json"
        writer.add_file(files[str(steps)], path)
    writer.add_bytes("scheduler_config.json", exported.scheduler_json)
    writer.add_json("recipe.json", recipe)
    return Manifest(
        name=exported.name, precision="float32", requires=_requires(denoiser, "step-program-1"), files={},
        graphs=entries, denoiser=denoiser, decoder=decoder, default_guidance=recipe.default_guidance,
        programs=ProgramIndex(
            exported.scheduler, exported.scheduler_digest, files, "scheduler_config.json", recipe.steps[0]
        ),
        provenance=_provenance(exported, recipe),
    )


def graph_entry(name: str, model: Graph, file: str, data: Sequence[str]) -> GraphEntry:
    """The manifest's entry of a graph that was written to `graphs/`."""
    from quantempo.export.graph_files import specs

    variant, _, form = name.rpartition(".")
    dialect, float_type = split_name(form)
    return GraphEntry(
        file=f"graphs/{file}", data=tuple(f"graphs/{d}" for d in data), variant=variant,
        dialect=dialect, float_type=float_type,  # type: ignore[arg-type]  # names are ours
        inputs=specs(model.graph.inputs), outputs=specs(model.graph.outputs),
    )


def _provenance(exported: Exported, recipe: Recipe) -> dict[str, str]:
    from importlib.metadata import version

    packages = ("diffusers", "numpy", "onnx", "onnxruntime", "torch")
    return {
        "quantempo": __version__, **{name: version(name) for name in packages}, "model": exported.digest,
        "model_class": exported.class_name, "float_graph": exported.identity,
        "recipe": digest(canonical_json(recipe)), "seed": str(recipe.seed),
    }
