"""Model in, bundle out: the one place that composes export, calibration, engines and runtime."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantempo import __version__
from quantempo.calib.collect import StatsCollector
from quantempo.calib.gram import GramCollector
from quantempo.calib.partition import Evidence, choose_partition, parse_groups
from quantempo.calib.ranges import method_named
from quantempo.calib.tables import build_table
from quantempo.calib.trajectories import (
    FIRST_SEED,
    CalibrationSet,
    Observer,
    ProgramChoice,
    TrajectoryBatch,
    plan_batches,
    run_calibration,
)
from quantempo.contracts.codec import canonical_json, digest, from_data, parse_json
from quantempo.contracts.engine import Buffer, EngineOptions
from quantempo.contracts.manifest import Decoder, Denoiser, GraphEntry, Manifest, ProgramIndex
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram
from quantempo.contracts.table import ScaleTable
from quantempo.engines.ort import executed_operators
from quantempo.engines.registry import open_engine
from quantempo.errors import ExportError, MissingExtra, PlanError, RequestError
from quantempo.progress import Progress, SilentProgress
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.bundle_writer import BundleWriter, check_target
from quantempo.runtime.loop import Observation
from quantempo.runtime.request import Request
from quantempo.runtime.session import Session

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph
    from quantempo.export.weights import QuantizedWeight

ENGINE = "ort"
STATISTICS = "report/statistics.safetensors"
"""Sidecar with the calibration statistics, from which other scale tables can be made without another run."""
GROUP_INPUT = "scale_group"


@dataclass(frozen=True)
class CompileSummary:
    """What a compile made."""

    bundle: OpenBundle
    sites: int
    quantized: int
    groups: int

    def text(self) -> str:
        """A few lines for people."""
        size = sum(entry.size for entry in self.bundle.manifest.files.values())
        return (
            f"wrote {self.bundle.root}: {size / 1e6:.1f} MB, {self.quantized} of {self.sites} sites quantized, "
            f"{self.groups} scale groups, programs for {len(self.bundle.steps)} step counts"
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the trajectories taught: statistics per (tensor, timestep), and Gram matrices per tensor."""

    statistics: StatsCollector
    grams: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Exported:
    """A model's float parts, before anything is quantized."""

    name: str
    class_name: str
    digest: str
    denoiser: Denoiser
    graph: Graph
    graph_digest: str
    decoder: Decoder
    decoder_graph: Graph | None
    scheduler: str
    scheduler_digest: str
    scheduler_json: bytes
    programs: Mapping[int, StepProgram]


