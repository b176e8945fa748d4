from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from quantempo.calib.ranges import METHODS, Moments, clip, ends, method_named, minmax, quantization_error, quantizer_for
from quantempo.contracts.stats import TensorStats
from quantempo.errors import RequestError

RNG = np.random.default_rng(7)


def _silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / (1 + np.exp(-x))


DATA: dict[str, NDArray[np.float32]] = {
    name: values.astype(np.float32)
    for name, values in {
        "gaussian": RNG.standard_normal(30000) * 1.7 + 0.3,
        "silu": _silu(RNG.standard_normal(30000) * 2),
        "laplace": RNG.laplace(size=30000),
        "student": RNG.standard_t(3, 30000),
        "negative": -np.abs(RNG.standard_normal(30000)),
        "uniform": RNG.uniform(-1, 3, 30000),
    }.items()
}
DEGENERATE = {
    "zero": np.zeros(64, np.float32),
    "constant": np.full(64, 3.7, np.float32),
    "minus_constant": np.full(64, -3.7, np.float32),
    "one_value": np.array([1e-30], np.float32),
    "far_offset": (RNG.standard_normal(500) * 1e-3 + 1000).astype(np.float32),
    "two_values": np.array([-2.0, 5.0] * 20, np.float32),
    "huge": np.array([-3e38, 3e38, 0.0], np.float32),
}


def _true_error(x: NDArray[np.float32], scale: float, point: int, bits: int) -> float:
    q = np.clip(np.rint(x.astype(np.float64) / scale) + point, 0, 2**bits - 1)
    return float(np.mean((x - (q - point) * scale) ** 2))


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", DATA)
def test_error_from_the_histogram_is_that_of_the_data(name: str, symmetric: bool, bits: int) -> None:
    x = DATA[name]
    stats = TensorStats.of(x)
    for low, high in (minmax(stats, bits, symmetric), (stats.low * 0.4, stats.high * 0.6)):
        scale, point = quantizer_for(low, high, bits, symmetric)
        estimate = quantization_error(stats, float(scale), point, bits)
        assert estimate == pytest.approx(_true_error(x, float(scale), point, bits), rel=0.1)


def test_error_counts_values_that_lie_on_the_last_border() -> None:
    stats = TensorStats.of(np.array([0.0] * 30 + [1.0] * 30, np.float32))
    scale, point = quantizer_for(0.0, 0.5, 8, False)
    assert quantization_error(stats, float(scale), point, 8) == pytest.approx(0.125, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", [*DATA, *DEGENERATE])
def test_every_method_gives_a_legal_quantizer_in_which_zero_is_exact(name: str, symmetric: bool, method: str) -> None:
    stats = TensorStats.of({**DATA, **DEGENERATE}[name])
    for bits in (8, 4):
        low, high = METHODS[method](stats, bits, symmetric)
        scale, point = quantizer_for(low, high, bits, symmetric)
        assert low <= 0.0 <= high
        assert scale.dtype == np.float32
        assert np.isfinite(scale)
        assert scale > 0
        assert np.isfinite(np.float32(1) / scale)
        assert 0 <= point <= 2**bits - 1
        if symmetric:
            assert point == 2 ** (bits - 1)
        assert np.isfinite(quantization_error(stats, float(scale), point, bits))


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", DATA)
def test_two_sided_clip_is_never_worse_than_mse_and_mse_never_worse_than_minmax(
    name: str, symmetric: bool, bits: int
) -> None:
    stats = TensorStats.of(DATA[name])
    error = {}
    for method in ("minmax", "mse", "clip"):
        scale, point = quantizer_for(*METHODS[method](stats, bits, symmetric), bits, symmetric)
        error[method] = quantization_error(stats, float(scale), point, bits)
    assert error["clip"] <= error["mse"] <= error["minmax"]


@pytest.mark.parametrize("name", ["gaussian", "silu", "laplace", "student"])
def test_clip_comes_close_to_an_exhaustive_search(name: str) -> None:
    x = DATA[name]
    stats = TensorStats.of(x)
    scale, point = quantizer_for(*clip(stats, 6, False), 6, False)
    found = _true_error(x, float(scale), point, 6)
    best = min(
        _true_error(x, float(s), z, 6)
        for low in stats.low * np.linspace(0.05, 1, 40)
        for high in stats.high * np.linspace(0.05, 1, 40)
        for s, z in [quantizer_for(low, high, 6, False)]
    )
    assert found <= best * 1.02


def test_clipping_gains_more_on_heavier_tails() -> None:
    def gain(name: str) -> float:
        stats = TensorStats.of(DATA[name])
        errors = []
        for method in (minmax, clip):
            scale, point = quantizer_for(*method(stats, 6, False), 6, False)
            errors.append(quantization_error(stats, float(scale), point, 6))
        return errors[0] / errors[1]

    assert gain("student") > gain("laplace") > gain("gaussian") > gain("uniform") * 1.05


def test_uniform_data_is_not_clipped_by_entropy() -> None:
    stats = TensorStats.of(DATA["uniform"])
    low, high = METHODS["entropy"](stats, 6, False)
    assert low == pytest.approx(-1, abs=0.1)
    assert high == pytest.approx(3, abs=0.1)


def test_entropy_cuts_a_thin_tail_and_keeps_the_body() -> None:
    body = RNG.standard_normal(50000)
    stats = TensorStats.of(np.concatenate([body, [40.0]]).astype(np.float32))
    low, high = METHODS["entropy"](stats, 6, False)
    assert 3 < high < 25
    assert low <= -3


def test_percentile_takes_quantiles_of_both_sides() -> None:
    x = np.concatenate([RNG.uniform(-1, 1, 99900), [500.0] * 20]).astype(np.float32)
    low, high = METHODS["percentile"](TensorStats.of(x), 8, False)
    assert low == pytest.approx(-1, abs=1.1)
    assert high in (pytest.approx(1, abs=2), pytest.approx(500, abs=2))


@pytest.mark.parametrize("name", DATA)
def test_search_model_agrees_with_the_exact_error(name: str) -> None:
    stats = TensorStats.of(DATA[name])
    for shrink in (1.0, 0.7, 0.4):
        scale, point = quantizer_for(stats.low * shrink, stats.high * shrink, 8, False)
        step = np.array([float(scale)])
        low, high = ends(step, np.array([float(point)]), 8)
        model = Moments.of(stats).errors(low, high, step)[0]
        assert model == pytest.approx(quantization_error(stats, float(scale), point, 8), rel=0.1)


def test_zero_point_is_rounded_before_candidates_are_compared() -> None:
    scale, point = quantizer_for(-0.1, 1.0, 4, False)
    assert point == round(0.1 / float(scale))
    assert float(scale) == pytest.approx(1.1 / 15)


def test_symmetric_scale_uses_the_longer_negative_side() -> None:
    assert float(quantizer_for(-1.0, 0.5, 8, True)[0]) == pytest.approx(1 / 128)
    assert float(quantizer_for(-0.5, 1.0, 8, True)[0]) == pytest.approx(1 / 127)


def test_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="did you mean 'entropy'"):
        method_named("entrpy")


def test_a_method_is_a_pure_function(method_calls: Callable[[], list[tuple[float, float]]]) -> None:
    assert method_calls() == method_calls()


@pytest.fixture
def method_calls() -> Callable[[], list[tuple[float, float]]]:
    stats = TensorStats.of(DATA["laplace"])
    return lambda: [method(stats, 8, symmetric) for method in METHODS.values() for symmetric in (False, True)]
