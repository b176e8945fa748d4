"""The C++ runtime beside Python: the same bits? And what does it cost in time and memory?

    python benchmarks/cpp_runtime.py BUNDLE... [--json FILE] [--only identity|cost|memory] [--variants FOLDER...]

Each BUNDLE was compiled with feature caching and has its float twin in `reference/`, as the demo models by

    quantempo compile quantempo/demo/dit -o build/dit --cache every:2
    quantempo compile tests/models/unet/unet --scheduler tests/models/unet/scheduler -o build/unet --cache every:2

*Identity*: latents bit for bit and the PNG's bytes, over engines, precisions, schedulers, with feature caching (every
second call of the program reuses) and without.  *Cost*, on ONNX Runtime with one thread (run it on an idle machine):
microseconds a call of the loop outside the engine, resident memory beside a C program that opens and runs the same
graph, seconds from opening to the first latents on warm files (and the CPU seconds of that process, which other jobs
disturb less), bytes of the stripped library.  *Memory*: what the second graph of a cached model adds; each FOLDER is
one that `benchmarks/caching_speed.py --keep` wrote.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.cpp_library import Sampler, call, configure_and_build, engine_library  # noqa: E402

import quantempo  # noqa: E402
from quantempo.contracts.cache import FULL, CachePlan  # noqa: E402
from quantempo.contracts.codec import canonical_json, from_data  # noqa: E402
from quantempo.contracts.manifest import GraphEntry  # noqa: E402
from quantempo.contracts.program import StepProgram  # noqa: E402
from quantempo.export.graph_files import load_graph, specs, write_graphs  # noqa: E402
from quantempo.export.variants import cut_variants  # noqa: E402
from quantempo.runtime.bundle import read_bundle  # noqa: E402
from quantempo.runtime.bundle_writer import BundleWriter  # noqa: E402
from quantempo.runtime.images import grid, save  # noqa: E402
from quantempo.runtime.session import Session  # noqa: E402
from quantempo.stages.cache_runs import graph_corrections  # noqa: E402
from quantempo.stages.programs import trace_scheduler  # noqa: E402

SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler")
STEPS = 20
LABELS = (1, 2, 7)
RUNS = 30
OPENINGS = 5


def cached_twin(bundle: Path, target: Path) -> Path:
    """The float twin of a bundle, cut as it is: the same cached programs and vectors on float graphs.

    `quantempo compile` caches INT8 models only, so this bundle exists to compare runtimes, not for its images.
    """
    quantized, twin = read_bundle(bundle), read_bundle(bundle / "reference")
    assert quantized.manifest.cache is not None
    index, vectors = quantized.manifest.cache, quantized.manifest.vectors
    plan = from_data(CachePlan, json.loads(quantized.path(index.plan).read_text()), index.plan)
    corrections = graph_corrections(plan.corrections)
    (full,) = (entry for entry in twin.manifest.graphs.values() if entry.variant == FULL)
    found = cut_variants(load_graph(twin.path(full.file)), plan.cuts, plan.probe, corrections)
    graphs = {f"{name}.float-f32": variant.graph for name, variant in found.variants.items()}
    decoder = twin.manifest.decoder.graph
    if decoder is not None:
        graphs[decoder] = load_graph(twin.path(twin.manifest.graphs[decoder].file))
    with BundleWriter(target) as writer:
        entries = {}
        for name, file in write_graphs(writer.path("graphs/x").parent, graphs).items():
            variant = found.variants.get(name.removesuffix(".float-f32"))
            entries[name] = GraphEntry(
                f"graphs/{file.file}", tuple(f"graphs/{data}" for data in file.data), name.rpartition(".")[0], "float",
                "float32", specs(graphs[name].graph.inputs), specs(graphs[name].graph.outputs),
                variant.reads if variant else (), variant.writes if variant else (),
            )
        for name in twin.manifest.files:
            if not name.startswith("graphs/"):
                writer.add_bytes(name, twin.path(name).read_bytes())
        for name in (index.plan, *index.programs.values(), *((vectors,) if vectors else ())):
            writer.add_bytes(name, quantized.path(name).read_bytes())
        requires = {*twin.manifest.requires, *quantized.manifest.requires} - {"scale-groups-1"}
        writer.finish(replace(
            twin.manifest, files={}, graphs=entries, cache=index, vectors=vectors, requires=tuple(sorted(requires))
        ))  # fmt: skip
    return target


def program_for(bundle: Path, scheduler: str, cached: bool, folder: Path) -> StepProgram:
    """Another scheduler's program; `cached` lets every second call reuse what the one before it computed."""
    stock = json.loads((bundle / "scheduler_config.json").read_text())
    (folder / "scheduler_config.json").write_text(json.dumps({**stock, "_class_name": scheduler}))
    program = trace_scheduler(folder, STEPS)
    if not cached:
        return program
    index = read_bundle(bundle).manifest.cache
    assert index is not None
    stored = json.loads((bundle / index.programs[str(STEPS)]).read_text())
    reuse = next(c for c in stored["calls"] if c.get("graph", "full") != "full")
    again = {"graph": reuse["graph"], "vectors": reuse.get("vectors", {})}
    return replace(program, calls=tuple(replace(c, **again) if i % 2 else c for i, c in enumerate(program.calls)))


