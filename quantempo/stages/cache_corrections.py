"""Corrections of a cached, quantized run, fitted one after another, each with all earlier ones active.

History, prediction and latents are fitted in a closed loop (`quantempo.stages.closed_loop`), towards the trajectory of
the float model; features and products towards what the float model computes from the same input.

A correction that lowers the error of its own tensor may still harm the end of a run: least squares shrink what they
cannot know, call after call.  So each one is kept only where the final latents of other runs come clearly closer to the
float model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from quantempo.calib.cache.comparison import Errors, better
from quantempo.calib.cache.corrections import Correction, CorrectionFit, estimate_affine, estimate_offset
from quantempo.calib.cache.history import HistoryCorrection, correct_by_history, report_of
from quantempo.calib.cache.noise_floor import NoiseFloor
from quantempo.calib.cache.program_rows import (
    LATENTS_VECTORS,
    PREDICTION_VECTORS,
    absorb_noise,
    correct_latents,
    correct_prediction,
    latent_coefficients,
    own_part,
)
from quantempo.calib.cache.schedules import Schedule
from quantempo.contracts.cache import correction_inputs
from quantempo.contracts.engine import Buffer
from quantempo.contracts.program import PREDICTION, StepProgram
from quantempo.runtime.loop import Observation
from quantempo.runtime.registers import Registers
from quantempo.runtime.rng import NoiseSource
from quantempo.stages.cache_runs import (
    CacheSettings,
    Corrected,
    Float32s,
    VariantBench,
    check_batches,
    fitting_runs,
    guided,
    program_batches,
    taught,
)
from quantempo.stages.closed_loop import (
    Reference,
    closed_loop_batch,
    fit_history,
    fit_latents,
    fit_prediction,
    reference_of,
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
        floor: what quantization noise says about the schedule.
        kept: the corrections that are in it.
        history: the linear prediction from earlier refreshes.
        errors: of the final latents on held-out runs, uncorrected and with each candidate that was tried.
    """

    refreshes: Schedule
    program: StepProgram
    vectors: Mapping[str, Float32s]
    found: Mapping[str, Correction] = field(default_factory=dict)
    floor: NoiseFloor | None = None
    kept: tuple[Corrected, ...] = ()
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
            "kept": list(self.kept),
            "noise_floor": None if self.floor is None else asdict(self.floor),
        }


class _Check:
    """Judges programs by the final latents of held-out runs."""

    def __init__(self, bench: VariantBench, settings: CacheSettings, plain: StepProgram) -> None:
        self._bench, self._batches = bench, check_batches(bench, settings, plain)
        loop = bench.loop("float", bench.identity_vectors(len(plain.calls)))
        self._wanted = [bench.run(loop, plain, batch) for batch in self._batches]
        self.errors: list[tuple[str, float]] = []

    def error(self, name: str, program: StepProgram, vectors: Mapping[str, Float32s]) -> Errors:
        """Mean squared error of each sample to the uncached float model's final latents, (samples,)."""
        loop = self._bench.loop("quantized", vectors)
        squares = [
            (self._bench.run(loop, program, batch).astype(np.float64) - wanted) ** 2
            for batch, wanted in zip(self._batches, self._wanted, strict=True)
        ]
        found: Errors = np.concatenate([square.reshape(len(square), -1).mean(axis=1) for square in squares])
        self.errors.append((name, float(found.mean())))
        return found


def fit_corrections(
    bench: VariantBench, settings: CacheSettings, plain: StepProgram, cached: StepProgram, refreshes: Schedule,
    floor: NoiseFloor | None = None,
) -> StepsFit:
    """Fit one correction after another on the quantized, cached trajectory.

    Args:
        bench: quantized.
        settings: which corrections.
        plain: the uncached program.
        cached: with the variants of the schedule, vectors from row 0 on.
        refreshes: the schedule.
        floor: what quantization noise says about it; calls of order 0 use no earlier refresh.
    """
    vectors: dict[str, Float32s] = dict(bench.identity_vectors(len(cached.calls)))
    check = _Check(bench, settings, plain)
    best = check.error("none", cached, vectors)
    fit = StepsFit(refreshes, cached, vectors, floor=floor)
    work = _Work(bench, settings, reference_of(bench, plain, closed_loop_batch(bench, settings, plain)))
    for name in settings.corrections:
        candidate = _CANDIDATES[name](work, fit)
        if candidate is None:
            continue
        error = check.error(name, candidate.program, candidate.vectors)
        if better(error, best):
            fit, best = replace(candidate, kept=(*fit.kept, name)), error
    return replace(fit, errors=tuple(check.errors))


@dataclass(frozen=True, eq=False)
class _Work:
    """What all candidates are fitted with."""

    bench: VariantBench
    settings: CacheSettings
    reference: Reference


def _with_feature(work: _Work, fit: StepsFit) -> StepsFit:
    fits = _graph_fits(work, fit, "feature")
    found, vectors = dict(fit.found), dict(fit.vectors)
    for name, each in fits.items():
        made = found[name] = each.fit({"affine": estimate_affine, "offset": estimate_offset})
        vectors.update(zip(correction_inputs(name, "feature"), (made.gain, made.bias), strict=True))
    return replace(fit, vectors=vectors, found=found)


