from __future__ import annotations

import numpy as np

from quantempo.calib.cache.comparison import better, clearly_lower, clearly_lower_in_decibels


def test_equal_errors_are_not_lower() -> None:
    assert clearly_lower(np.zeros(4), np.ones(4))
    assert not clearly_lower(np.ones(4), np.ones(4))


def test_in_decibels_one_bad_sample_does_not_decide_alone() -> None:
    other = np.ones(16)
    one = np.where(np.arange(16) == 3, 12.0, 0.5)
    assert not clearly_lower(one, other)
    assert clearly_lower_in_decibels(one, other)
    assert not clearly_lower_in_decibels(other, one)
    assert not clearly_lower_in_decibels(other, other)


def test_a_lower_mean_that_may_be_chance_is_no_reason_to_correct() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(1, 2, 32)
    assert better(0.9 * before, before)
    assert not better(before, before)
    assert not better(1.1 * before, before)
    chance = before + rng.normal(0, 0.5, 32)
    chance += before.mean() - chance.mean() - 0.01
    assert chance.mean() < before.mean()
    assert not better(chance, before)


def test_one_sample_with_a_large_error_does_not_hide_that_all_others_are_better() -> None:
    before = np.r_[np.full(31, 1e-4), 1.0]
    after = np.r_[np.full(31, 0.5e-4), 1.0]
    assert better(after, before)
    assert not better(np.r_[after[:31], 1.01], before)  # decibels alone are not enough: the mean has to fall
