"""Calibration: the trajectories that are run, and what they teach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.collect import StatsCollector
from quantempo.calib.gram import GramCollector
from quantempo.calib.partition import Evidence, choose_partition
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
from quantempo.contracts.engine import Buffer, EngineOptions
from quantempo.contracts.manifest import Denoiser
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram
from quantempo.contracts.table import ScaleTable
from quantempo.engines.registry import open_engine
from quantempo.errors import RequestError
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.loop import Observation
from quantempo.runtime.request import Request
from quantempo.runtime.session import Session

ENGINE = "ort"


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the trajectories taught: statistics per (tensor, timestep), and Gram matrices per tensor."""

    statistics: StatsCollector
    grams: GramCollector


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
                    grams.observe(seen.call.key, taps)

            session.sample(
                _request(batch, denoiser, arrays or {}), programs[batch.program], output_type="latent",
                observer=observer,
            )

        statistics = run_calibration(batches, run_batch, StatsCollector("full", tensors, plan.centred), progress=progress)
    return Calibration(statistics, grams)


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
    from quantempo.stages.model import trace_scheduler

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
    return build_table(stats, partition, method, bits, centred=plan.centred)
