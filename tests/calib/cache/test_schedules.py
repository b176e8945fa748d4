from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from quantempo.calib.cache.schedules import (
    FeatureChanges,
    bounds_of,
    check_schedule,
    cost_of,
    every,
    improved,
    power_law,
    programmed,
    serving,
    shifted,
    sum_of_costs,
)
from quantempo.errors import RequestError


def _walk(calls: int, seed: int = 0, runs: int = 2) -> FeatureChanges:
    """Features that move fast at the start and slowly later."""
    changes = FeatureChanges(calls, calls)
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        x = rng.standard_normal((2, 5))
        for call in range(calls):
            changes.observe(call, x.astype(np.float32))
            x = x + rng.standard_normal(x.shape) * np.exp(-3 * call / calls)
    return changes


def _brute_force(costs: np.ndarray, interval: int, shortest: int, longest: int) -> float:
    calls = len(costs) - 1
    groups = -(-calls // interval)
    best = math.inf
    for inner in itertools.combinations(range(1, calls), groups - 1):
        lengths = [b - a for a, b in itertools.pairwise((0, *inner, calls))]
        if all(shortest <= n <= longest for n in lengths):
            best = min(best, cost_of(costs, (0, *inner)))
    return best


@pytest.mark.parametrize("calls", range(2, 13))
@pytest.mark.parametrize("interval", [1, 2, 3, 4])
def test_dynamic_programming_equals_brute_force(calls: int, interval: int) -> None:
    costs = _walk(calls, seed=calls).costs()
    shortest, longest = bounds_of(interval)
    best = _brute_force(costs, interval, shortest, longest)
    if math.isfinite(best):
        assert cost_of(costs, programmed(costs, interval)) == pytest.approx(best, rel=1e-12)


def test_dynamic_programming_never_loses_to_even_refreshes_and_follows_the_change() -> None:
    costs = _walk(24).costs()
    for interval in (2, 3, 4):
        chosen = programmed(costs, interval)
        assert len(chosen) == len(every(24, interval))
        assert cost_of(costs, chosen) <= cost_of(costs, every(24, interval))
    early = sum(call < 12 for call in programmed(costs, 3))
    assert early > 4  # fast features are refreshed more often


def test_constant_features_cost_nothing() -> None:
    changes = FeatureChanges(6, 6)
    for call in range(6):
        changes.observe(call, np.ones((2, 3), np.float32))
    assert cost_of(changes.costs(), (0, 4)) == 0.0


def test_last_group_is_shortened_where_the_bounds_cannot_tile_the_program() -> None:
    costs = _walk(7).costs()
    assert programmed(costs, 3, bounds=(3, 3)) == (0, 3, 6)
    assert programmed(_walk(1).costs(), 4) == (0,)
    with pytest.raises(RequestError, match="widen the bounds"):
        programmed(costs, 3, bounds=(1, 2))


def test_streaming_equals_all_pairs_at_once() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 4, 3)).astype(np.float32)
    changes = FeatureChanges(8, 3)
    for call in range(8):
        for lane, rows in (("a", slice(0, 2)), ("b", slice(2, 4))):
            changes.observe(call, x[call, rows], lane)
    wanted = [[np.abs(x[a + k] - x[a]).sum(dtype=np.float64) if a + k < 8 else 0.0 for k in range(3)] for a in range(8)]
    np.testing.assert_allclose(changes.absolute, wanted, rtol=1e-6)
    np.testing.assert_allclose(changes.power, (x.astype(np.float64) ** 2).sum(axis=(1, 2)), rtol=1e-12)
    assert np.isinf(changes.costs()[0, 4])


def test_memory_is_bounded_by_the_longest_group() -> None:
    changes = FeatureChanges(100, 4)
    for call in range(100):
        changes.observe(call, np.ones(1000, np.float32))
        assert sum(len(kept) for kept in changes._recent.values()) <= 3


def test_a_new_run_is_not_compared_with_the_last_one() -> None:
    changes = FeatureChanges(3, 3)
    for value in (0.0, 100.0):
        for call in range(3):
            changes.observe(call, np.full(2, value, np.float32))
    assert changes.absolute.sum() == 0


def test_merged_changes_are_those_of_all_runs() -> None:
    merged = _walk(6, seed=0, runs=1).merge(_walk(6, seed=1, runs=1))
    assert merged.absolute.sum() > _walk(6, seed=0, runs=1).absolute.sum()
    np.testing.assert_array_equal(merged.elements, np.full(6, 20))


def test_every_counts_calls() -> None:
    assert every(20, 3) == (0, 3, 6, 9, 12, 15, 18)
    assert every(5, 1) == (0, 1, 2, 3, 4)  # interval 1 never reuses
    assert serving((0, 2, 3), 5) == (0, 0, 2, 3, 3)


@pytest.mark.parametrize("calls", [7, 20, 50])
@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("power", [1.0, 1.2, 1.5, 3.0])
def test_power_law_has_as_many_refreshes_as_even_ones(calls: int, interval: int, power: float) -> None:
    for centre in (0, calls / 2, calls):
        schedule = check_schedule(power_law(calls, interval, power, centre), calls)
        assert len(schedule) == -(-calls // interval)


def test_power_law_is_denser_near_its_centre() -> None:
    gaps = np.diff(power_law(100, 5, 1.5))
    assert gaps[0] < gaps[-1]
    middle = np.diff(power_law(100, 5, 1.5, 50))
    assert middle[len(middle) // 2] < min(middle[0], middle[-1])


def test_costs_of_several_features_are_relative_to_their_sizes() -> None:
    one, small, large = _walk(8, seed=1), FeatureChanges(8, 8), FeatureChanges(8, 8)
    rng = np.random.default_rng(2)
    for call in range(8):
        x = rng.standard_normal((2, 5)) * (1 + call)
        small.observe(call, x)
        large.observe(call, 1e3 * x)
    np.testing.assert_allclose(sum_of_costs([one, small])[0, :6], sum_of_costs([one, large])[0, :6])
    assert cost_of(sum_of_costs([one, one]), (0, 3)) == pytest.approx(2 * cost_of(sum_of_costs([one]), (0, 3)))


def test_moves_that_a_guess_rules_out_are_never_measured() -> None:
    asked = []

    def error(refreshes: tuple[int, ...]) -> np.ndarray:
        asked.append(refreshes)
        return np.array([float(-sum(refreshes))] * 4)

    found = improved((0, 2, 4), 8, 8, error, 50, lambda r: math.inf if r[1] > 3 else 1.0)
    assert all(refreshes[1] <= 3 for refreshes in asked)
    assert found == (0, 3, 7)


@pytest.mark.parametrize(
    ("refreshes", "words"),
    [((1, 3), "first call that reuses"), ((), "first call"), ((0, 9), "9 of a program with 5"), ((0, 3, 3), "ascend")],
)
def test_impossible_schedules_are_refused(refreshes: tuple[int, ...], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_schedule(refreshes, 5)


def test_settings_out_of_range_are_refused() -> None:
    for make in (lambda: every(5, 0), lambda: power_law(5, 2, 0.5)):
        with pytest.raises(RequestError, match="cache schedule"):
            make()


def test_moving_refreshes_finds_the_best_schedule_and_never_loses() -> None:
    wanted = (0, 4, 5, 9)

    def error(refreshes: tuple[int, ...]) -> np.ndarray:
        return np.full(3, float(sum((a - b) ** 2 for a, b in zip(refreshes, wanted, strict=True))))

    asked: list[tuple[int, ...]] = []

    def counted(refreshes: tuple[int, ...]) -> np.ndarray:
        asked.append(refreshes)
        return error(refreshes)

    start = every(12, 3)
    assert improved(start, 12, 6, counted, 100) == wanted
    assert all(len(r) == 4 and r[0] == 0 for r in asked)
    assert len(set(asked)) == len(asked)
    assert error(improved(start, 12, 6, error, 2)).mean() <= error(start).mean()
    assert improved(start, 12, 3, error, 100) == start  # no room within the longest group


def test_a_good_guess_of_the_error_needs_few_runs() -> None:
    wanted = (0, 2, 5, 8, 12)

    def distance(refreshes: tuple[int, ...]) -> float:
        return float(sum(abs(a - b) for a, b in zip(refreshes, wanted, strict=True)))

    assert improved((0, 3, 6, 9, 12), 15, 6, lambda r: np.full(2, distance(r)), 1, distance) == wanted


def test_a_gain_within_the_spread_of_the_samples_moves_nothing() -> None:
    start, spread = every(6, 3), np.array([-1.0, 1.0, -1.0, 1.0])

    def error(refreshes: tuple[int, ...]) -> np.ndarray:
        return np.ones(4) if refreshes == start else 0.9 + spread

    assert improved(start, 6, 6, error, 100) == start


def test_shifts_keep_the_number_of_refreshes_and_change_two_groups() -> None:
    start, found = every(8, 2), shifted(every(8, 2), 8, 3)
    assert (0, 1, 3, 5) in found
    assert (0, 1, 4, 6) in found
    assert len(set(found)) == len(found)
    for moved in found:
        groups = [np.diff((*schedule, 8)) for schedule in (start, moved)]
        assert sorted(abs(groups[1] - groups[0]))[-3:] == [0, 1, 1]
    assert shifted((0,), 8, 8) == []
