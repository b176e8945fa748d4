"""Another bundle from a finished one: some graphs exchanged or added, everything else as it was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantempo.contracts.manifest import MANIFEST_NAME, GraphEntry
from quantempo.contracts.plan import QuantPlan
from quantempo.errors import BundleError
from quantempo.inspection import REFERENCE, STATISTICS, load_plan
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.bundle_writer import BundleWriter
from quantempo.stages.gating import gate_graphs

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph
    from quantempo.export.weights import QuantizedWeight


def plan_and_float_graph(bundle: OpenBundle) -> tuple[QuantPlan, Graph]:
    """What a quantized graph can be lowered from again.

    Raises:
        BundleError: a float bundle, one without its reference, or one with feature caching.
    """
    from quantempo.export.graph_files import load_graph

    if bundle.manifest.cache is not None:
        raise BundleError(
            f"{bundle.root}", found="a bundle with feature caching", wanted="one without",
            cause="its variants and corrections were fitted on the scales and steps that would change",
            remedy="compile it again with --cache none",
        )
    plan = load_plan(bundle)
    folder = bundle.root / REFERENCE
    if plan is None or not (folder / MANIFEST_NAME).is_file():
        raise BundleError(
            f"{bundle.root}", found="a float bundle" if plan is None else "no float reference beside it",
            wanted="a quantized bundle with its reference/", cause="it was compiled without a reference",
            remedy="compile it again with --reference",
        )
    reference = read_bundle(folder)
    return plan, load_graph(reference.path(reference.manifest.graphs["full.float-f32"].file))


def quantized_dialects(bundle: OpenBundle) -> dict[str, str]:
    """Name of the full float32 graph by dialect, as far as this version lowers them."""
    return {
        entry.dialect: name for name, entry in bundle.manifest.graphs.items()
        if entry.variant == "full" and entry.dialect in ("ort", "portable") and entry.float_type == "float32"
    }


def weights_of(bundle: OpenBundle, plan: QuantPlan) -> dict[str, QuantizedWeight]:
    """The integer weights of a bundle; a graph holds those of the sites that it does not keep in float."""
    from quantempo.export.graph_files import load_graph
    from quantempo.export.weights import stored_weights

    found: dict[str, QuantizedWeight] = {}
    for dialect, name in quantized_dialects(bundle).items():
        graph = load_graph(bundle.path(bundle.manifest.graphs[name].file))
        found |= stored_weights(graph, plan.for_graph(f"{dialect}-f32"))
    return found


def rewrite_bundle(
    source: OpenBundle,
    out: Path,
    graphs: Mapping[str, Graph],
    files: Mapping[str, bytes],
    changes: Mapping[str, Any],
    plans: Mapping[str, QuantPlan | None],
    overwrite: bool = False,
) -> OpenBundle:
    """Write a bundle like another one, float reference and calibration statistics included.

    Args:
        source: verified.
        out: the bundle to be.
        graphs: to take the place of graphs of the same name, or to join them; weights that they have in common with
            the others are stored once.
        files: other files that are exchanged, by name.
        changes: fields of the manifest.
        plans: what the variants among `graphs` quantize; the fusion gate judges them.
        overwrite: replace an older bundle.

    Raises:
        OutputExists: `out` is taken.
        FusionError: a quantized site of `graphs` runs in float.
    """
    from quantempo.export.graph_files import load_graph, specs, write_graphs

    manifest = source.manifest
    every = {name: load_graph(source.path(entry.file)) for name, entry in manifest.graphs.items()} | dict(graphs)
    with BundleWriter(out, overwrite=overwrite) as writer:
        written = write_graphs(writer.path("graphs/x").parent, every)
        entries = {}
        for name, file in written.items():
            place = f"graphs/{file.file}", tuple(f"graphs/{data}" for data in file.data)
            model = every[name].graph
            if name in manifest.graphs:
                entries[name] = replace(manifest.graphs[name], file=place[0], data=place[1])
            else:
                variant, _, dialect = name.partition(".")
                entries[name] = GraphEntry(
                    *place, variant, dialect.removesuffix("-f32"), "float32",  # type: ignore[arg-type]  # our names
                    specs(model.inputs), specs(model.outputs),
                )
        gate_graphs(writer.root, {name: entries[name] for name in graphs}, plans)
        for name in manifest.files:
            if not name.startswith("graphs/"):
                if name in files:
                    writer.add_bytes(name, files[name])
                else:
                    writer.add_file(name, source.path(name))
        for name in (REFERENCE, STATISTICS):
            _copy(source.root / name, writer.root / name)
        bundle = writer.finish(replace(manifest, graphs=entries, **changes))
    return bundle


def _copy(source: Path, place: Path) -> None:
    """Copy a file or folder if it is there.  Links would not do: onnx refuses weight files that have two names."""
    place.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, place)
    elif source.is_file():
        shutil.copyfile(source, place)
