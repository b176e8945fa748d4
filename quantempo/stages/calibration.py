"""Calibration: the trajectories that are run, and what they teach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.collect import StatsCollector
from quantempo.calib.gram import GramCollector
from quantempo.calib.trajectories import (
    FIRST_SEED,
    CalibrationSet,
    Observer,
    ProgramChoice,
    TrajectoryBatch,
    plan_batches,
    run_calibration,
)
from quantempo.contracts.codec import canonical_json, digest, to_data
from quantempo.contracts.engine import Buffer, EngineOptions
from quantempo.contracts.manifest import Denoiser
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram
from quantempo.engines.registry import open_engine
from quantempo.progress import Advance
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.loop import Observation
from quantempo.runtime.request import Request
from quantempo.runtime.session import Session
from quantempo.stages.conditioning import arrays_digest, check_arrays, deal_labels
from quantempo.stages.store import StageResult, StageStore
from quantempo.stages.versions import code, libraries

ENGINE = "ort"
STATISTICS_FILE, GRAMS = "statistics.safetensors", "grams.safetensors"


@dataclass(frozen=True)
class Taps:
    """What calibration watches.

    Args:
        tensors: those that need scales.
        centred: those of them whose channels need ranges of their own.
        products: inputs of matrix products, whose second moments weight rounding needs.
    """

    tensors: tuple[str, ...]
    centred: tuple[str, ...] = ()
    products: tuple[str, ...] = ()

    @staticmethod
    def of(*plans: QuantPlan) -> Taps:
        """What is needed for any of several plans."""
        return Taps(
            tuple(sorted({name for plan in plans for name in plan.scaled_tensors()})),
            tuple(sorted({name for plan in plans for name in plan.centred})),
            tuple(sorted({s.tensor for plan in plans for s in plan.quantized() if s.op == "matmul"})),
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the trajectories taught: statistics per (tensor, timestep), and Gram matrices per tensor."""

    statistics: StatsCollector
    grams: GramCollector


def calibrate(
    reference: OpenBundle,
    plan: QuantPlan | Taps,
    recipe: Recipe,
    *,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    programs: Mapping[ProgramChoice, StepProgram] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Run the recipe's trajectories on a float bundle, with taps on everything that needs scales.

    Args:
        reference: the float bundle.
        plan: the plan, or what to watch.
        recipe: the calibration set.
        arrays: conditioning by input name.
        programs: the ways to sample; `None` for `calibration_programs` of the bundle's.
        checkpoint: file to which the state goes after each batch, and from which an interrupted run goes on.
        progress: told the number of batches done and in all.

    Raises:
        NonFiniteActivation: a tapped tensor held NaN or infinity.
        CalibrationError: some samples failed.
        RequestError: the calibration set does not fit the model.
    """
    denoiser, taps = reference.manifest.denoiser, plan if isinstance(plan, Taps) else Taps.of(plan)
    known = calibration_programs(recipe, reference.program) if programs is None else programs
    batches = trajectory_batches(denoiser, recipe, known, arrays or {})
    options = EngineOptions(threads=recipe.threads, extra_outputs=taps.tensors)
    grams = GramCollector(taps.products if recipe.weight_method == "gptq" else ())
    with Session(reference, _open_with(ENGINE), options) as session:

        def run_batch(batch: TrajectoryBatch, observe: Observer) -> None:
            def observer(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
                values = {name: outputs[name].array for name in taps.tensors}
                observe(seen.call.key, values)
                grams.observe(seen.call.key, values)

            session.sample(
                _request(batch, denoiser, arrays or {}), known[batch.program], output_type="latent",
                observer=observer,
            )

        collector = StatsCollector("full", taps.tensors, taps.centred)
        statistics = run_calibration(batches, run_batch, collector, checkpoint, progress, grams)
    return Calibration(statistics, grams)


def calibration_stage(
    store: StageStore, bundle: OpenBundle, taps: Taps, recipe: Recipe, arrays: Mapping[str, NDArray[Any]],
    programs: Mapping[ProgramChoice, StepProgram],
) -> tuple[Calibration, StageResult]:
    """`calibrate`, or its earlier result; an interrupted run goes on after its last whole batch."""
    denoiser = bundle.manifest.denoiser
    batches = trajectory_batches(denoiser, recipe, programs, arrays)
    products = taps.products if recipe.weight_method == "gptq" else ()

    def make(folder: Path, advance: Advance) -> None:
        checkpoint = folder / "checkpoint"
        found = calibrate(
            bundle, taps, recipe, arrays=arrays, programs=programs, checkpoint=checkpoint, progress=advance
        )
        found.grams.save(folder / GRAMS)
        found.statistics.save(folder / STATISTICS_FILE)
        for path in folder.glob("checkpoint*"):
            path.unlink()

    result = store.run("calibrate", {
        "denoiser": bundle.manifest.provenance["float_graph"], "inputs of the denoiser": to_data(denoiser),
        "sampled labels": [batch.labels for batch in batches], "guidance": recipe.guidance, "batch": recipe.batch,
        "seeds": [batch.seeds for batch in batches], "arrays": arrays_digest(arrays),
        "step programs": {choice.id: digest(canonical_json(program)) for choice, program in programs.items()},
        "tapped tensors": taps.tensors, "centred tensors": taps.centred, "weight rounding": products,
        "threads": recipe.threads, "libraries": libraries("numpy", "onnxruntime"),
        "code": code("quantempo.calib", "quantempo.runtime", "quantempo.contracts", "quantempo.engines.ort",
                     "quantempo.engines.host", "quantempo.stages.calibration"),
    }, make, resumes=True)  # fmt: skip
    grams = GramCollector(products)
    grams.restore(result.path(GRAMS))
    return Calibration(StatsCollector.load(result.path(STATISTICS_FILE)), grams), result


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
        labels=deal_labels(denoiser, recipe), seeds=tuple(range(first, first + recipe.samples)),
    )
    check_arrays(denoiser, arrays)
    return plan_batches(declared, classes=denoiser.classes[0].count if denoiser.classes else None)


def _open_with(backend: str) -> Any:
    return lambda path, options: open_engine(backend, path, options)


def calibration_programs(
    recipe: Recipe, own: Callable[[int], StepProgram]
) -> dict[ProgramChoice, StepProgram]:
    """The ways to sample that a recipe asks for.

    Args:
        recipe: step counts and further schedulers.
        own: the program of the model's own scheduler for a number of steps.
    """
    from quantempo.stages.model import trace_scheduler

    programs = {ProgramChoice(steps): own(steps) for steps in recipe.steps}
    for index, folder in enumerate(recipe.schedulers):
        for steps in recipe.steps:
            program = trace_scheduler(Path(folder), steps)
            choice = ProgramChoice(steps, program.scheduler)
            if choice in programs:  # two folders may hold one class with different settings
                choice = ProgramChoice(steps, f"{program.scheduler}#{index + 1}")
            programs[choice] = program
    return programs


def _request(batch: TrajectoryBatch, denoiser: Denoiser, arrays: Mapping[str, NDArray[Any]]) -> Request:
    rows = np.array(batch.seeds) % FIRST_SEED
    given = {name: values[rows % len(values)] for name, values in arrays.items()}
    return Request(
        class_labels=list(batch.labels) or None, guidance_scale=batch.guidance, seed=list(batch.seeds),
        batch_size=len(batch.seeds), arrays=given,
    )
