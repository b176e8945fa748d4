"""The schedule of a policy, with the measurements on the float model that it takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product

import numpy as np

from quantempo.calib.cache.reuse_errors import ReuseErrors, probed_calls
from quantempo.calib.cache.schedules import (
    Schedule,
    bounds_of,
    check_schedule,
    every,
    improved,
    power_law,
    programmed,
)
from quantempo.calib.trajectories import TrajectoryBatch
from quantempo.contracts.cache import FULL, reuse_name
from quantempo.contracts.engine import Buffer
from quantempo.contracts.program import StepProgram
from quantempo.runtime.loop import Observation
from quantempo.stages.cache_runs import CacheSettings, Float32s, VariantBench, guided, program_batches
from quantempo.stages.teacher import GIVEN

TRIED_SAMPLES, TRIED_BATCH = 4, 2
"""Trajectories on which reuse is tried, and how many run together: all their features of several calls are kept."""
SEARCH_SAMPLES = 8
"""Trajectories on which whole schedules are compared."""
PROBED_CALLS, SEARCH_RUNS = 24, 36
EXPONENTS, DAMPING = (0.25, 0.5, 1.0), (0.5, 1.0)
"""Powers of the squared errors, and of the gains, under which dynamic programming proposes schedules: errors of calls
are neither independent nor all in one direction, so which sum comes closest is measured."""


class ScheduleSearch:
    """Schedules for one program; what several of them need is measured once.

    Args:
        bench: with one reusing variant.
        settings: of the runs.
        program: uncached.
    """

    def __init__(self, bench: VariantBench, settings: CacheSettings, program: StepProgram) -> None:
        self._bench, self._settings, self._program = bench, settings, program
        self._sensitivities: dict[int, float] | None = None
        self._error: Callable[[Schedule], float] | None = None

    def schedule(self, name: str, interval: int) -> Schedule:
        """The schedule of a policy.

        Args:
            name: `every`, `power` or `programmed`.
            interval: mean number of calls per refresh.
        """
        calls = len(self._program.calls)
        if interval >= calls or name == "every":
            return every(calls, interval)
        return power_law(calls, interval) if name == "power" else self._programmed(interval)

    def _programmed(self, interval: int) -> Schedule:
        bench, settings, program = self._bench, self._settings, self._program
        calls, bounds = len(program.calls), (1, bounds_of(interval)[1])
        if self._sensitivities is None or self._error is None:
            self._sensitivities = sensitivities(bench, settings, program)
            self._error = final_error(bench, settings, program)
        errors = reuse_errors(bench, settings, program, interval)
        gains = errors.gains(self._sensitivities)
        proposals = [every(calls, interval)]
        for corrected in (False, True):
            for exponent, damping in product(EXPONENTS, DAMPING):
                proposals.append(programmed(errors.costs(gains**damping, corrected, exponent), interval, bounds))
        best = min(dict.fromkeys(proposals), key=self._error)
        return check_schedule(improved(best, calls, bounds[1], self._error, SEARCH_RUNS), calls)


def final_error(
    bench: VariantBench, settings: CacheSettings, program: StepProgram
) -> Callable[[Schedule], float]:
    """A function from schedules to the mean squared error of the final latents of the float model under them."""
    samples = SEARCH_SAMPLES if len(program.calls) <= 25 else SEARCH_SAMPLES // 2
    (few,) = few_batches(bench, settings, program, samples, samples)
    loop = bench.loop("float", bench.identity_vectors(len(program.calls)))
    wanted = bench.run(loop, program, few).astype(np.float64)
    known: dict[Schedule, float] = {}

    def error(refreshes: Schedule) -> float:
        if refreshes not in known:
            got = bench.run(loop, scheduled(bench, program, refreshes), few)
            known[refreshes] = float(np.mean((got - wanted) ** 2))
        return known[refreshes]

    return error


def scheduled(bench: VariantBench, program: StepProgram, refreshes: Schedule) -> StepProgram:
    """The program with `reuse.0` at all calls that do not refresh, vectors from row 0 on."""
    names = bench.set.vectors()[reuse_name(0)]
    calls = [
        replace(call, graph=FULL) if index in refreshes
        else replace(call, graph=reuse_name(0), vectors=dict.fromkeys(names, index))
        for index, call in enumerate(program.calls)
    ]  # fmt: skip
    return replace(program, calls=tuple(calls))


def reuse_errors(bench: VariantBench, settings: CacheSettings, program: StepProgram, interval: int) -> ReuseErrors:
    """Try reuse at every call of a few float runs, from each of the calls before that may serve it."""
    errors = ReuseErrors(len(program.calls), bounds_of(interval)[1], interval)
    denoiser, reuse = bench.parts.manifest.denoiser, bench.engine("float", reuse_name(0))
    reads = bench.set.variants[reuse_name(0)].reads
    neutral = {name: row[0] for name, row in bench.identity_vectors(1).items() if name in reuse.inputs}
    loop = bench.loop("shown", bench.identity_vectors(len(program.calls)))
    features: deque[tuple[int, dict[str, Float32s]]] = deque(maxlen=errors.longest - 1)
    predictions: list[Float32s] = []

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        if seen.index == 0:
            features.clear()
            predictions.clear()
        given = {n: outputs[GIVEN + n].array for n in reuse.inputs if GIVEN + n in outputs}
        wanted = guided(seen, outputs[denoiser.prediction].array, settings.guidance)
        fed = given[denoiser.sample_input][: len(wanted)]
        for refresh, kept in features:
            made = reuse.run({**given, **kept, **neutral})[denoiser.prediction]
            errors.observe(
                seen.index, refresh, guided(seen, made, settings.guidance), predictions[refresh],
                predictions[errors.before(refresh)], fed, wanted,
            )
        features.append((seen.index, {name: outputs[name].array.copy() for name in reads}))
        predictions.append(wanted)

    for batch in few_batches(bench, settings, program, TRIED_SAMPLES, TRIED_BATCH):
        bench.run(loop, program, batch, watch)
    return errors


def few_batches(
    bench: VariantBench, settings: CacheSettings, program: StepProgram, samples: int, size: int
) -> list[TrajectoryBatch]:
    """The first fitting trajectories, in small batches."""
    whole = program_batches(bench, settings, program)[0]
    return [
        replace(whole, seeds=whole.seeds[start : start + size], labels=whole.labels[start : start + size])
        for start in range(0, min(samples, len(whole.seeds)), size)
    ]


def sensitivities(bench: VariantBench, settings: CacheSettings, program: StepProgram) -> dict[int, float]:
    """Root mean square error of the final latents when one call alone reuses the features of the call before.

    Measured on the float model, one short run per call, at no more than `PROBED_CALLS` calls.
    """
    (few,) = few_batches(bench, settings, program, TRIED_SAMPLES, TRIED_SAMPLES)
    calls = len(program.calls)
    loop = bench.loop("float", bench.identity_vectors(calls))
    wanted = bench.run(loop, program, few).astype(np.float64)
    found = {}
    for index in probed_calls(calls, PROBED_CALLS):
        others = tuple(i for i in range(calls) if i != index)
        got = bench.run(loop, scheduled(bench, program, others), few)
        found[index] = float(np.sqrt(np.mean((got - wanted) ** 2)))
    return found
