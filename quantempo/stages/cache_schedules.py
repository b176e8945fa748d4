"""The schedule of a policy, with the measurements that it takes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product, takewhile

import numpy as np

from quantempo.calib.cache.comparison import Errors, clearly_lower, clearly_lower_in_decibels
from quantempo.calib.cache.history import correct_by_history
from quantempo.calib.cache.noise_floor import FloorFacts, facts_of
from quantempo.calib.cache.reuse_errors import TINY, ReuseErrors, probed_calls
from quantempo.calib.cache.schedules import (
    FeatureChanges,
    Schedule,
    bounds_of,
    cost_of,
    every,
    improved,
    power_law,
    programmed,
    sum_of_costs,
)
from quantempo.calib.trajectories import TrajectoryBatch
from quantempo.contracts.cache import FULL, reuse_name
from quantempo.contracts.engine import Buffer
from quantempo.contracts.program import StepProgram
from quantempo.runtime.loop import Observation
from quantempo.stages.cache_runs import (
    CacheSettings,
    Float32s,
    VariantBench,
    check_batches,
    guided,
    program_batches,
    taught,
)
from quantempo.stages.closed_loop import fit_history, reference_of
from quantempo.stages.teacher import GIVEN

TRIED_SAMPLES, TRIED_BATCH = 4, 2
"""Trajectories on which reuse is tried, and how many run together: all their features of several calls are kept."""
SEARCH_SAMPLES = 16
"""Trajectories on which whole schedules are compared; half as many where they are long."""
PROBED_CALLS, SEARCH_RUNS, JUDGED = 24, 30, 12
"""Calls whose sensitivity is measured, schedules that moves may try, and those that held-out runs may judge."""
EXPONENTS, DAMPING = (0.25, 0.5, 1.0), (0.5, 1.0)
"""Powers of the squared errors, and of the gains, under which dynamic programming proposes schedules: errors of calls
are neither independent nor all in one direction, so which sum comes closest is measured."""
POWERS = (1.15, 1.3)

"""Mean squared error of the final latents, per sample."""


class ScheduleSearch:
    """Schedules for one program; what several of them need is measured once.

    Args:
        bench: with one reusing variant; it is quantized with the model's own scales where it is not yet.
        settings: of the runs.
        program: uncached.
    """

    def __init__(self, bench: VariantBench, settings: CacheSettings, program: StepProgram) -> None:
        self._bench, self._settings, self._program = bench, settings, program
        self._sensitivities: dict[int, float] | None = None
        self._facts: dict[int, FloorFacts] = {}

    def schedule(self, name: str, interval: int, corrected: bool | None = None) -> Schedule:
        """The schedule of a policy.

        Args:
            name: `every`, `power`, `dps` or `programmed`.
            interval: mean number of calls per refresh.
            corrected: whether `programmed` is for runs with the history correction; default: where it will be fitted.
        """
        calls = len(self._program.calls)
        if interval >= calls or interval == 1 or name == "every":
            return every(calls, interval)
        if name == "power":
            return power_law(calls, interval)
        if name == "dps":
            changes = feature_changes(self._bench, self._settings, self._program, bounds_of(interval)[1])
            return programmed(sum_of_costs(changes.values()), interval)
        return self._programmed(interval, "history" in self._settings.corrections if corrected is None else corrected)

    def floor_facts(self, interval: int) -> FloorFacts:
        """What the noise-floor rule needs to know about schedules with a mean interval."""
        longest = bounds_of(interval)[1]
        if longest not in self._facts:
            self._bench.quantize_plainly()
            self._facts[longest] = floor_facts(self._bench, self._settings, self._program, longest)
        return self._facts[longest]

    def _programmed(self, interval: int, corrected: bool) -> Schedule:
        bench, settings, program = self._bench, self._settings, self._program
        calls, bounds = len(program.calls), (1, bounds_of(interval)[1])
        if self._sensitivities is None:
            self._sensitivities = sensitivities(bench, settings, program)
        facts = self.floor_facts(interval)
        reuse = reuse_errors(bench, settings, program, interval)
        gains, even = reuse.gains(self._sensitivities), every(calls, interval)
        models = [
            reuse.costs(gains**damping, known, exponent)
            for known, exponent, damping in product((False, True), EXPONENTS, DAMPING)
        ]
        runs = WholeRuns(bench, program, search_batches(bench, settings, program), corrected)
        proposals = [power_law(calls, interval, power, at) for power, at in product(POWERS, (0.0, float(calls)))]
        proposals = [p for p in proposals if math.isfinite(cost_of(models[0], p))]
        proposals += [programmed(costs, interval, bounds) for costs in models]
        measured = {
            proposal: float(runs.error(proposal).mean())
            for proposal in dict.fromkeys((even, *filter(facts.legal, proposals)))
        }
        guess, start = closest_costs(models, measured), min(measured, key=measured.__getitem__)

        def cost(refreshes: Schedule) -> float:
            return cost_of(guess, refreshes) if facts.legal(refreshes) else math.inf

        best = improved(start, calls, bounds[1], runs.error, SEARCH_RUNS, cost)
        judge = runs.on(check_batches(bench, settings, program))
        return judged(even, (best, *runs.lowest(JUDGED)), judge.error)


def judged(even: Schedule, candidates: Sequence[Schedule], error: Callable[[Schedule], Errors]) -> Schedule:
    """The first schedule that held-out runs find better than even spacing.

    Mean squared errors decide.  Those of a few samples may be so large that no mean of some dozens tells anything, so
    candidates that came before even spacing in the search get a second chance in decibels.

    Args:
        even: to be beaten, and the result where nothing does.
        candidates: the most promising first.
        error: of a schedule on held-out runs, one value per sample.
    """
    before = tuple(takewhile(lambda found: found != even, candidates))
    for lower in (clearly_lower, clearly_lower_in_decibels):
        for found in before:
            if lower(error(found), error(even)):
                return found
    return even


class WholeRuns:
    """Whole runs of the quantized model under schedules, against uncached ones of the float model.

    Args:
        bench: quantized.
        program: uncached.
        batches: to run.
        corrected: whether each schedule runs with the history correction, fitted on the first batch.
        fitted: where the correction comes from; default: these runs.
    """

    def __init__(
        self, bench: VariantBench, program: StepProgram, batches: Sequence[TrajectoryBatch], corrected: bool,
        fitted: WholeRuns | None = None,
    ) -> None:
        self._bench, self._program, self._corrected, self._fitted = bench, program, corrected, fitted
        self._references = [reference_of(bench, program, batch) for batch in batches]
        self._known: dict[Schedule, Errors] = {}
        self._programs: dict[Schedule, StepProgram] = {}
        self._finals: dict[Schedule, Float32s] = {}

    def on(self, batches: Sequence[TrajectoryBatch]) -> WholeRuns:
        """The same schedules, corrected as here, on other runs."""
        return WholeRuns(self._bench, self._program, batches, self._corrected, self)

    def program(self, refreshes: Schedule) -> StepProgram:
        """The program of a schedule, with its correction."""
        if self._fitted is not None:
            return self._fitted.program(refreshes)
        if refreshes not in self._programs:
            cached = scheduled(self._bench, self._program, refreshes)
            if self._corrected:
                neutral = self._bench.identity_vectors(len(cached.calls))
                history, final = fit_history(self._bench, cached, neutral, refreshes, self._references[0])
                self._finals[refreshes] = final
                sample = self._bench.parts.manifest.denoiser.sample_input
                cached = correct_by_history(cached, history, refreshes, sample)
            self._programs[refreshes] = cached
        return self._programs[refreshes]

    def lowest(self, count: int) -> list[Schedule]:
        """The schedules of lowest error among those that were asked for, the lowest first."""
        return sorted(self._known, key=lambda refreshes: float(self._known[refreshes].mean()))[:count]

    def error(self, refreshes: Schedule) -> Errors:
        """Mean squared error of the final latents, per sample."""
        if refreshes not in self._known:
            program, references = self.program(refreshes), self._references
            loop = self._bench.loop("quantized", self._bench.identity_vectors(len(program.calls)))
            # What a correction was fitted on has been run to its end already.
            known = [self._finals[refreshes]] if refreshes in self._finals else []
            finals = known + [self._bench.run(loop, program, r.batch) for r in references[len(known) :]]
            squares = [(x.astype(np.float64) - r.final) ** 2 for x, r in zip(finals, references, strict=True)]
            self._known[refreshes] = np.concatenate([s.reshape(len(s), -1).mean(axis=1) for s in squares])
        return self._known[refreshes]


def closest_costs(models: Sequence[Errors], measured: Mapping[Schedule, float]) -> Errors:
    """The cost matrix whose costs of schedules go most nearly with what was measured, on logarithmic scales."""
    def agreement(costs: Errors) -> float:
        guessed = np.array([max(cost_of(costs, schedule), TINY) for schedule in measured])
        pair = np.log(np.stack([guessed, np.maximum(list(measured.values()), TINY)]))
        return float(np.corrcoef(pair)[0, 1]) if pair.std(axis=1).min() > 0 else 0.0

    return max(models, key=agreement)


def search_batches(
    bench: VariantBench, settings: CacheSettings, program: StepProgram
) -> tuple[TrajectoryBatch, ...]:
    """The trajectories that schedules are compared on: others than reuse is tried on, where there are enough."""
    whole = program_batches(bench, settings, program)
    seeds, labels = ([x for batch in whole for x in getattr(batch, name)] for name in ("seeds", "labels"))
    samples = SEARCH_SAMPLES if len(program.calls) <= 25 else SEARCH_SAMPLES // 2
    start = TRIED_SAMPLES if len(seeds) >= TRIED_SAMPLES + samples else 0
    picked = slice(start, start + samples)
    return (replace(whole[0], seeds=tuple(seeds[picked]), labels=tuple(labels[picked])),)


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
            errors.observe(seen.index, refresh, guided(seen, made, settings.guidance), predictions, fed, wanted)
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


def feature_changes(
    bench: VariantBench, settings: CacheSettings, program: StepProgram, longest: int
) -> dict[str, FeatureChanges]:
    """How each cached feature of the float model moves along a few of its own trajectories.

    Args:
        bench: with the cuts.
        settings: of the runs.
        program: uncached.
        longest: the largest group that is looked at.
    """
    changes = {name: FeatureChanges(len(program.calls), longest) for name in bench.set.features}
    loop = bench.loop("float", bench.identity_vectors(len(program.calls)))

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        for name, each in changes.items():
            each.observe(seen.index, outputs[name].array)

    for batch in few_batches(bench, settings, program, TRIED_SAMPLES, TRIED_BATCH):
        bench.run(loop, program, batch, watch)
    return changes


def floor_facts(bench: VariantBench, settings: CacheSettings, program: StepProgram, longest: int) -> FloorFacts:
    """How far features move and how noisy quantization makes them, on a few quantized runs without reuse.

    Args:
        bench: quantized.
        settings: of the runs.
        program: uncached.
        longest: the largest group that is looked at.
    """
    names, calls = tuple(bench.set.features), len(program.calls)
    changes = {name: FeatureChanges(calls, longest) for name in names}
    error, power = np.zeros((len(names), calls)), np.zeros((len(names), calls))

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        for row, name in enumerate(names):
            wanted = taught(outputs, name)
            changes[name].observe(seen.index, wanted)
            error[row, seen.index] += float(np.sum((outputs[name].array.astype(np.float64) - wanted) ** 2))
            power[row, seen.index] += float(np.sum(wanted.astype(np.float64) ** 2))

    loop = bench.loop("taught", bench.identity_vectors(calls))
    for batch in few_batches(bench, settings, program, TRIED_SAMPLES, TRIED_BATCH):
        bench.run(loop, program, batch, watch)
    return facts_of(changes.values(), error / np.maximum(power, TINY))
