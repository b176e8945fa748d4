"""Corrections of a cached, quantized run, fitted one after another, each with all earlier ones active.

A correction that lowers the error of its own tensor may still harm the end of a run: least squares shrink what they
cannot know, call after call.  So each one is kept only where the final latents of other runs come closer to the float
model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.corrections import (
    Correction,
    CorrectionFit,
    VarianceFit,
    estimate_affine,
    estimate_offset,
    estimate_prediction,
)
from quantempo.calib.cache.history import HistoryCorrection, HistoryFit, HistoryReplay, correct_by_history, report_of
from quantempo.calib.cache.noise_floor import NoiseFloor, judge
from quantempo.calib.cache.program_rows import LATENTS_VECTORS, PREDICTION_VECTORS, correct_latents, correct_prediction
from quantempo.calib.cache.schedules import FeatureChanges, Schedule
from quantempo.contracts.cache import correction_inputs
from quantempo.contracts.engine import Buffer
from quantempo.contracts.program import StepProgram
from quantempo.runtime.loop import Observation
from quantempo.stages.cache_runs import (
    CacheSettings,
    Float32s,
    VariantBench,
    check_batches,
    fitting_runs,
    guided,
    program_batches,
    taught,
)
from quantempo.stages.teacher import GIVEN


@dataclass(frozen=True, eq=False)
class StepsFit:
    """The fit for one number of steps.

    Args:
        refreshes: calls that refresh.
        program: with variants, vector rows from 0 on, and corrections.
        vectors: (calls, channels) by name.
        found: the corrections, for the report.
        floor: what quantization noise says about the schedule, by cached feature.
        history: the linear prediction from earlier refreshes.
        errors: of the final latents on held-out runs, uncorrected and with each candidate that was tried.
    """

    refreshes: Schedule
    program: StepProgram
    vectors: Mapping[str, Float32s]
    found: Mapping[str, Correction] = field(default_factory=dict)
    floor: Mapping[str, NoiseFloor] = field(default_factory=dict)
    history: HistoryCorrection | None = None
    errors: tuple[tuple[str, float], ...] = ()

    def report(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "refreshes": list(self.refreshes),
            "final_latent_mse": [{"with": name, "value": value} for name, value in self.errors],
            "corrections": {
                name: {"kept": c.kept, "held_out_before": c.before.tolist(), "held_out_after": c.after.tolist()}
                for name, c in self.found.items()
            },
            "history": None if self.history is None else report_of(self.history),
            "noise_floor": {name: asdict(floor) for name, floor in self.floor.items()},
        }


class _Check:
    """Judges programs by the final latents of held-out runs."""

    def __init__(self, bench: VariantBench, settings: CacheSettings, plain: StepProgram) -> None:
        self._bench, self._batches = bench, check_batches(bench, settings, plain)
        loop = bench.loop("float", bench.identity_vectors(len(plain.calls)))
        self._wanted = [bench.run(loop, plain, batch) for batch in self._batches]
        self.errors: list[tuple[str, float]] = []

    def error(self, name: str, program: StepProgram, vectors: Mapping[str, Float32s]) -> float:
        """Mean squared error to the uncached float model's final latents."""
        loop = self._bench.loop("quantized", vectors)
        squares = [
            (self._bench.run(loop, program, batch).astype(np.float64) - wanted) ** 2
            for batch, wanted in zip(self._batches, self._wanted, strict=True)
        ]
        found = float(np.concatenate(squares).mean())
        self.errors.append((name, found))
        return found


def fit_corrections(
    bench: VariantBench, settings: CacheSettings, plain: StepProgram, cached: StepProgram, refreshes: Schedule,
    changes: Mapping[str, FeatureChanges],
) -> StepsFit:
    """Fit one correction after another on the quantized, cached trajectory.

    Args:
        bench: quantized.
        settings: which corrections.
        plain: the uncached program.
        cached: with the variants of the schedule, vectors from row 0 on.
        refreshes: the schedule.
        changes: of the float features, by name.
    """
    vectors: dict[str, Float32s] = dict(bench.identity_vectors(len(cached.calls)))
    check = _Check(bench, settings, plain)
    best = check.error("none", cached, vectors)
    fit = StepsFit(refreshes, cached, vectors)
    for name in ("feature", "history", "prediction", "latents"):
        if name not in settings.corrections:
            continue
        candidate = _CANDIDATES[name](bench, settings, plain, fit, changes)
        error = check.error(name, candidate.program, candidate.vectors)
        if error < best:
            fit, best = candidate, error
        elif name == "feature":
            fit = replace(fit, floor=candidate.floor)
    return replace(fit, errors=tuple(check.errors))


def _with_feature(
    bench: VariantBench, settings: CacheSettings, plain: StepProgram, fit: StepsFit,
    changes: Mapping[str, FeatureChanges],
) -> StepsFit:
    fits, noise = _feature_fits(bench, settings, fit.program, fit.vectors)
    floor = {name: judge(fit.refreshes, changes[name], noise[name].tolist()) for name in changes}
    found, vectors = dict(fit.found), dict(fit.vectors)
    for name, each in fits.items():
        made = found[name] = each.fit({"affine": estimate_affine, "offset": estimate_offset})
        vectors.update(zip(correction_inputs(name, "feature"), (made.gain, made.bias), strict=True))
    return replace(fit, vectors=vectors, found=found, floor=floor)


def _with_history(
    bench: VariantBench, settings: CacheSettings, plain: StepProgram, fit: StepsFit,
    changes: Mapping[str, FeatureChanges],
) -> StepsFit:
    history = _history_fit(bench, settings, fit.program, fit.vectors, fit.refreshes)
    sample = bench.parts.manifest.denoiser.sample_input
    return replace(fit, program=correct_by_history(fit.program, history, fit.refreshes, sample), history=history)


