"""Calibration: the trajectories that are run, and what they teach."""

from __future__ import annotations

import gc
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.collect import StatsCollector
from quantempo.calib.gram import GramCollector
from quantempo.calib.selection import Selection, Visit, needs_features, select
from quantempo.calib.trajectories import (
    FIRST_SEED,
    CalibrationSet,
    Observer,
    ProgramChoice,
    RunBatch,
    TrajectoryBatch,
    companion_file,
    plan_batches,
    run_calibration,
)
from quantempo.contracts.codec import canonical_json, digest, to_data
from quantempo.contracts.engine import Buffer, Engine, EngineOptions
from quantempo.contracts.manifest import Denoiser
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram
from quantempo.engines.registry import open_engine
from quantempo.progress import Advance, silent
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.guidance import CONDITIONAL
from quantempo.runtime.loop import Observation
from quantempo.runtime.request import Request
from quantempo.runtime.session import Session
from quantempo.stages.conditioning import arrays_digest, check_arrays, deal_labels
from quantempo.stages.programs import calibration_programs
from quantempo.stages.store import StageResult, StageStore
from quantempo.stages.versions import code, libraries

ENGINE = "ort"
CalibrationLoop = Callable[[Callable[..., NDArray[Any]], TrajectoryBatch], None]
"""The caller's own loop: called with `denoise` and a batch (seeds, labels, guidance, program).  It calls
`denoise(sample, timestep, **conditioning)` for each evaluation, with arrays by graph input, and gets the prediction.
An attribute `cache_key` (a string) names its behaviour; without one its calibration is never reused."""
CallObserver = Callable[[Observation, Mapping[str, Buffer]], None]
LARGE_BYTES = 1_000_000_000
MAPPED = {"prepacking": "off"}
"""Settings with which the engine reads weights where they lie in their file, and makes no copy in memory; for weights
above `LARGE_BYTES` worth a few per cent of time."""
STATISTICS_FILE, GRAMS = "statistics.safetensors", "grams.safetensors"