def same_bits(
    sampler: Sampler, bundle: Path, session: Session, scheduler: str, cached: bool, folder: Path
) -> dict[str, bool]:
    """Whether both runtimes agree on three samples."""
    given: dict[str, Any] = {"feature_cache": "plan" if cached else "none"}
    words: list[object] = ["--cache", given["feature_cache"]]
    if scheduler != session.manifest.programs.scheduler:
        program = program_for(bundle, scheduler, cached, folder)
        (folder / "program.json").write_text(canonical_json(program))
        given = {"program": program}
        words = ["--program", folder / "program.json"]
    else:
        given["num_inference_steps"] = STEPS
        words += ["--steps", STEPS]
    out = folder / "out.png"
    labels = [word for label in LABELS for word in ("--class", label)]
    shape = session.manifest.denoiser.latents_shape
    found = sampler.latents(bundle, shape, folder, *labels, "--seed", 5, "--guidance", 3, "-o", out, *words)
    wanted = session(list(LABELS), seed=5, guidance_scale=3.0, **given)
    save(grid(list(wanted.images), columns=1), folder / "python.png")
    return {
        "latents": found.tobytes() == wanted.latents.tobytes() and bool(np.isfinite(found).all()),
        "png": out.read_bytes() == (folder / "python.png").read_bytes(),
        "reused": cached and wanted.timings.reused > 0,
    }


def identity(build: Path, bundles: list[Path], work: Path) -> dict[str, dict[str, bool]]:
    """The whole matrix."""
    results = {}
    twins = {bundle: cached_twin(bundle, work / bundle.name) for bundle in bundles}
    for engine in ("ort", "openvino"):
        sampler = Sampler(build, engine_library(engine), engine)
        for bundle in bundles:
            for precision, root in (("int8", bundle), ("float", twins[bundle])):
                with quantempo.load(root, engine=engine, threads=1) as session:
                    for scheduler in SCHEDULERS:
                        for cached in (False, True):
                            name = f"{engine} {bundle.name} {precision} {scheduler} {'cached' if cached else 'plain'}"
                            with tempfile.TemporaryDirectory() as folder:
                                results[name] = same_bits(sampler, root, session, scheduler, cached, Path(folder))
                            print(name, results[name], flush=True)
    return results


