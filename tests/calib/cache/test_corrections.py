from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quantempo.calib.cache.corrections import (
    CorrectionFit,
    Estimate,
    VarianceFit,
    estimate_affine,
    estimate_match,
    estimate_offset,
    estimate_prediction,
)
from quantempo.calib.cache.moments import PairedMoments, merged
from quantempo.errors import CalibrationError

Floats = NDArray[np.float64]
ALL: dict[str, Estimate] = {"affine": estimate_affine, "offset": estimate_offset, "prediction": estimate_prediction}
SAMPLES = range(16)


def _data(seed: int = 0, rows: int = 16, channels: int = 3) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, channels, 4, 4))


def _fit(x: Floats, y: Floats, estimates: dict[str, Estimate] = ALL, calls: int = 1) -> CorrectionFit:
    fit = CorrectionFit(calls, x.shape[1])
    fit.observe(0, x, y, range(len(x)))
    return fit


def _per_channel(values: list[float]) -> Floats:
    return np.array(values)[:, None, None]


def test_moments_merged_batch_by_batch_are_those_of_everything() -> None:
    x, y = _data(1) + 1000, _data(2)
    parts = [PairedMoments.of(x[i : i + 5], y[i : i + 5]) for i in range(0, 16, 5)]
    together, whole = merged(parts), PairedMoments.of(x, y)
    for field in ("weight", "mean_x", "mean_y", "xx", "xy", "yy"):
        np.testing.assert_allclose(getattr(together, field), getattr(whole, field), rtol=1e-9)
    np.testing.assert_allclose(whole.xx, ((x - x.mean(axis=(0, 2, 3), keepdims=True)) ** 2).sum(axis=(0, 2, 3)))


def test_squared_error_from_moments_is_that_of_the_data() -> None:
    x, y = _data(1), _data(2)
    gain, bias = np.array([0.5, 1.0, -2.0]), np.array([0.1, 0.0, 3.0])
    wanted = ((y - gain[:, None, None] * x - bias[:, None, None]) ** 2).sum(axis=(0, 2, 3))
    np.testing.assert_allclose(PairedMoments.of(x, y).squared_error(gain, bias), wanted, rtol=1e-12)


def test_an_affine_relation_is_recovered_exactly() -> None:
    x = _data()
    gain, bias = [1.5, 0.25, -2.0], [0.5, -3.0, 0.125]  # exact in binary, so that float32 vectors can hold them
    found = _fit(x, _per_channel(gain) * x + _per_channel(bias)).fit({"affine": estimate_affine})
    np.testing.assert_array_equal(found.gain[0], np.float32(gain))
    np.testing.assert_allclose(found.bias[0], bias, atol=1e-12)
    assert found.after[0] < 1e-14 < found.before[0]


@pytest.mark.parametrize("name", [*ALL, "match"])
def test_equal_tensors_give_the_exact_identity(name: str) -> None:
    x = _data(3) * 1e3 + 17
    estimates: dict[str, Estimate] = {**ALL, "match": estimate_match}
    moments = PairedMoments.of(x, x.copy())
    gain, bias = estimates[name](moments)
    np.testing.assert_array_equal(gain, np.ones(3))
    np.testing.assert_array_equal(bias, np.zeros(3))
    found = _fit(x, x.copy()).fit({name: estimates[name]})
    assert found.identity(0)
    assert found.kept == 0
    np.testing.assert_array_equal(found.gain, np.ones((1, 3), np.float32))


def test_residual_is_at_most_the_uncorrected_one_per_channel() -> None:
    for seed in range(20):
        x = _data(seed)
        y = 0.9 * x + np.random.default_rng(seed + 99).standard_normal(x.shape) + 0.05
        fit = _fit(x, y)
        whole = fit.moments(0)
        assert whole is not None
        uncorrected = whole.squared_error(np.ones(3), np.zeros(3))
        assert np.all(whole.squared_error(*estimate_affine(whole)) <= uncorrected)
        kept = fit.fit(ALL)
        residual = whole.squared_error(kept.gain[0].astype(np.float64), kept.bias[0].astype(np.float64))
        assert np.all(residual <= uncorrected * (1 + 1e-6))


def test_corrections_that_do_not_generalise_are_dropped() -> None:
    """Where each sample has its own offset, a fit of few samples sees a bias that is not there."""
    hits = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((8, 3, 4, 4))
        y = x + rng.standard_normal((8, 1, 1, 1))
        fit = CorrectionFit(1, 3)
        fit.observe(0, x, y, range(8))
        found = fit.fit(ALL)
        fresh = rng.standard_normal((400, 3, 4, 4))
        wanted = fresh + rng.standard_normal((400, 1, 1, 1))
        guarded = PairedMoments.of(fresh, wanted).squared_error(
            found.gain[0].astype(np.float64), found.bias[0].astype(np.float64)
        )
        moments = fit.moments(0)
        assert moments is not None
        unguarded = PairedMoments.of(fresh, wanted).squared_error(*estimate_affine(moments))
        hits += int(guarded.sum() <= unguarded.sum())
        assert found.after[0] <= found.before[0]
    assert hits == 30


def test_ptqd_restores_a_gain_and_a_bias() -> None:
    y = _data(4)
    x = 1.25 * y + _per_channel([0.5, -0.25, 2.0])
    found = _fit(x, y).fit({"prediction": estimate_prediction})
    np.testing.assert_allclose(found.gain[0][:, None, None] * x + found.bias[0][:, None, None], y, atol=1e-5)
    np.testing.assert_allclose(found.gain[0], 0.8, rtol=1e-6)
    shrunk = PairedMoments.of(0.8 * y, y)
    np.testing.assert_array_equal(estimate_prediction(shrunk)[0], np.ones(3))  # k is never negative


