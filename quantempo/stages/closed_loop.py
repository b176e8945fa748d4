"""Corrections fitted while a run goes on: each call is corrected towards the float run before the next call begins.

The float run of the same noise, without cache, says where the latents should be after every call.  From there and from
what the sampler is about to do follows the prediction that would bring them there.  It takes in what all calls before
did wrong, so a fit on it does not let errors add up: the part that shows in what the program has at hand is taken out
again and again.  All samples of a batch go through a call together, so the call is fitted on all of them, corrected in
all of them, and the next call sees inputs as the finished program makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from quantempo.calib.cache.corrections import (
    Correction,
    CorrectionFit,
    VarianceFit,
    estimate_affine,
    estimate_prediction,
    joined,
)
from quantempo.calib.cache.history import (
    BEFORE,
    LAST,
    HistoryCorrection,
    correct_by_history,
    fit_call,
    history_terms,
    identity,
)
from quantempo.calib.cache.program_rows import (
    LATENTS_VECTORS,
    PREDICTION_VECTORS,
    aim,
    correct_every_call,
    own_part,
)
from quantempo.calib.cache.schedules import Schedule
from quantempo.calib.trajectories import TrajectoryBatch
from quantempo.contracts.program import LATENTS, PREDICTION, Call, StepProgram
from quantempo.runtime.registers import Registers
from quantempo.runtime.rng import NoiseSource
from quantempo.stages.cache_runs import CacheSettings, Float32s, VariantBench, program_batches


@dataclass(frozen=True, eq=False)
class Reference:
    """What the uncached float run of a batch comes to.

    Args:
        batch: that was run.
        program: uncached.
        after: per call, the register that its prediction is for, as the call leaves it; `None` where it is for none.
        final: the last latents.
    """

    batch: TrajectoryBatch
    program: StepProgram
    after: tuple[Float32s | None, ...]
    final: Float32s


def reference_of(bench: VariantBench, program: StepProgram, batch: TrajectoryBatch) -> Reference:
    """Run the float model without a cache."""
    aims = [aim(call) for call in program.calls]
    kept: list[Float32s | None] = [None] * len(aims)

    def look(index: int, registers: Registers, noise: NoiseSource) -> None:
        last = aims[index - 1] if index else None
        if last is not None:
            kept[index - 1] = registers[last[0]].copy()

    loop = bench.loop("float", bench.identity_vectors(len(program.calls)))
    final = bench.run(loop, program, batch, on_prediction=look)
    kept[-1] = final
    return Reference(batch, program, tuple(kept), final)


def closed_loop_batch(bench: VariantBench, settings: CacheSettings, program: StepProgram) -> TrajectoryBatch:
    """The trajectories that go through the calls together: the first batch of those that everything is fitted on."""
    return program_batches(bench, settings, program)[0]


def fit_history(
    bench: VariantBench, program: StepProgram, vectors: Mapping[str, Float32s], refreshes: Schedule,
    reference: Reference, orders: Mapping[int, int] | None = None,
) -> tuple[HistoryCorrection, Float32s]:
    """Fit the linear forms of reusing calls, one after another.

    Args:
        bench: quantized.
        program: with the schedule's variants and no other correction of predictions.
        vectors: that it names.
        refreshes: the schedule.
        reference: of the batch to fit on.
        orders: by call, 0 where earlier refreshes are left out; default: 1.

    Returns:
        The correction, and the final latents of the runs that it was fitted on, corrected.
    """
    calls = len(program.calls)
    coefficients = np.tile(identity(), (calls, 1))
    before, after = np.zeros(calls), np.zeros(calls)
    sample = bench.parts.manifest.denoiser.sample_input
    neutral = HistoryCorrection(coefficients, before, after)
    prepared = correct_by_history(program, neutral, refreshes, sample)

    def fit(index: int, registers: Registers, noise: NoiseSource) -> None:
        call = prepared.calls[index]
        wanted = _wanted(call, index, registers, noise, reference)
        if index in refreshes or wanted is None:
            return
        fed = np.empty(registers.shape, np.float32)
        registers.lin(call.inputs[sample], fed)
        terms = (registers[PREDICTION], registers[LAST], registers[BEFORE], fed)
        order = 1 if orders is None else orders.get(index, 1)
        coefficients[index], before[index], after[index] = fit_call(terms, wanted[1], range(len(fed)), order)
        registers.lin(history_terms(coefficients[index], call.inputs[sample]), registers[PREDICTION])

    final = bench.run(bench.loop("quantized", vectors), prepared, reference.batch, on_prediction=fit)
    return HistoryCorrection(coefficients, before, after), final


def fit_prediction(
    bench: VariantBench, program: StepProgram, vectors: Mapping[str, Float32s], reference: Reference
) -> tuple[Correction, Float32s]:
    """Fit gain and bias per channel of every call's prediction, after the linear forms.

    Args:
        bench: quantized.
        program: with the schedule's variants, and the linear forms that were kept.
        vectors: that it names.
        reference: of the batch to fit on.

    Returns:
        The correction, and the final latents of the runs that it was fitted on, corrected.
    """

    def fit(call: Call, index: int, registers: Registers, noise: NoiseSource) -> Correction | None:
        pair = _wanted(call, index, registers, noise, reference)
        if pair is None:
            return None
        own, wanted = pair
        each = CorrectionFit(1, wanted.shape[1])
        each.observe(0, own, wanted, range(len(own)))
        return each.fit({"prediction": estimate_prediction, "affine": estimate_affine})

    return _fit_call_by_call(bench, program, vectors, reference.batch, PREDICTION, PREDICTION_VECTORS, fit)


def fit_latents(
    bench: VariantBench, program: StepProgram, vectors: Mapping[str, Float32s], reference: Reference
) -> tuple[Correction, Float32s]:
    """Fit the variance correction of the latents after every call that writes them.

    Each gain is fitted on latents that the gains before it have corrected already; fitted all at once, each would
    correct again what those before it did.

    Args:
        bench: quantized.
        program: with everything else that was kept.
        vectors: that it names.
        reference: of the batch to fit on.

    Returns:
        The correction, and the final latents of the runs that it was fitted on, corrected.
    """

    def fit(call: Call, index: int, registers: Registers, noise: NoiseSource) -> Correction | None:
        aimed, wanted = aim(call), reference.after[index]
        if wanted is None or aimed is None or aimed[0] != LATENTS:
            return None
        ahead = _look_ahead(call, registers, noise)[1]
        each = VarianceFit(wanted.var(axis=(0, *range(2, wanted.ndim)), dtype=np.float64)[None])
        each.observe(0, ahead[LATENTS], wanted, range(len(wanted)))
        return each.fit("auto")

    return _fit_call_by_call(bench, program, vectors, reference.batch, LATENTS, LATENTS_VECTORS, fit)


def _fit_call_by_call(
    bench: VariantBench, program: StepProgram, vectors: Mapping[str, Float32s], batch: TrajectoryBatch, register: str,
    names: tuple[str, str], fit: Callable[[Call, int, Registers, NoiseSource], Correction | None],
) -> tuple[Correction, Float32s]:
    """Run a batch whose every call is corrected as soon as `fit` has said how, and the final latents of that run."""
    rows = _neutral(bench, program, names)
    prepared = correct_every_call(program, register, names)
    found: list[Correction | None] = [None] * len(program.calls)

    def correct(index: int, registers: Registers, noise: NoiseSource) -> None:
        made = fit(prepared.calls[index], index, registers, noise)
        if made is not None:
            found[index] = made
            _write(rows, names, index, made)

    final = bench.run(bench.loop("quantized", {**vectors, **rows}), prepared, batch, on_prediction=correct)
    return joined(found, _channels(bench)), final


def _wanted(
    call: Call, index: int, registers: Registers, noise: NoiseSource, reference: Reference
) -> tuple[Float32s, Float32s] | None:
    """The prediction as the sampler will read it, and the one that would bring its register to the float run's."""
    aimed, goal = aim(call), reference.after[index]
    if aimed is None or goal is None:
        return None
    register, share = aimed
    own, ahead = _look_ahead(call, registers, noise)
    missing = goal.astype(np.float64) - ahead[register]
    wanted: Float32s = (own + missing / share).astype(np.float32)
    return own, wanted


def _look_ahead(call: Call, registers: Registers, noise: NoiseSource) -> tuple[Float32s, Registers]:
    """The prediction after the operations that prepare it, and all registers at the end of a call."""
    ahead = registers.copied()
    prepared = own_part(call.update)
    for operation in call.update[:prepared]:
        ahead.apply(operation, noise)
    own = ahead[PREDICTION].copy()
    for operation in call.update[prepared:]:
        ahead.apply(operation, noise)
    return own, ahead


def _neutral(bench: VariantBench, program: StepProgram, names: tuple[str, str]) -> dict[str, Float32s]:
    shape = (len(program.calls), _channels(bench))
    return {names[0]: np.ones(shape, np.float32), names[1]: np.zeros(shape, np.float32)}


def _write(rows: Mapping[str, Float32s], names: tuple[str, str], index: int, made: Correction) -> None:
    rows[names[0]][index], rows[names[1]][index] = made.gain[0], made.bias[0]


def _channels(bench: VariantBench) -> int:
    return bench.parts.manifest.denoiser.latents_shape[0]