def _with_prediction(
    bench: VariantBench, settings: CacheSettings, plain: StepProgram, fit: StepsFit,
    changes: Mapping[str, FeatureChanges],
) -> StepsFit:
    replay = None if fit.history is None else HistoryReplay(fit.history, fit.refreshes)
    made = _prediction_fit(bench, settings, fit.program, fit.vectors, replay).fit({"prediction": estimate_prediction})
    return replace(
        fit, program=correct_prediction(fit.program, made), found={**fit.found, "prediction": made},
        vectors={**fit.vectors, **dict(zip(PREDICTION_VECTORS, (made.gain, made.bias), strict=True))},
    )


def _with_latents(
    bench: VariantBench, settings: CacheSettings, plain: StepProgram, fit: StepsFit,
    changes: Mapping[str, FeatureChanges],
) -> StepsFit:
    made = _latents_fit(bench, settings, plain, fit.program, fit.vectors)
    return replace(
        fit, program=correct_latents(fit.program, made), found={**fit.found, "latents": made},
        vectors={**fit.vectors, **dict(zip(LATENTS_VECTORS, (made.gain, made.bias), strict=True))},
    )


_CANDIDATES = {
    "feature": _with_feature, "history": _with_history, "prediction": _with_prediction, "latents": _with_latents,
}


def _feature_fits(
    bench: VariantBench, settings: CacheSettings, program: StepProgram, vectors: Mapping[str, Float32s]
) -> tuple[dict[str, CorrectionFit], dict[str, NDArray[np.float64]]]:
    """DEC's first fit: the features of this call, by the float model on the same inputs, on the cached ones.

    Returns:
        The fits, and per call the noise power of refreshed features relative to the features', by feature.
    """
    features, calls = bench.set.features, len(program.calls)
    fits = {name: CorrectionFit(calls, f.channels, f.axis) for name, f in features.items()}
    error, power = ({name: np.zeros(calls) for name in features} for _ in range(2))
    loop = bench.loop("taught", vectors)

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        for name in bench.set.variants[seen.graph].reads:
            fits[name].observe(seen.index, outputs[GIVEN + name].array, taught(outputs, name), seen.samples)
        for name in bench.set.variants[seen.graph].writes:
            wanted = taught(outputs, name).astype(np.float64)
            error[name][seen.index] += float(np.sum((outputs[name].array - wanted) ** 2))
            power[name][seen.index] += float(np.sum(wanted**2))

    fitting_runs(bench, settings, loop, program, watch)
    return fits, {name: error[name] / np.maximum(power[name], np.finfo(np.float64).tiny) for name in features}


def _history_fit(
    bench: VariantBench, settings: CacheSettings, program: StepProgram, vectors: Mapping[str, Float32s],
    refreshes: Schedule,
) -> HistoryCorrection:
    denoiser = bench.parts.manifest.denoiser
    fit = HistoryFit(len(program.calls), refreshes)

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        name = denoiser.prediction
        own, wanted = (guided(seen, a, settings.guidance) for a in (outputs[name].array, taught(outputs, name)))
        fit.observe(seen.index, own, outputs[GIVEN + denoiser.sample_input].array[: len(own)], wanted, range(len(own)))

    fitting_runs(bench, settings, bench.loop("taught", vectors), program, watch)
    return fit.fit()


def _prediction_fit(
    bench: VariantBench, settings: CacheSettings, program: StepProgram, vectors: Mapping[str, Float32s],
    replay: HistoryReplay | None,
) -> CorrectionFit:
    denoiser = bench.parts.manifest.denoiser
    fit = CorrectionFit(len(program.calls), denoiser.latents_shape[0])
    loop = bench.loop("taught", vectors)

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        name = denoiser.prediction
        own, wanted = (guided(seen, a, settings.guidance) for a in (outputs[name].array, taught(outputs, name)))
        if replay is not None:
            own = replay(seen.index, own, outputs[GIVEN + denoiser.sample_input].array[: len(own)])
        fit.observe(seen.index, own, wanted, range(len(own)))

    fitting_runs(bench, settings, loop, program, watch)
    return fit


def _latents_fit(
    bench: VariantBench, settings: CacheSettings, plain: StepProgram, program: StepProgram,
    vectors: Mapping[str, Float32s],
) -> Correction:
    """Variance correction towards the uncached float trajectory of the same noise."""
    last = {call.step: index for index, call in enumerate(program.calls)}
    reference = bench.loop("float", bench.identity_vectors(len(program.calls)))
    student = bench.loop("quantized", vectors)
    fit: VarianceFit | None = None
    for batch in program_batches(bench, settings, program):
        wanted: dict[int, Float32s] = {}
        bench.run(reference, plain, batch, on_step=_into(wanted, last))
        if fit is None:
            variance = np.ones((len(program.calls), next(iter(wanted.values())).shape[1]))
            for call, x in wanted.items():
                variance[call] = x.var(axis=(0, *range(2, x.ndim)))
            fit = VarianceFit(variance)
        seen: dict[int, Float32s] = {}
        bench.run(student, program, batch, on_step=_into(seen, last))
        for call, x in seen.items():
            fit.observe(call, x, wanted[call], range(len(x)))
    assert fit is not None
    return fit.fit("auto")


def _into(found: dict[int, Float32s], call_of: Mapping[int, int]) -> Callable[[int, Float32s], None]:
    """Keeps the latents after each step under the index of its last call."""

    def keep(step: int, latents: Float32s) -> None:
        found[call_of[step]] = latents

    return keep
