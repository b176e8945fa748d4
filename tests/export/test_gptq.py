"""Rounding with compensation: never worse than plain rounding, and equal to it where nothing can be compensated."""

from __future__ import annotations

import numpy as np
import pytest

from quantempo.errors import CalibrationError
from quantempo.export.gptq import compensated_rounding, output_error

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((160, 24)).astype(np.float32)
SCALE = (np.abs(WEIGHT).max(axis=0) / 127).astype(np.float32)


def plain(weight: np.ndarray, scale: np.ndarray, limit: int = 127) -> np.ndarray:
    return np.clip(np.rint(weight.astype(np.float64) / scale.astype(np.float64)), -limit, limit)


def correlated_activations(rows: int = 2000) -> np.ndarray:
    mixing = RNG.standard_normal((12, 160)) + 0.1 * RNG.standard_normal((1, 160))
    return RNG.standard_normal((rows, 12)) @ mixing + 0.05 * RNG.standard_normal((rows, 160))


def test_independent_channels_of_equal_power_give_plain_rounding() -> None:
    gram = 7.0 * np.eye(160)
    assert np.array_equal(compensated_rounding(WEIGHT, gram, SCALE, 127), plain(WEIGHT, SCALE))


def test_output_error_is_at_most_that_of_plain_rounding_in_every_channel() -> None:
    x = correlated_activations()
    gram = x.T @ x
    steps = WEIGHT.astype(np.float64) / SCALE
    found = output_error(steps - compensated_rounding(WEIGHT, gram, SCALE, 127), gram)
    naive = output_error(steps - plain(WEIGHT, SCALE), gram)
    assert np.all(found <= naive)


def test_correlated_activations_gain_much() -> None:
    data = correlated_activations(2500)
    x, held_out = data[:2000], data[2000:]
    integers = compensated_rounding(WEIGHT, x.T @ x, SCALE, 127)
    error = held_out @ (integers * SCALE - WEIGHT)
    naive = held_out @ (plain(WEIGHT, SCALE) * SCALE - WEIGHT)
    assert np.mean(error**2) < 0.25 * np.mean(naive**2)


def test_factor_of_the_gram_matrix_does_not_matter() -> None:
    x = correlated_activations()
    gram = x.T @ x
    first = compensated_rounding(WEIGHT, gram, SCALE, 127)
    assert np.array_equal(first, compensated_rounding(WEIGHT, gram * 2.0**-10, SCALE, 127))


def test_narrow_formats_stay_within_their_limit() -> None:
    x = correlated_activations()
    integers = compensated_rounding(WEIGHT, x.T @ x, SCALE * np.float32(127 / 7), 7)
    assert integers.min() >= -7
    assert integers.max() <= 7


def test_dead_inputs_are_survived() -> None:
    integers = compensated_rounding(WEIGHT, np.zeros((160, 160)), SCALE, 127)
    assert np.array_equal(integers, plain(WEIGHT, SCALE))


@pytest.mark.parametrize("gram", [np.eye(3), np.full((160, 160), np.nan)])
def test_a_gram_matrix_that_does_not_fit_is_refused(gram: np.ndarray) -> None:
    with pytest.raises(CalibrationError, match="statistics of another tensor or model"):
        compensated_rounding(WEIGHT, gram, SCALE, 127)
