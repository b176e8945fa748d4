"""A model's float parts: step programs, denoiser graph, decoder graph; and the plan of what to quantize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from quantempo.calib.trajectories import ProgramChoice
from quantempo.contracts.codec import from_data, parse_json
from quantempo.contracts.manifest import Decoder, Denoiser
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram
from quantempo.engines.registry import open_engine
from quantempo.errors import MissingExtra, PlanError
from quantempo.progress import Progress
from quantempo.recipe import Recipe
from quantempo.stages.calibration import ENGINE, trajectory_batches

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph


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


def require_compile_extra() -> None:
    """Ask for the extra in our words before some import asks for a package in its own."""
    import importlib.util

    for package in ("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "scipy", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("compile", package=package, extra="compile,cpu")


def export_model(
    model: Path,
    scheduler: Path | None,
    recipe: Recipe,
    work: Path,
    progress: Progress,
    arrays: Mapping[str, NDArray[Any]],
) -> Exported:
    require_compile_extra()
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


def make_plan(exported: Exported, recipe: Recipe, plan_file: Path | None) -> QuantPlan:
    from quantempo.export.sites import PlanOptions, check_plan, default_plan

    if plan_file is None:
        options = PlanOptions(
            keep=(*recipe.keep, *recipe.exclude), activation_bits=recipe.activation_bits, centre=recipe.centre
        )
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


def trace_scheduler(scheduler: Path, steps: int) -> StepProgram:
    """The step program of a scheduler directory."""
    require_compile_extra()
    from quantempo.export.sampler import load_scheduler, trace_program

    return trace_program(load_scheduler(scheduler), steps)
