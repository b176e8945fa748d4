"""The C++ runtime beside Python: the same bits? And what does it cost in time and memory?

    python benchmarks/cpp_runtime.py [--work FOLDER] [--json FILE] [--only identity|cost|memory] [--variants FOLDER...]

*Identity*: latents bit for bit and the PNG's bytes, over engines, precisions and schedulers, with feature caching
and without.  Each scheduler has a bundle of its own of each demo model, compiled for it with `--cache every:2`: a
cached run replays the program, the vectors and the corrections that were fitted for this scheduler.  *Cost*, on ONNX
Runtime with one thread (run it on an idle machine): microseconds a call of the loop outside the engine, resident memory
beside a C program that opens and runs the same graphs, seconds from opening to the first latents on warm files (and the
CPU seconds of that process, which other jobs disturb less), bytes of the stripped library.  *Memory*: what the second
graph of a cached model adds; each FOLDER of `--variants` is one that `benchmarks/caching_speed.py --keep` wrote.
Bundles that `--work` holds already are taken as they are.
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
from typing import Any, Literal

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.cpp_library import Sampler, call, configure_and_build, engine_library  # noqa: E402

import quantempo  # noqa: E402
from quantempo.contracts.cache import FULL, CachePlan  # noqa: E402
from quantempo.contracts.codec import from_data  # noqa: E402
from quantempo.contracts.manifest import GraphEntry  # noqa: E402
from quantempo.export.graph_files import load_graph, specs, write_graphs  # noqa: E402
from quantempo.export.variants import cut_variants  # noqa: E402
from quantempo.runtime.bundle import read_bundle  # noqa: E402
from quantempo.runtime.bundle_writer import BundleWriter  # noqa: E402
from quantempo.runtime.images import grid, save  # noqa: E402
from quantempo.runtime.session import Session  # noqa: E402
from quantempo.stages.cache_runs import graph_corrections  # noqa: E402

MODELS = {
    "dit": ("quantempo/demo/dit", "quantempo/demo/dit/scheduler"),
    "unet": ("tests/models/unet/unet", "tests/models/unet/scheduler"),
}
"""Model and the scheduler's configuration, whose class is exchanged."""
SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler")
STEPS, CALIBRATION = 8, 16
"""Steps of a run and samples of the calibration: enough for bundles that are compared with themselves."""
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


def compiled(work: Path, model: str, scheduler: str) -> Path:
    """The bundle of a demo model and a scheduler with feature caching; compiled where it is not there yet."""
    source, stock = MODELS[model]
    target = work / f"{model}-{scheduler}"
    if not (target / "manifest.json").exists():
        folder = work / "schedulers" / scheduler / model
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads((ROOT / stock / "scheduler_config.json").read_text())
        (folder / "scheduler_config.json").write_text(json.dumps({**config, "_class_name": scheduler}))
        call(
            Path(sys.executable).parent / "quantempo", "compile", ROOT / source, "--scheduler", folder, "-o", target,
            "--cache", "every:2", "--steps", STEPS, "--samples", CALIBRATION, "--guard", "off", "--overwrite",
        )  # fmt: skip
    return target


def same_bits(sampler: Sampler, bundle: Path, session: Session, cached: bool, folder: Path) -> dict[str, Any]:
    """Whether both runtimes agree on three samples."""
    mode: Literal["plan", "none"] = "plan" if cached else "none"
    out = folder / "out.png"
    labels = [word for label in LABELS for word in ("--class", label)]
    shape = session.manifest.denoiser.latents_shape
    words = ("--seed", 5, "--steps", STEPS, "--cache", mode, "-o", out)
    found = sampler.latents(bundle, shape, folder, *labels, *words)
    wanted = session(list(LABELS), seed=5, num_inference_steps=STEPS, feature_cache=mode)
    save(grid(list(wanted.images), columns=1), folder / "python.png")
    return {
        "latents": found.tobytes() == wanted.latents.tobytes() and bool(np.isfinite(found).all()),
        "png": out.read_bytes() == (folder / "python.png").read_bytes(),
        "reused": wanted.timings.reused, "evaluations": wanted.timings.rows,
    }  # fmt: skip


def corrections(bundle: Path) -> list[str]:
    """Those of a bundle's cache plan."""
    manifest = read_bundle(bundle).manifest
    assert manifest.cache is not None
    return list(json.loads((bundle / manifest.cache.plan).read_text()).get("corrections", []))


