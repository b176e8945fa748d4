"""Mergeable statistics of one tensor.

The histogram’s bins are absolute: bin `i` covers `[i·2^e, (i+1)·2^e)`.  `e` is the smallest exponent at which the
data’s range fits `BINS` bins, so it follows from minimum and maximum alone; coarsening (`i → i >> 1`) loses only
resolution.  Merging is therefore associative and independent of order, to the last bit of the counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 512
MIN_EXPONENT = -60


@dataclass(frozen=True)
class StatsKey:
    """Which cell: tensor, group key (the call's timestep as a float) and branch (`""` where branches share a call)."""

    graph: str
    tensor: str
    key: float
    branch: str = ""


@dataclass(frozen=True, eq=False)
class TensorStats:
    """Range, moments and histogram of all values seen in one cell.

    Args:
        count: number of values.
        low, high: smallest and largest value.
        total, total_square: sums in float64.
        exponent: bin width is `2 ** exponent`.
        first: absolute index of `counts[0]`.
        counts: uint64, at most `BINS` long.
    """

    count: int
    low: float
    high: float
    total: float
    total_square: float
    exponent: int
    first: int
    counts: NDArray[np.uint64]

    @staticmethod
    def of(values: NDArray[np.float32]) -> TensorStats:
        """Statistics of an array; all values must be finite and there must be at least one."""
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("values must be finite")
        exponent = bin_exponent(low, high)
        first = math.floor(math.ldexp(low, -exponent))
        # Scaling by a power of two is exact in float32 (subnormals apart), so the index is that of the exact value.
        index = np.floor(flat * np.float32(math.ldexp(1.0, -exponent))).astype(np.int32)
        counts = np.bincount(index - first, minlength=1).astype(np.uint64)
        wide = flat.astype(np.float64)
        return TensorStats(flat.size, low, high, float(wide.sum()), float(wide @ wide), exponent, first, counts)

    def merge(self, other: TensorStats) -> TensorStats:
        """Statistics of both sets of values together."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent = bin_exponent(low, high)
        first = math.floor(math.ldexp(low, -exponent))
        last = math.floor(math.ldexp(high, -exponent))
        counts = np.zeros(last - first + 1, np.uint64)
        for part in (self, other):
            index = (np.arange(len(part.counts), dtype=np.int64) + part.first) >> (exponent - part.exponent)
            np.add.at(counts, index - first, part.counts)
        return TensorStats(
            self.count + other.count, low, high, self.total + other.total, self.total_square + other.total_square,
            exponent, first, counts,
        )

    def centres(self) -> NDArray[np.float64]:
        """The middle of each bin, clipped to the observed range."""
        middle = (np.arange(len(self.counts)) + (self.first + 0.5)) * math.ldexp(1.0, self.exponent)
        clipped: NDArray[np.float64] = np.clip(middle, self.low, self.high)
        return clipped

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)


def bin_exponent(low: float, high: float) -> int:
    """The smallest exponent at which `[low, high]` touches at most `BINS` bins."""
    span = max(high - low, max(abs(low), abs(high)) * 2.0**-20)
    exponent = MIN_EXPONENT if span == 0 else max(MIN_EXPONENT, math.frexp(span / BINS)[1] - 2)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent
