"""Mergeable statistics of one tensor.

The histogram's bins are absolute: bin `i` covers `[i·2^e, (i+1)·2^e)`.  `e` is the smallest exponent at which the
data's range fits `BINS` bins, so it follows from minimum and maximum alone; coarsening (`i → i >> 1`) loses only
resolution.  Merging is therefore associative and independent of order, to the last bit of the counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 512
MIN_EXPONENT = -60
CHUNK = 32768
DOT = 8192


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
        channels: float32 `[2, channels]`, the smallest and largest value of each channel (the last axis); `None` where
            channels were not asked for.
    """

    count: int
    low: float
    high: float
    total: float
    total_square: float
    exponent: int
    first: int
    counts: NDArray[np.uint64]
    channels: NDArray[np.float32] | None = None

    @staticmethod
    def of(values: NDArray[np.float32], channels: bool = False) -> TensorStats:
        """Statistics of an array.

        One pass for the range and one for the rest, in chunks that stay in the second-level cache, because this runs
        on every tapped tensor of every denoiser call.  Sums are taken chunk by chunk, so that equal arrays give equal
        bits whatever the number of threads.

        Args:
            values: any shape, at least one value; converted to float32.
            channels: whether to keep the range of each channel too.

        Raises:
            ValueError: a value is not finite, or there is none.
        """
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        if not flat.size:
            raise ValueError("values must not be empty")
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("values must be finite")
        exponent = bin_exponent(low, high)
        first = math.floor(math.ldexp(low, -exponent))
        bins = math.floor(math.ldexp(high, -exponent)) - first + 1
        counts, total, total_square = _reduce(flat, exponent, first, bins)
        ranges = None
        if channels:
            rows = flat.reshape(-1, values.shape[-1])
            ranges = np.stack([rows.min(0), rows.max(0)])
        return TensorStats(flat.size, low, high, total, total_square, exponent, first, counts, ranges)

    def merge(self, other: TensorStats) -> TensorStats:
        """Statistics of both sets of values together; ranges of channels only where both have them."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent = bin_exponent(low, high)
        first = math.floor(math.ldexp(low, -exponent))
        last = math.floor(math.ldexp(high, -exponent))
        counts = np.zeros(last - first + 1, np.uint64)
        for part in (self, other):
            _add_coarsened(counts, first, part, exponent)
        return TensorStats(
            self.count + other.count, low, high, self.total + other.total, self.total_square + other.total_square,
            exponent, first, counts, _merge_channels(self.channels, other.channels),
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


def _reduce(
    flat: NDArray[np.float32], exponent: int, first: int, bins: int
) -> tuple[NDArray[np.uint64], float, float]:
    """Counts, sum and sum of squares of a flat array whose bin indices are known to be `first .. first + bins - 1`."""
    size = min(CHUNK, flat.size)
    scaled, index32, index = np.empty(size, np.float32), np.empty(size, np.int32), np.empty(size, np.int64)
    wide = index.view(np.float64)  # one memory for both: each is done before the other begins
    inverse, origin = np.float32(math.ldexp(1.0, -exponent)), np.float32(first)
    counts = np.zeros(bins, np.int64)
    total = total_square = 0.0
    for start in range(0, flat.size, size):
        chunk = flat[start : start + size]
        if len(chunk) < size:
            n = len(chunk)
            scaled, index32, index, wide = scaled[:n], index32[:n], index[:n], wide[:n]
        # Scaling by a power of two is exact in float32 (subnormals apart), and so is the difference of two whole
        # numbers less than BINS apart: the index is that of the exact value.
        np.multiply(chunk, inverse, out=scaled)
        np.floor(scaled, out=scaled)
        np.subtract(scaled, origin, out=scaled)
        # Two vectorised conversions take half the time of float32 to int64 at once.
        np.copyto(index32, scaled, casting="unsafe")
        np.copyto(index, index32)
        counts += np.bincount(index, minlength=bins)
        np.copyto(wide, chunk)
        total += float(wide.sum())
        for part in range(0, len(wide), DOT):
            total_square += float(wide[part : part + DOT] @ wide[part : part + DOT])
    return counts.astype(np.uint64), total, total_square


def _merge_channels(
    mine: NDArray[np.float32] | None, other: NDArray[np.float32] | None
) -> NDArray[np.float32] | None:
    if mine is None or other is None:
        return None
    return np.stack([np.minimum(mine[0], other[0]), np.maximum(mine[1], other[1])])


def _add_coarsened(counts: NDArray[np.uint64], first: int, part: TensorStats, exponent: int) -> None:
    """Add the counts of `part` to `counts`, whose bins have the width `2 ** exponent` and start at index `first`."""
    shift = exponent - part.exponent
    if shift == 0:
        at = part.first - first
        counts[at : at + len(part.counts)] += part.counts
        return
    index = (np.arange(len(part.counts), dtype=np.int64) + part.first) >> shift
    np.add.at(counts, index - first, part.counts)


def bin_exponent(low: float, high: float) -> int:
    """The smallest exponent at which `[low, high]` touches at most `BINS` bins."""
    span = max(high - low, max(abs(low), abs(high)) * 2.0**-20)
    exponent = MIN_EXPONENT if span == 0 else max(MIN_EXPONENT, math.frexp(span / BINS)[1] - 2)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent
