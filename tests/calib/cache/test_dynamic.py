from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from quantempo.calib.cache.dynamic import (
    IndicatorRecord,
    Rule,
    averaged,
    fit_polynomial,
    relative_change,
    replay,
    threshold_for,
)
from quantempo.errors import CalibrationError, RequestError

RULES = {
    "accumulated": lambda threshold: Rule(threshold),
    "polynomial": lambda threshold: Rule(threshold, (2.0, 0.5, 0.01)),
    "capped": lambda threshold: Rule(threshold, max_consecutive=2),
    "first_block": lambda threshold: Rule(threshold, accumulate=False, reference="previous_call"),
    "warm": lambda threshold: Rule(threshold, warm_up=5),
}


def _record(samples: int = 6, calls: int = 20, seed: int = 0) -> IndicatorRecord:
    rng = np.random.default_rng(seed)
    record = IndicatorRecord(calls)
    for _ in range(2):
        x = rng.standard_normal((samples // 2, 8))
        for call in range(calls):
            record.observe(call, x.astype(np.float32), (x**3).astype(np.float32))
            x = x + rng.standard_normal(x.shape) * np.exp(-4 * call / calls)
    return record


CHANGES = _record().changes


def test_changes_are_those_of_the_definition_per_sample() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 5, 3, 4)).astype(np.float32)
    record = IndicatorRecord(5, longest=3)
    for call in range(5):
        record.observe(call, x[call], y[call])
    for sample in range(3):
        wanted = np.abs(x[3, sample] - x[1, sample]).mean() / np.abs(x[1, sample]).mean()
        assert record.changes[sample, 3, 2] == pytest.approx(wanted, rel=1e-5)
        wanted = np.abs(y[3, sample] - y[2, sample]).mean() / np.abs(y[2, sample]).mean()
        assert record.outputs[sample, 3] == pytest.approx(wanted, rel=1e-5)
    assert np.isnan(record.changes[:, 0]).all()
    np.testing.assert_allclose(relative_change(2 * x[0], x[0]), 1.0, rtol=1e-6)


def test_a_run_must_begin_at_its_first_call() -> None:
    with pytest.raises(CalibrationError, match="call 3"):
        IndicatorRecord(5).observe(3, np.ones((1, 2)), np.ones((1, 2)))


@pytest.mark.parametrize("name", RULES)
def test_threshold_zero_refreshes_everywhere(name: str) -> None:
    assert replay(CHANGES, RULES[name](0.0)).all()


@pytest.mark.parametrize("name", RULES)
def test_skipped_calls_grow_with_the_threshold(name: str) -> None:
    skipped = [int((~replay(CHANGES, RULES[name](t))).sum()) for t in np.linspace(0, 4, 60)]
    assert all(a <= b for a, b in pairwise(skipped))
    assert skipped[-1] > skipped[0]


def test_cap_and_warm_up_hold() -> None:
    decisions = replay(CHANGES, Rule(math.inf, max_consecutive=3, warm_up=2))
    assert all(row.tolist() == [True, True, *([False] * 3 + [True]) * 4, False, False] for row in decisions)


def test_each_sample_decides_for_itself() -> None:
    together = replay(CHANGES, Rule(0.7))
    assert len(np.unique(together, axis=0)) > 1
    for sample in range(len(CHANGES)):
        np.testing.assert_array_equal(together[sample], replay(CHANGES[sample : sample + 1], Rule(0.7))[0])


def test_accumulation_by_hand() -> None:
    changes = np.full((1, 6, 6), np.nan)
    changes[0, 1:, 1] = [0.3, 0.3, 0.3, 0.3, 0.3]
    assert replay(changes, Rule(0.6)).tolist() == [[True, False, True, False, True, False]]
    assert replay(changes, Rule(0.31, accumulate=False)).tolist() == [[True] + [False] * 5]


def test_change_since_the_last_refresh_is_looked_up() -> None:
    changes = np.full((1, 5, 5), np.nan)
    for call in range(1, 5):
        changes[0, call, 1 : call + 1] = 0.1 * np.arange(1, call + 1)
    rule = Rule(0.25, accumulate=False, reference="last_refresh")
    assert replay(changes, rule).tolist() == [[True, False, False, True, False]]


@pytest.mark.parametrize("name", ["accumulated", "polynomial", "first_block"])
@pytest.mark.parametrize("wanted", [0.0, 0.3, 0.5, 0.7])
def test_threshold_for_a_share_of_skipped_calls(name: str, wanted: float) -> None:
    threshold, share = threshold_for(CHANGES, RULES[name], wanted)
    assert share >= wanted
    assert 1 - replay(CHANGES, RULES[name](threshold)).mean() == share
    if threshold > 0:
        assert 1 - replay(CHANGES, RULES[name](threshold * (1 - 1e-9))).mean() < wanted


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(RequestError, match=r"at most 0\.6"):
        threshold_for(CHANGES, RULES["capped"], 0.9)
    with pytest.raises(RequestError, match="below 1"):
        threshold_for(CHANGES, RULES["accumulated"], 1.0)


def test_decisions_are_averaged_to_a_fixed_schedule() -> None:
    decisions = np.array([[1, 0, 1, 0, 1], [1, 0, 1, 0, 0], [1, 1, 0, 0, 1]], bool)
    assert averaged(decisions) == (0, 2, 4)
    assert averaged(decisions, 1) == (0,)


# ---------------------------------------------------------------------------------------------------------- polynomials


def _noisy(degree: int, points: int, noise: float, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.05, 0.8, points)
    y = {1: 0.7 * x + 0.02, 2: x**2 + 0.1, 4: 3 * x**4 + 0.5 * x}[degree]
    return x, y + noise * rng.standard_normal(points)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_a_polynomial_is_recovered(degree: int) -> None:
    x, y = _noisy(degree, 60, 0.0)
    fit = fit_polynomial(x, y)
    np.testing.assert_allclose(np.polyval(fit.coefficients, x), y, rtol=1e-6)
    assert fit.error < 1e-6


@pytest.mark.parametrize("points", range(2, 12))
@pytest.mark.parametrize("seed", range(5))
def test_few_points_give_a_modest_and_rising_polynomial(points: int, seed: int) -> None:
    x, y = _noisy(1, points, 0.1, seed)
    fit = fit_polynomial(x, y)
    assert len(fit.coefficients) - 1 <= max(1, points // 3 - 1)
    values = np.polyval(fit.coefficients, np.linspace(fit.low, fit.high, 100))
    assert np.all(np.diff(values) >= -1e-9)
    assert values[0] >= -1e-9


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_relation_never_falls(seed: int) -> None:
    x, y = _noisy(4, 40, 0.3, seed)
    fit = fit_polynomial(x, y)
    assert np.all(np.diff(np.polyval(fit.coefficients, np.linspace(fit.low, fit.high, 300))) >= -1e-9)


def test_a_falling_relation_becomes_the_line_through_the_origin() -> None:
    x = np.linspace(0.1, 1, 30)
    fit = fit_polynomial(x, 1 - 0.9 * x)
    assert len(fit.coefficients) == 2
    assert fit.coefficients[0] >= 0
    assert fit.coefficients[1] == 0.0


def test_pairs_without_a_value_are_left_out() -> None:
    x, y = _noisy(2, 60, 0.0)
    with_gaps = fit_polynomial(np.append(x, [np.nan, 1.0]), np.append(y, [1.0, np.nan]))
    assert with_gaps == fit_polynomial(x, y)


def test_bad_fits_are_refused() -> None:
    with pytest.raises(RequestError, match="degree 5"):
        fit_polynomial(np.ones(3), np.ones(3), 5)
    with pytest.raises(CalibrationError, match="1 pairs"):
        fit_polynomial(np.ones(1), np.ones(1))