def compile_model(
    model: Path | str,
    out: Path | str,
    recipe: Recipe | None = None,
    *,
    scheduler: Path | None = None,
    plan_file: Path | None = None,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompileSummary:
    """Compile a model directory to a bundle.

    Args:
        model: pipeline directory, or denoiser directory with `scheduler`.
        out: the bundle to be.
        recipe: settings.
        scheduler: scheduler directory; overrides the pipeline's own.
        plan_file: a plan to follow instead of the default one; it must belong to this model.
        arrays: conditioning to calibrate on, for models that take arrays: per input name (samples, …), and
            `negative_NAME` for the unconditional branch.
        overwrite: replace an older bundle.
        progress: where stages are shown.

    Raises:
        QuantempoError: bad input, before the work starts; nothing is written then.
    """
    recipe, progress, out = recipe or Recipe(), progress or SilentProgress(), Path(out).absolute()
    check_target(out, overwrite)
    method_named(recipe.range_method)
    parse_groups(recipe.groups)
    if plan_file is not None and not plan_file.is_file():
        raise PlanError(
            f"plan {plan_file}", found="no such file", wanted="a plan.json", cause="the path is misspelt",
            remedy="give the plan.json of a bundle of this model, as it is or edited",
        )
    # Beside the output where its folder exists, so that moving is cheap; else above it: an error leaves no folder.
    nearby = next(parent for parent in out.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.work-", dir=nearby) as folder:
        work = Path(folder)
        exported = _export(Path(model), scheduler, recipe, work, progress, arrays or {})
        if recipe.precision == "float32":
            bundle = _write_float(exported, recipe, out, overwrite)
            return CompileSummary(bundle, 0, 0, 0)
        plan = _plan(exported, recipe, plan_file)
        reference = _write_float(exported, recipe, work / "reference", overwrite=False)
        with progress.stage("calibrate") as advance:
            collected = calibrate(reference, plan, recipe, arrays=arrays, progress=advance)
        with progress.stage("scales"):
            table = scale_table(collected.statistics, plan, recipe.groups, recipe.range_method)
        with progress.stage("lower and write"), BundleWriter(out, overwrite=overwrite) as writer:
            weights = _weights(exported, plan, recipe, collected)
            manifest = _write_quantized(writer, exported, plan, table, weights, recipe)
            if recipe.reference:
                shutil.move(work / "reference", writer.root / "reference")
                (writer.root / STATISTICS).parent.mkdir()
                collected.statistics.save(writer.root / STATISTICS)
            bundle = writer.finish(manifest)
    return CompileSummary(bundle, len(plan.sites), len(plan.quantized()), table.partition.groups)


def _compile_extra() -> None:
    """Ask for the extra in our words before some import asks for a package in its own."""
    import importlib.util

    for package in ("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "scipy", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("compile", package=package, extra="compile,cpu")


def _export(
    model: Path,
    scheduler: Path | None,
    recipe: Recipe,
    work: Path,
    progress: Progress,
    arrays: Mapping[str, NDArray[Any]],
) -> Exported:
    _compile_extra()
    from quantempo.export.decoder import trace_decoder
    from quantempo.export.families import family_of
    from quantempo.export.graph_files import load_graph
    from quantempo.export.sampler import load_scheduler, scheduler_identity, trace_programs
    from quantempo.export.source import open_source
    from quantempo.export.trace import load_denoiser, trace_module, verify_denoiser

    source = open_source(model, scheduler)
    family = family_of(source)
    stock = load_scheduler(source.scheduler)
    if recipe.precision != "float32":
        # Refused here rather than after minutes of tracing.
        choices = [ProgramChoice(steps, folder) for folder in ("", *recipe.schedulers) for steps in recipe.steps]
        trajectory_batches(family.denoiser(), recipe, choices, arrays)
    with progress.stage("trace sampler"):
        programs = trace_programs(stock, sorted({*range(1, recipe.max_steps + 1), *recipe.steps}))
    with progress.stage("trace denoiser"):
        module = load_denoiser(source)
        graph = trace_module(module, family, work)
        verify_denoiser(graph, module, family, _run_graph)
        del module
    decoder, decoder_graph = Decoder(), None
    if source.vae is not None:
        with progress.stage("trace decoder"):
            traced, decoder = trace_decoder(source.vae, work, _run_graph, sample_shape=family.sample_shape)
            decoder_graph = load_graph(traced.path)
    name, identity = scheduler_identity(stock)
    return Exported(
        name=source.name, class_name=source.class_name, digest=source.digest, denoiser=family.denoiser(),
        graph=load_graph(graph.path), graph_digest=graph.digest, decoder=decoder, decoder_graph=decoder_graph,
        scheduler=name, scheduler_digest=identity, programs=programs,
        scheduler_json=(source.scheduler / "scheduler_config.json").read_bytes(),
    )


def _run_graph(path: Path, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    engine = open_engine(ENGINE, path)
    try:
        return engine.run(feeds)
    finally:
        engine.close()


def _plan(exported: Exported, recipe: Recipe, plan_file: Path | None) -> QuantPlan:
    from quantempo.export.sites import PlanOptions, check_plan, default_plan

    if plan_file is None:
        options = PlanOptions(keep=(*recipe.keep, *recipe.exclude), activation_bits=recipe.activation_bits)
        return default_plan(exported.graph, exported.graph_digest, options)
    plan = from_data(QuantPlan, parse_json(plan_file.read_bytes(), str(plan_file)), str(plan_file))
    if plan.model != exported.graph_digest:
        raise PlanError(
            f"plan {plan_file}", found=f"a plan for the graph {plan.model[:12]}…",
            wanted=f"one for {exported.graph_digest[:12]}…", cause="it was written for another model or version",
            remedy="compile without --plan, then edit the plan.json of that bundle",
        )
    check_plan(plan, exported.graph, f"plan {plan_file}")
    return plan


def calibrate(
    reference: OpenBundle,
    plan: QuantPlan,
    recipe: Recipe,
    *,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    progress: Any = None,
) -> Calibration:
    """Run the recipe's trajectories on a float bundle, with taps on everything that needs scales.

    Raises:
        NonFiniteActivation: a tapped tensor held NaN or infinity.
        RequestError: the calibration set does not fit the model.
    """
    denoiser = reference.manifest.denoiser
    tensors = plan.scaled_tensors()
    programs = _calibration_programs(reference, recipe)
    batches = trajectory_batches(denoiser, recipe, programs, arrays or {})
    options = EngineOptions(threads=recipe.threads, extra_outputs=tensors)
    grams = GramCollector({site.tensor for site in plan.quantized() if site.op == "matmul"})
    with Session(reference, _open_with(ENGINE), options) as session:

        def run_batch(batch: TrajectoryBatch, observe: Observer) -> None:
            def observer(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
                taps = {name: outputs[name].array for name in tensors}
                observe(seen.call.key, taps)
                if recipe.weight_method == "gptq":
                    grams.observe(taps)

            session.sample(
                _request(batch, denoiser, arrays or {}), programs[batch.program], output_type="latent",
                observer=observer,
            )

        statistics = run_calibration(batches, run_batch, StatsCollector("full", tensors), progress=progress)
    return Calibration(statistics, grams.matrices())


def trajectory_batches(
    denoiser: Denoiser, recipe: Recipe, programs: Iterable[ProgramChoice], arrays: Mapping[str, NDArray[Any]]
) -> tuple[TrajectoryBatch, ...]:
    """What calibration will run.

    Raises:
        RequestError: the recipe's calibration set is impossible, or conditioning is missing.
    """
    first = FIRST_SEED * (recipe.seed + 1)  # disjoint between recipes with different seeds
    declared = CalibrationSet(
        samples=recipe.samples, batch=recipe.batch, guidance=recipe.guidance, programs=tuple(programs),
        labels=_labels(denoiser, recipe), seeds=tuple(range(first, first + recipe.samples)),
    )
    _check_arrays(denoiser, arrays)
    return plan_batches(declared, classes=denoiser.classes[0].count if denoiser.classes else None)


def _open_with(backend: str) -> Any:
    return lambda path, options: open_engine(backend, path, options)


def _calibration_programs(reference: OpenBundle, recipe: Recipe) -> dict[ProgramChoice, StepProgram]:
    programs = {ProgramChoice(steps): reference.program(steps) for steps in recipe.steps}
    for folder in recipe.schedulers:
        for steps in recipe.steps:
            program = trace_scheduler(Path(folder), steps)
            programs[ProgramChoice(steps, program.scheduler)] = program
    return programs


def _labels(denoiser: Denoiser, recipe: Recipe) -> tuple[int, ...]:
    """Classes to calibrate on: the recipe's, or those that have names, dealt out in a fixed shuffled order."""
    classes: Sequence[int] = recipe.classes
    if not classes and denoiser.classes:
        classes = sorted(int(label) for label in denoiser.classes[0].names)
    if not classes:
        return ()
    order = np.random.Generator(np.random.Philox(recipe.seed)).permutation(recipe.samples)
    return tuple(classes[int(i) % len(classes)] for i in order)


def _request(batch: TrajectoryBatch, denoiser: Denoiser, arrays: Mapping[str, NDArray[Any]]) -> Request:
    rows = np.array(batch.seeds) % FIRST_SEED
    given = {name: values[rows % len(values)] for name, values in arrays.items()}
    return Request(
        class_labels=list(batch.labels) or None, guidance_scale=batch.guidance, seed=list(batch.seeds),
        batch_size=len(batch.seeds), arrays=given,
    )


def _check_arrays(denoiser: Denoiser, arrays: Mapping[str, NDArray[Any]]) -> None:
    for wanted in denoiser.arrays:
        names = [wanted.name, *([f"negative_{wanted.name}"] if wanted.guided else [])]
        for name in names:
            if name not in arrays:
                raise RequestError(
                    f"calibration, input {name!r}", found="no array",
                    wanted=f"{wanted.dtype} of shape (samples, {', '.join(map(str, wanted.shape))})",
                    cause="this denoiser takes conditioning that quantempo cannot make up",
                    remedy="pass --calib-arrays FILE.npz with an array of this name",
                )


def scale_table(collector: StatsCollector, plan: QuantPlan, groups: str, method: str) -> ScaleTable:
    """Scales from statistics, for a partition and a range method."""
    bits: dict[str, int] = {}
    for site in plan.quantized():
        settings = plan.settings(site)
        assert settings is not None
        bits[site.tensor] = settings.activation_bits
        if site.op == "conv":
            bits.setdefault(site.output, 8)
    stats = collector.stats()
    partition = choose_partition(groups, Evidence(stats, bits, samples=collector.samples()))
    return build_table(stats, partition, method, bits)


def trace_scheduler(scheduler: Path, steps: int) -> StepProgram:
    """The step program of a scheduler directory."""
    _compile_extra()
    from quantempo.export.sampler import load_scheduler, trace_program

    return trace_program(load_scheduler(scheduler), steps)


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


def _weights(
    exported: Exported, plan: QuantPlan, recipe: Recipe, collected: Calibration
) -> Mapping[str, QuantizedWeight]:
    from quantempo.export.weights import quantize_weights

    if recipe.weight_method == "gptq":
        return quantize_weights(exported.graph, plan, "mse", collected.grams)
    return quantize_weights(exported.graph, plan, recipe.weight_method)


def _write_quantized(
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


def _write_float(exported: Exported, recipe: Recipe, out: Path, overwrite: bool) -> OpenBundle:
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