def test_offset_leaves_the_gain() -> None:
    x = _data(5)
    gain, bias = estimate_offset(PairedMoments.of(x, 2 * x + 1))
    np.testing.assert_array_equal(gain, np.ones(3))
    np.testing.assert_allclose(bias, x.mean(axis=(0, 2, 3)) + 1)


def test_a_constant_channel_is_shifted_not_scaled() -> None:
    x, y = np.full((8, 2, 2, 2), 3.0), _data(6, 8, 2)[:, :, :2, :2]
    gain, bias = estimate_affine(PairedMoments.of(x, y))
    np.testing.assert_array_equal(gain, np.ones(2))
    np.testing.assert_allclose(bias + 3.0, y.mean(axis=(0, 2, 3)))


def test_calls_and_branches_are_kept_apart_and_merged_fits_are_one() -> None:
    x = _data(7)
    both = CorrectionFit(3, 3)
    both.observe(0, x, x + 1, SAMPLES)
    both.observe(2, x, x - 1, SAMPLES)
    halves = [CorrectionFit(3, 3) for _ in range(2)]
    for half, rows in zip(halves, (slice(0, 8), slice(8, 16)), strict=True):
        half.observe(0, x[rows], x[rows] + 1, SAMPLES[rows])
        half.observe(2, x[rows], x[rows] - 1, SAMPLES[rows])
    for fit in (both, halves[0].merge(halves[1])):
        bias = fit.fit({"offset": estimate_offset}).bias
        np.testing.assert_allclose(bias, np.array([[1.0], [0.0], [-1.0]]).repeat(3, axis=1), atol=1e-6)


def test_channels_may_be_the_last_axis() -> None:
    x = _data(8).transpose(0, 2, 3, 1)
    fit = CorrectionFit(1, 3, axis=-1)
    fit.observe(0, x, x + np.array([1.0, 2.0, 3.0]), SAMPLES)
    np.testing.assert_allclose(fit.fit(ALL).bias[0], [1, 2, 3], rtol=1e-6)


def test_non_finite_tensors_and_single_folds_are_refused() -> None:
    x = _data(9)
    bad = x.copy()
    bad[3, 1, 0, 0] = np.nan
    with pytest.raises(CalibrationError, match="call 0"):
        _fit(bad, x)
    with pytest.raises(CalibrationError, match="1 folds"):
        CorrectionFit(1, 3, folds=1)


# ------------------------------------------------------------------------------------------------- variance correction


def _variance_fit(x: Floats, y: Floats) -> VarianceFit:
    fit = VarianceFit(y.var(axis=(0, 2, 3))[None])
    for rows in (slice(0, 6), slice(6, 16)):
        fit.observe(0, x[rows], y[rows], SAMPLES[rows])
    return fit


@pytest.mark.parametrize("method", ["lsq", "match", "auto"])
def test_variance_correction_undoes_a_contraction_exactly(method: str) -> None:
    y = _data(10)
    mean = y.mean(axis=(0, 2, 3), keepdims=True)
    contraction = _per_channel([2.0, 4.0, 0.5])
    x = mean + (y - mean) / contraction
    found = _variance_fit(x, y).fit(method)
    np.testing.assert_allclose(found.gain[0], contraction.ravel(), rtol=1e-6)
    np.testing.assert_allclose(found.gain[0][:, None, None] * x + found.bias[0][:, None, None], y, atol=1e-5)


@pytest.mark.parametrize("method", ["lsq", "match", "auto"])
def test_variance_correction_of_equal_latents_is_the_identity(method: str) -> None:
    y = _data(11) + 0.3
    found = _variance_fit(y.copy(), y).fit(method)
    np.testing.assert_allclose(found.gain, 1.0, rtol=1e-12)
    np.testing.assert_allclose(found.bias, 0.0, atol=1e-12)


def test_least_squares_shrinks_where_matching_lands_on_the_variance() -> None:
    rng = np.random.default_rng(12)
    y = rng.standard_normal((4096, 1, 2, 2))
    x = 1.2 * y + 0.3 * rng.standard_normal(y.shape)
    fit = VarianceFit(y.var(axis=(0, 2, 3))[None])
    fit.observe(0, x, y, range(4096))
    shrunk, matched = fit.gains(0, "lsq")[0] * x, fit.gains(0, "match")[0] * x
    assert shrunk.var() < 0.9 * y.var()
    assert matched.var() == pytest.approx(y.var(), rel=1e-3)
    rho = np.corrcoef(x.ravel(), y.ravel())[0, 1]
    # Without weights the slope would be rho·sigma'/sigma; the weight takes more off still.
    assert fit.gains(0, "lsq")[0] < rho * y.std() / x.std()


def test_held_out_choice_keeps_one_where_neither_method_helps() -> None:
    rng = np.random.default_rng(13)
    y = rng.standard_normal((16, 2, 4, 4))
    # The noise is independent of the latents: matching scales the signal away, least squares (unweighted error) helps.
    x = y + 0.02 * rng.standard_normal(y.shape) * np.array([0.0, 1.0])[:, None, None]
    found = _variance_fit(x, y).fit("auto")
    assert found.chosen[0, 0] == "identity"
    assert found.gain[0, 0] == 1.0
    assert np.all(found.after <= found.before)
