from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quantempo.calib.cache.corrections import Correction
from quantempo.calib.cache.history import (
    BEFORE,
    LAST,
    HistoryCorrection,
    correct_by_history,
    fit_call,
    identity,
)
from quantempo.calib.cache.program_rows import correct_prediction
from quantempo.contracts.program import LATENTS, PREDICTION, Call, Correct, Lin, StepProgram, check_program
from quantempo.runtime.registers import Registers
from quantempo.runtime.rng import PhiloxNoise

REFRESHES, CALLS, SHAPE = (0, 2, 5), 7, (8, 2, 3, 3)
Floats = NDArray[np.float64]


def _run(seed: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    predictions, fed = rng.standard_normal((2, CALLS, *SHAPE))
    return predictions, fed


def _wanted(call: int, predictions: Floats, fed: Floats, coefficients: tuple[float, ...]) -> Floats:
    last = max(r for r in REFRESHES if r <= call)
    before = max((r for r in REFRESHES if r < last), default=last)
    terms = (predictions[call], predictions[last], predictions[before], fed[call])
    return sum(c * term for c, term in zip(coefficients, terms, strict=True))  # type: ignore[return-value]


def _terms(call: int, predictions: Floats, fed: Floats) -> tuple[Floats, ...]:
    last = max(r for r in REFRESHES if r <= call)
    before = max((r for r in REFRESHES if r < last), default=last)
    return predictions[call], predictions[last], predictions[before], fed[call]


def _fit(coefficients: tuple[float, ...], noise: float = 0.0, order: int = 1) -> HistoryCorrection:
    found = np.tile(identity(), (CALLS, 1))
    before, after = np.zeros(CALLS), np.zeros(CALLS)
    predictions, fed = _run(0)
    rng = np.random.default_rng(7)
    for call in set(range(CALLS)) - set(REFRESHES):
        wanted = _wanted(call, predictions, fed, coefficients) + noise * rng.standard_normal(SHAPE)
        fitted = fit_call(_terms(call, predictions, fed), wanted, range(SHAPE[0]), order)
        found[call], before[call], after[call] = fitted
    return HistoryCorrection(found, before, after)


def test_a_linear_relation_is_recovered() -> None:
    wanted = (0.5, 0.75, -0.25, 0.125)
    found = _fit(wanted)
    for call in (3, 4, 6):
        np.testing.assert_allclose(found.coefficients[call], wanted, atol=1e-5)
        assert found.after[call] < 1e-8 < found.before[call]
    # Before the second refresh the two refreshes are one, and only their sum is known.
    assert found.coefficients[1, 1] + found.coefficients[1, 2] == pytest.approx(0.5, abs=1e-5)


def test_what_is_right_already_is_left_alone() -> None:
    found = _fit((1.0, 0.0, 0.0, 0.0))
    np.testing.assert_array_equal(found.coefficients, np.tile([1.0, 0, 0, 0], (CALLS, 1)))
    assert found.kept == 0
    program = correct_by_history(_program(), found, REFRESHES)
    assert not any(op.to == PREDICTION for call in program.calls for op in call.update)


def test_order_zero_reads_no_earlier_refresh_and_still_fits_the_rest() -> None:
    free, bound = _fit((0.5, 0.75, -0.25, 0.125)), _fit((0.5, 0.75, -0.25, 0.125), order=0)
    for call in (3, 4, 6):
        assert np.all(bound.coefficients[call, 1:3] == 0)
        assert bound.coefficients[call, 3] != 0
        assert free.after[call] < bound.after[call] < bound.before[call]


def test_one_sample_leaves_nothing_to_judge_by() -> None:
    predictions, fed = _run(0)
    terms = tuple(term[:1] for term in _terms(3, predictions, fed))
    coefficients, before, after = fit_call(terms, 2.0 * terms[0], range(1))
    np.testing.assert_array_equal(coefficients, identity())
    assert before == after > 0


def test_held_out_error_never_rises() -> None:
    for noise in (0.1, 1.0, 10.0):
        found = _fit((0.9, 0.1, 0.0, 0.0), noise)
        assert np.all(found.after <= found.before)


def _program() -> StepProgram:
    update = (Lin(LATENTS, ((LATENTS, 1.0), (PREDICTION, -0.5))),)
    calls = tuple(
        Call(float(-i), {"sample": ((LATENTS, 2.0),)}, update, i, graph="full" if i in REFRESHES else "reuse.0")
        for i in range(CALLS)
    )
    return StepProgram("DDIMScheduler", CALLS, calls)


def test_the_program_agrees_with_the_formula() -> None:
    coefficients = (0.5, 0.75, -0.25, 0.125)
    fitted = _fit(coefficients)
    program = correct_by_history(_program(), fitted, REFRESHES)
    check_program(program, "test")
    assert set(program.registers()) == {LATENTS, LAST, BEFORE}
    registers = Registers(program.registers(), SHAPE)
    predictions, _ = _run(9)
    rng = np.random.default_rng(3)
    registers[LATENTS][...] = rng.standard_normal(SHAPE)
    for index, call in enumerate(program.calls):
        latents = registers[LATENTS].copy()
        registers.place(PREDICTION, predictions[index].astype(np.float32))
        for op in call.update:
            registers.apply(op, PhiloxNoise(()))
        if index in REFRESHES:
            wanted = predictions[index]
        else:
            fed = np.stack([2.0 * latents.astype(np.float64)] * CALLS)
            wanted = _wanted(index, predictions, fed, tuple(fitted.coefficients[index]))
        np.testing.assert_allclose(registers[PREDICTION], wanted, atol=1e-5)
        np.testing.assert_allclose(registers[LATENTS], latents - 0.5 * wanted, atol=1e-5)


def test_gain_and_bias_come_after_the_linear_forms() -> None:
    gain = np.full((CALLS, 2), 1.1, np.float32)
    extra = Correction(gain, gain - 1, np.ones(CALLS), np.zeros(CALLS), np.full((CALLS, 2), "affine"))
    program = correct_prediction(correct_by_history(_program(), _fit((0.5, 0.5, 0, 0)), REFRESHES), extra)
    check_program(program, "test")
    kinds = [[(op.to, type(op)) for op in call.update] for call in program.calls]
    assert kinds[1] == [(PREDICTION, Lin), (PREDICTION, Correct), (LATENTS, Lin)]
    assert kinds[2] == [(BEFORE, Lin), (LAST, Lin), (PREDICTION, Correct), (LATENTS, Lin)]