@dataclass(frozen=True)
class Taps:
    """What calibration watches.

    Args:
        tensors: those that need scales.
        centred: those of them whose channels need ranges of their own.
        products: inputs of matrix products, whose second moments weight rounding needs.
        ranges: tensors whose largest magnitude attention is quantized with; their scale is one for all timesteps.
    """

    tensors: tuple[str, ...]
    centred: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    ranges: tuple[str, ...] = ()

    @property
    def observed(self) -> tuple[str, ...]:
        """All tensors that a call has to deliver, sorted."""
        return tuple(sorted({*self.tensors, *self.ranges}))

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
    loop: CalibrationLoop | None = None,
    batches: Sequence[TrajectoryBatch] | None = None,
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
        loop: the caller's own sampling loop, instead of step programs; see `CalibrationLoop`.
        batches: what to run; `None` for `trajectory_batches`.
        checkpoint: file to which the state goes after each batch, and from which an interrupted run goes on.
        progress: told the work done and in all: calls, where a batch with fewer counts as much as one with most; with
            a loop of the caller's, batches.

    Raises:
        NonFiniteActivation: a tapped tensor held NaN or infinity.
        CalibrationError: some samples failed.
        RequestError: the calibration set does not fit the model.
    """
    denoiser, taps = reference.manifest.denoiser, plan if isinstance(plan, Taps) else Taps.of(plan)
    known = calibration_programs(recipe, reference.program) if programs is None else programs
    batches = trajectory_batches(denoiser, recipe, known, arrays or {}) if batches is None else batches
    inner = tuple(name for name in taps.observed if name not in {array.name for array in denoiser.arrays})
    options = EngineOptions(threads=recipe.threads, extra_outputs=inner, settings=large_weights(reference))
    grams = GramCollector(taps.products if recipe.weight_method == "gptq" else ())
    collector = StatsCollector("full", taps.observed, taps.centred)
    if loop is not None:
        with _looped(reference, options, taps, grams, loop) as run_loop:
            return Calibration(run_calibration(batches, run_loop, collector, checkpoint, progress, grams), grams)
    with Session(reference, open_with_default, options) as session:

        def sample(batch: TrajectoryBatch, observer: CallObserver) -> None:
            request = sample_request(batch, denoiser, arrays or {})
            session.sample(request, known[batch.program], output_type="latent", observer=observer)

        chosen = _selection(recipe, batches, known, taps, sample)

        told = _Calls(progress or silent, max(len(known[batch.program].calls) for batch in batches))

        def run_batch(batch: TrajectoryBatch, observe: Observer) -> None:
            given = sample_request(batch, denoiser, arrays or {}).arrays

            def observer(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
                told.call(seen.index, len(known[batch.program].calls))
                if (batch.index, seen.index) in chosen:
                    values = {name: outputs[name].array for name in inner}
                    values |= {name: fed_rows(name, seen, given) for name in taps.observed if name not in values}
                    observe(seen.call.key, values)
                    grams.observe(seen.call.key, values)

            sample(batch, observer)

        statistics = run_calibration(batches, run_batch, collector, checkpoint, told.batch, grams)
    return Calibration(statistics, grams)


class _Calls:
    """Tells of calls within a batch, so that the time left is known before the first batch ends."""

    def __init__(self, advance: Advance, most: int) -> None:
        self._advance, self._most = advance, most
        self._done, self._batches = 0, 1

    def batch(self, done: int, batches: int) -> None:
        """Batches done and in all."""
        self._done, self._batches = done, batches
        self._advance(done * self._most, batches * self._most)

    def call(self, index: int, calls: int) -> None:
        """A call of the next batch begins to be looked at."""
        within = self._most * index // calls
        self._advance(self._done * self._most + within, self._batches * self._most)


def large_weights(bundle: OpenBundle) -> Mapping[str, str]:
    """Settings that keep large weights in their file, where packed copies would take as much memory again."""
    weights = sum(bundle.manifest.files[name].size for g in bundle.manifest.graphs.values() for name in g.data)
    return MAPPED if weights > LARGE_BYTES else {}


def fed_rows(name: str, seen: Observation, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """What a conditioning input was fed in a call, for sites that read it directly; no engine gives inputs back.

    Args:
        name: the input.
        seen: the call, with sample and branch of each row.
        arrays: conditioning of the batch, a row per sample.
    """
    return np.stack([
        arrays[name if branch == CONDITIONAL else f"negative_{name}"][sample]
        for sample, branch in zip(seen.samples, seen.branches, strict=True)
    ])  # fmt: skip


@contextmanager
def _looped(
    reference: OpenBundle, options: EngineOptions, taps: Taps, grams: GramCollector, loop: CalibrationLoop
) -> Iterator[RunBatch]:
    """Batches run by the caller's loop."""
    entry = reference.manifest.graphs["full.float-f32"]
    denoiser = reference.manifest.denoiser
    engine = open_engine(ENGINE, reference.path(entry.file), options)

    def run_batch(batch: TrajectoryBatch, observe: Observer) -> None:
        def denoise(sample: NDArray[Any], timestep: float, **conditioning: NDArray[Any]) -> NDArray[Any]:
            times = np.full(len(sample), timestep, np.float32)
            outputs = engine.run({denoiser.sample_input: sample, denoiser.timestep_input: times, **conditioning})
            values = {name: outputs[name] if name in outputs else conditioning[name] for name in taps.observed}
            observe(float(timestep), values)
            grams.observe(float(timestep), values)
            return outputs[denoiser.prediction]

        loop(denoise, batch)

    try:
        yield run_batch
    finally:
        engine.close()


def loop_key(loop: CalibrationLoop | None) -> str:
    """What stands for a loop in a stage's key: code cannot be told apart by its text alone."""
    return "" if loop is None else str(getattr(loop, "cache_key", None) or secrets.token_hex(16))


def _selection(
    recipe: Recipe, batches: Sequence[TrajectoryBatch], programs: Mapping[ProgramChoice, StepProgram], taps: Taps,
    sample: Callable[[TrajectoryBatch, CallObserver], object],
) -> Selection:
    """The calls to look at; where the method asks for it, the first batch runs once more to describe them."""
    visits = [
        Visit(batch.index, index, call.key)
        for batch in batches
        for index, call in enumerate(programs[batch.program].calls)
    ]
    features = call_features(batches[0], taps, sample) if needs_features(recipe.selection) else {}
    return select(recipe.selection, visits, seed=recipe.seed, features=features)