def _with_product(work: _Work, fit: StepsFit) -> StepsFit:
    fits = _graph_fits(work, fit, "product")
    found, vectors = dict(fit.found), dict(fit.vectors)
    for name, each in fits.items():
        made = found[f"{name}.product"] = each.fit({"affine": estimate_affine, "offset": estimate_offset})
        vectors.update(zip(correction_inputs(name, "product"), (made.gain, made.bias), strict=True))
    return replace(fit, vectors=vectors, found=found)


def _with_history(work: _Work, fit: StepsFit) -> StepsFit:
    orders = None if fit.floor is None else {entry.call: entry.order for entry in fit.floor.entries}
    history, _ = fit_history(work.bench, fit.program, fit.vectors, fit.refreshes, work.reference, orders)
    sample = work.bench.parts.manifest.denoiser.sample_input
    return replace(fit, program=correct_by_history(fit.program, history, fit.refreshes, sample), history=history)


def _with_prediction(work: _Work, fit: StepsFit) -> StepsFit:
    made, _ = fit_prediction(work.bench, fit.program, fit.vectors, work.reference)
    return replace(
        fit, program=correct_prediction(fit.program, made), found={**fit.found, "prediction": made},
        vectors={**fit.vectors, **dict(zip(PREDICTION_VECTORS, (made.gain, made.bias), strict=True))},
    )


def _with_noise(work: _Work, fit: StepsFit) -> StepsFit | None:
    """PTQD's variance absorption; `None` where the sampler adds no noise."""
    if not any(latent_coefficients(call)[1] for call in fit.program.calls):
        return None
    return with_noise_absorbed(work.bench, work.settings, fit)[0]


def with_noise_absorbed(
    bench: VariantBench, settings: CacheSettings, fit: StepsFit
) -> tuple[StepsFit, tuple[float, ...]]:
    """PTQD's variance absorption, and per call the share of the sampler's noise variance that was taken over."""
    program, shares = absorb_noise(fit.program, _residuals(bench, settings, fit))
    return replace(fit, program=program), shares


def _with_latents(work: _Work, fit: StepsFit) -> StepsFit:
    made, _ = fit_latents(work.bench, fit.program, fit.vectors, work.reference)
    return replace(
        fit, program=correct_latents(fit.program, made), found={**fit.found, "latents": made},
        vectors={**fit.vectors, **dict(zip(LATENTS_VECTORS, (made.gain, made.bias), strict=True))},
    )


_CANDIDATES: Mapping[Corrected, Callable[[_Work, StepsFit], StepsFit | None]] = {
    "feature": _with_feature, "product": _with_product, "history": _with_history, "prediction": _with_prediction,
    "noise": _with_noise, "latents": _with_latents,
}


def _graph_fits(work: _Work, fit: StepsFit, of: Literal["feature", "product"]) -> dict[str, CorrectionFit]:
    """DEC's fits: what the float model has at this call for the same input, on what the reusing graph has.

    `feature` is the cached tensor itself (a1, b1); `product` the result of the layer that consumes it (a2, b2), with
    the cached tensor corrected already.
    """
    bench, calls = work.bench, len(fit.program.calls)
    features = {n: f for n, f in bench.set.features.items() if of == "feature" or f.product is not None}
    fits, seen_as = {}, {}
    for name, f in features.items():
        if of == "feature":
            fits[name], seen_as[name] = CorrectionFit(calls, f.channels, f.axis), (GIVEN + name, name)
        else:
            assert f.product is not None
            axis = 1 if f.axis == 1 else -1
            fits[name], seen_as[name] = CorrectionFit(calls, f.product_channels, axis), (f.product, f.product)
    taps = tuple(wanted for _, wanted in seen_as.values()) if of == "product" else ()
    reusing = [name for name, variant in bench.set.variants.items() if variant.reads]
    loop = bench.loop("taught", fit.vectors, dict.fromkeys(reusing, taps), taps)

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        for name in bench.set.variants[seen.graph].reads:
            if name in fits:
                given, wanted = seen_as[name]
                fits[name].observe(seen.index, outputs[given].array, taught(outputs, wanted), seen.samples)

    fitting_runs(bench, work.settings, loop, fit.program, watch)
    return fits


def _residuals(bench: VariantBench, settings: CacheSettings, fit: StepsFit) -> list[float]:
    """Per call, the standard deviation of the corrected prediction's error to the float one for the same input."""
    program = fit.program
    name, calls = bench.parts.manifest.denoiser.prediction, len(fit.program.calls)
    total, count, wanted = np.zeros(calls), np.zeros(calls), dict[int, Float32s]()

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        wanted[seen.index] = guided(seen, taught(outputs, name), settings.guidance)

    def look(index: int, registers: Registers, noise: NoiseSource) -> None:
        update, ahead = program.calls[index].update, registers.copied()
        for operation in update[: own_part(update)]:
            ahead.apply(operation, noise)
        error = ahead[PREDICTION].astype(np.float64) - wanted[index]
        total[index] += float(np.sum((error - error.mean()) ** 2))
        count[index] += error.size

    loop = bench.loop("taught", fit.vectors)
    bench.run(loop, program, program_batches(bench, settings, program)[0], watch, look)
    return [float(v) for v in np.sqrt(total / np.maximum(count, 1))]
