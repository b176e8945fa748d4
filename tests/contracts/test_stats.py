from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from numpy.typing import NDArray

from quantempo.contracts.stats import BINS, CHUNK, TensorStats, bin_exponent

RNG = np.random.default_rng(3)


def _same(a: TensorStats, b: TensorStats) -> bool:
    return (a.count, a.low, a.high, a.exponent, a.first) == (b.count, b.low, b.high, b.exponent, b.first) and bool(
        np.array_equal(a.counts, b.counts)
    )


def _reference(x: NDArray[np.float32], exponent: int) -> dict[int, int]:
    index = np.floor(np.ldexp(x.astype(np.longdouble), -exponent)).astype(np.int64)
    return {int(i): int(n) for i, n in zip(*np.unique(index, return_counts=True), strict=True)}


CASES = {
    "gaussian": RNG.standard_normal(5000),
    "one": np.array([0.3]),
    "zero": np.zeros(5),
    "constant": np.full(9, -7.25),
    "offset": 1000 + RNG.standard_normal(900) * 1e-3,
    "wide": np.concatenate([RNG.standard_normal(100) * 1e-6, RNG.standard_normal(100) * 1e6]),
    "powers": np.array([-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0]),
    "tiny": RNG.standard_normal(300) * 1e-30,
    "huge": np.array([-3e38, 1.0, 3e38]),
    "just_below": np.nextafter(np.float32([1.0, -1.0, 2.0]), np.float32(0)),
    "several_chunks": RNG.laplace(size=2 * CHUNK + 77),
    "exact_chunk": RNG.laplace(size=CHUNK),
}


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_exact_arithmetic(name: str) -> None:
    x = CASES[name].astype(np.float32)
    stats = TensorStats.of(x)
    counted = {stats.first + i: int(n) for i, n in enumerate(stats.counts) if n}
    assert counted == _reference(x, stats.exponent)
    assert len(stats.counts) <= BINS
    assert stats.count == x.size == stats.counts.sum()
    assert (stats.low, stats.high) == (x.min(), x.max())
    assert stats.total == pytest.approx(float(x.astype(np.longdouble).sum()), rel=1e-12, abs=1e-12)
    assert stats.total_square == pytest.approx(float((x.astype(np.longdouble) ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "offset", "wide", "several_chunks"])
def test_merging_parts_equals_the_whole_in_any_order(name: str) -> None:
    x = CASES[name].astype(np.float32)
    whole = TensorStats.of(x)
    parts = [TensorStats.of(part) for part in np.array_split(np.sort(x), 7)]
    for order in (range(7), reversed(range(7)), RNG.permutation(7)):
        assert _same(reduce(TensorStats.merge, [parts[i] for i in order]), whole)
    left = reduce(TensorStats.merge, parts[:3]).merge(reduce(TensorStats.merge, parts[3:]))
    assert _same(left, whole)


def test_shape_does_not_matter_but_values_do() -> None:
    x = RNG.standard_normal((4, 5, 6)).astype(np.float32)
    assert _same(TensorStats.of(x), TensorStats.of(x.reshape(-1)))
    assert _same(TensorStats.of(x.transpose(2, 0, 1)), TensorStats.of(x))
    assert not _same(TensorStats.of(x), TensorStats.of(x * 2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = np.zeros(100, np.float32)
    x[57] = bad
    with pytest.raises(ValueError, match="finite"):
        TensorStats.of(x)


def test_an_empty_array_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TensorStats.of(np.zeros((0, 3), np.float32))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 512.0), (0.0, 511.99), (-3e-5, 7.0), (99.0, 100.0)])
def test_bin_width_is_the_smallest_that_fits(low: float, high: float) -> None:
    def bins(exponent: int) -> int:
        return int(np.floor(np.ldexp(high, -exponent)) - np.floor(np.ldexp(low, -exponent))) + 1

    exponent = bin_exponent(low, high)
    assert bins(exponent) <= BINS < bins(exponent - 1)


def test_centres_lie_within_the_range_and_give_the_mean() -> None:
    x = RNG.standard_normal(20000).astype(np.float32)
    stats = TensorStats.of(x)
    centres = stats.centres()
    assert centres.min() >= stats.low
    assert centres.max() <= stats.high
    assert float(centres @ stats.counts / stats.count) == pytest.approx(float(x.mean()), abs=stats.width)