def call_features(
    batch: TrajectoryBatch, taps: Taps, sample: Callable[[TrajectoryBatch, CallObserver], object]
) -> dict[float, NDArray[Any]]:
    """What describes the calls at each group key: a tensor from the middle of the network, from one run of a batch."""
    features: dict[float, NDArray[Any]] = {}
    deep = [name for name in taps.tensors if "mid_block" in name] or list(taps.products) or list(taps.tensors)

    def describe(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        inner = [name for name in deep if name in outputs]
        # The mean over the rows, guided ones too: what all samples of a timestep have in common.
        features[seen.call.key] = outputs[inner[len(inner) // 2]].array.mean(axis=0)

    sample(batch, describe)
    return features


def calibration_stage(
    store: StageStore, bundle: OpenBundle, taps: Taps, recipe: Recipe, arrays: Mapping[str, NDArray[Any]],
    programs: Mapping[ProgramChoice, StepProgram], loop: CalibrationLoop | None = None,
    batches: Sequence[TrajectoryBatch] | None = None,
) -> tuple[Calibration, StageResult]:
    """`calibrate`, or its earlier result; an interrupted run goes on after its last whole batch."""
    denoiser = bundle.manifest.denoiser
    batches = trajectory_batches(denoiser, recipe, programs, arrays) if batches is None else batches
    products = taps.products if recipe.weight_method == "gptq" else ()

    def make(folder: Path, advance: Advance) -> None:
        checkpoint = folder / "checkpoint"
        grams = companion_file(checkpoint, len(batches))
        if (folder / GRAMS).exists():  # killed after the renaming below
            (folder / GRAMS).replace(grams)
        found = calibrate(
            bundle, taps, recipe, arrays=arrays, programs=programs, loop=loop, batches=batches, checkpoint=checkpoint,
            progress=advance,
        )
        found.statistics.save(folder / STATISTICS_FILE)
        # The last checkpoint holds the same matrices; they may be as large as half a model.
        grams.replace(folder / GRAMS)
        for path in folder.glob("checkpoint*"):
            path.unlink()
        # Engine and matrices are as large as the model; what comes next reads them from files.
        del found
        gc.collect()

    result = store.run("calibrate", {
        "denoiser": bundle.manifest.provenance["float_graph"], "inputs of the denoiser": to_data(denoiser),
        "sampled labels": [batch.labels for batch in batches], "guidance": recipe.guidance, "batch": recipe.batch,
        "seeds": [batch.seeds for batch in batches], "arrays": arrays_digest(arrays),
        "step programs": {choice.id: digest(canonical_json(program)) for choice, program in programs.items()},
        "tapped tensors": taps.observed, "centred tensors": taps.centred, "weight rounding": products,
        "loop": loop_key(loop), "selection": recipe.selection,
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
    programs = tuple(programs)
    # Few samples run in smaller batches, so that each guidance scale and program gets one.
    fair = max(1, recipe.samples // max(1, len(recipe.guidance), len(programs)))
    declared = CalibrationSet(
        samples=recipe.samples, batch=min(recipe.batch, denoiser.max_batch or recipe.batch, fair),
        guidance=recipe.guidance, programs=programs,
        labels=deal_labels(denoiser, recipe), seeds=tuple(range(first, first + recipe.samples)),
    )
    check_arrays(denoiser, arrays, recipe.guidance)
    return plan_batches(declared, classes=denoiser.classes[0].count if denoiser.classes else None)


def open_with_default(path: Path, options: EngineOptions) -> Engine:
    """Open a graph with the engine that calibrates."""
    return open_engine(ENGINE, path, options)


def sample_request(batch: TrajectoryBatch, denoiser: Denoiser, arrays: Mapping[str, NDArray[Any]]) -> Request:
    """What a session is asked for a batch; rows of arrays go with seeds."""
    rows = np.array(batch.seeds) % FIRST_SEED
    given = {name: values[rows % len(values)] for name, values in arrays.items()}
    return Request(
        class_labels=list(batch.labels) or None, guidance_scale=batch.guidance, seed=list(batch.seeds),
        batch_size=len(batch.seeds), arrays=given,
    )