def identity(build: Path, work: Path) -> dict[str, dict[str, Any]]:
    """The whole matrix."""
    results: dict[str, dict[str, Any]] = {}
    for model in MODELS:
        for scheduler in SCHEDULERS:
            bundle = compiled(work, model, scheduler)
            with tempfile.TemporaryDirectory() as scratch:
                roots = {"int8": bundle, "float": cached_twin(bundle, Path(scratch) / "twin")}
                for engine in ("ort", "openvino"):
                    sampler = Sampler(build, engine_library(engine), engine)
                    for precision, root in roots.items():
                        with quantempo.load(root, engine=engine, threads=1) as session:
                            assert session.manifest.programs.scheduler == scheduler
                            for cached in (False, True):
                                name = f"{engine} {model} {precision} {scheduler} {'cached' if cached else 'plain'}"
                                found = same_bits(sampler, root, session, cached, Path(scratch))
                                results[name] = found | ({"corrections": corrections(bundle)} if cached else {})
                                print(name, results[name], flush=True)
    return results


def cost(build: Path, bundle: Path, cached: bool) -> dict[str, float]:
    """Time and memory of one bundle, over calls of its full graph or over a cached program."""
    library, mode = engine_library("ort"), "plan" if cached else "none"
    manifest = read_bundle(bundle).manifest
    dialect = "float" if manifest.precision == "float32" else "ort"
    graphs = {entry.variant: bundle / entry.file for entry in manifest.graphs.values() if entry.dialect == dialect}
    opened = [graphs["full"], *((file for name, file in sorted(graphs.items()) if "reuse" in name) if cached else ())]
    footprint = (build / "quantempo-footprint", bundle, library, 1)
    said = [line.split() for line in call(*footprint, STEPS, RUNS, mode).splitlines()]
    calls = [float(words[1]) for words in said if words[0] == "call"]
    ours = said[-1]
    bare = call(build / "quantempo-bare", library, 2, RUNS * STEPS, *opened).split()
    steps = STEPS if cached else 1
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    starts = [call(*footprint, steps, 1, mode).splitlines() for _ in range(OPENINGS)]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {
        "loop_us_per_call": round(1e6 * statistics.median(calls[1:]), 1),
        "worst_loop_us_per_call": round(1e6 * max(calls[1:]), 1),
        "resident_mb": round(int(ours[1]) / 1024, 1), "bare_resident_mb": round(int(bare[1]) / 1024, 1),
        "anonymous_mb": round(int(ours[3]) / 1024, 1), "bare_anonymous_mb": round(int(bare[3]) / 1024, 1),
        "open_seconds": statistics.median(float(lines[0].split()[1]) for lines in starts),
        "first_latents_seconds": statistics.median(float(lines[1].split()[1]) for lines in starts),
        "first_steps": steps, "process_cpu_seconds": round(computed / OPENINGS, 3),
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
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "cpp-bundles", help="where the bundles are kept")
    parser.add_argument("--variants", type=Path, nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("identity", "cost", "memory"))
    parser.add_argument("--conditions", default="idle machine", help="what else ran, for the page")
    arguments = parser.parse_args()
    build = configure_and_build(ROOT / "build" / "cpp", "-DQUANTEMPO_TESTS=ON")
    file: Path | None = arguments.json
    results: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.exists() else {}
    work: Path = arguments.work
    if arguments.only in (None, "identity"):
        results["identity"] = identity(build, work)
    if arguments.variants:
        results["memory"] = {folder.name: second_graph(build, folder) for folder in arguments.variants}
        print(json.dumps(results["memory"], indent=2))
    if arguments.only in (None, "cost"):
        results |= {"processor": processor(), "conditions": arguments.conditions}
        results["stripped_bytes"] = stripped_bytes(build)
        results["cost"] = {}
        for model in MODELS:
            bundle = compiled(work, model, SCHEDULERS[0])
            results["cost"][f"{model}, int8"] = cost(build, bundle, cached=False)
            results["cost"][f"{model}, int8, cached"] = cost(build, bundle, cached=True)
            results["cost"][f"{model}, float"] = cost(build, bundle / "reference", cached=False)
        print(json.dumps(results["cost"], indent=2))
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