def cost(build: Path, bundle: Path) -> dict[str, float]:
    """Time and memory of one bundle."""
    library = engine_library("ort")
    manifest = read_bundle(bundle).manifest
    dialect = "float" if manifest.precision == "float32" else "ort"
    graphs = {entry.variant: entry.file for entry in manifest.graphs.values() if entry.dialect == dialect}
    shape = manifest.denoiser.latents_shape
    said = [line.split() for line in call(build / "quantempo-footprint", bundle, library, 1, STEPS, RUNS).splitlines()]
    calls = [float(words[1]) for words in said if words[0] == "call"]
    ours = said[-1]
    bare = call(build / "quantempo-bare", bundle / graphs["full"], library, *shape, 2, RUNS).split()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    opened = [call(build / "quantempo-footprint", bundle, library, 1, 1, 1).splitlines() for _ in range(OPENINGS)]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {
        "loop_us_per_call": round(1e6 * statistics.median(calls[1:]), 1),
        "worst_loop_us_per_call": round(1e6 * max(calls[1:]), 1),
        "resident_mb": round(int(ours[1]) / 1024, 1), "bare_resident_mb": round(int(bare[1]) / 1024, 1),
        "anonymous_mb": round(int(ours[3]) / 1024, 1), "bare_anonymous_mb": round(int(bare[3]) / 1024, 1),
        "open_seconds": statistics.median(float(lines[0].split()[1]) for lines in opened),
        "first_latents_seconds": statistics.median(float(lines[1].split()[1]) for lines in opened),
        "process_cpu_seconds": round(computed / OPENINGS, 3),
    }


def second_graph(build: Path, folder: Path) -> dict[str, float]:
    """Megabytes that `reuse.0` adds to a process that ran `full`, with and without what graphs can share."""
    library = engine_library("ort")
    graphs = [folder / "variants" / f"{name}.onnx" for name in ("full", "reuse.0")]
    model = onnx.load(graphs[1], load_external_data=False)
    lengths = [int(e.value) for t in model.graph.initializer for e in t.external_data if e.key == "length"]
    found = {"own_weights_mb": round(sum(lengths) / 1e6, 1)}
    refusing = build / "librefusing_engine.so"
    for name, engine, arena in (
        ("shared", library, "shared"), ("packed_apart", refusing, "shared"), ("arenas_apart", library, "own"),
        ("apart", refusing, "own"),
    ):  # fmt: skip
        said = call(build / "quantempo-variants", engine, 2, arena, *graphs, REAL_ORT_LIBRARY=str(library))
        anonymous = [int(line.split()[-3]) for line in said.splitlines()]
        found[name] = round((anonymous[2] - anonymous[1]) * 1024 / 1e6, 2)
    return found


def stripped_bytes(build: Path) -> int:
    """Size of the library without symbols."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["strip", "-o", f"{folder}/lib", str(build / "libquantempo.so")], check=True)
        return (Path(folder) / "lib").stat().st_size


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    """Measure and print; figures that are not asked for are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--variants", type=Path, nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("identity", "cost", "memory"))
    parser.add_argument("--conditions", default="idle machine", help="what else ran, for the page")
    arguments = parser.parse_args()
    build = configure_and_build(ROOT / "build" / "cpp", "-DQUANTEMPO_TESTS=ON")
    file: Path | None = arguments.json
    results: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.exists() else {}
    if arguments.only in (None, "identity") and arguments.bundles:
        with tempfile.TemporaryDirectory() as work:
            results["identity"] = identity(build, arguments.bundles, Path(work))
    if arguments.variants:
        results["memory"] = {folder.name: second_graph(build, folder) for folder in arguments.variants}
        print(json.dumps(results["memory"], indent=2))
    if arguments.only in (None, "cost") and arguments.bundles:
        results |= {"processor": processor(), "conditions": arguments.conditions}
        results["stripped_bytes"] = stripped_bytes(build)
        results["cost"] = {
            f"{bundle.name}, {precision}": cost(build, root)
            for bundle in arguments.bundles for precision, root in (("int8", bundle), ("float", bundle / "reference"))
        }
        print(json.dumps(results["cost"], indent=2))
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
