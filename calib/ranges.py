"""Range methods: from the statistics of a tensor to the interval that its quantizer covers.

A method is a pure function `(stats, bits, symmetric) -> (low, high)` on a histogram; no model is in reach.  All methods
share one quantizer, `quantizer_for`: `q = clip(round(x / scale) + zero_point, 0, 2^bits - 1)` with an integer zero
point, so that zero (padding, masked tokens) is represented exactly.  Searches compare candidates *after* the zero point
has been rounded, with the same error that `quantization_error` reports.

To add a method, write one function and add one line to `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.stats import TensorStats
from quantempo.errors import RequestError, nearest

Floats = NDArray[np.float64]
RangeMethod = Callable[[TensorStats, int, bool], tuple[float, float]]

PERCENTILES = (99.9, 99.99, 99.999)
SHRINK = 1.0 - np.arange(80) / 100.0
FINE_SHRINK = 1.0 - np.arange(190) / 200.0
SPREAD = 1.0 - np.arange(20) / 20.0
FINE = np.linspace(-1.0, 1.0, 9) / 20.0
KL_LEAST_BINS = 32
KL_SHRINK = 1.0 - np.arange(24) / 25.0
SCALE_FLOOR = 1e-12
"""No scale is smaller: a constant zero tensor still needs a divisor, and 1/scale must stay a normal float32."""


# ---------------------------------------------------------------------------------------------- quantizer and its error


def quantizer_for(low: float, high: float, bits: int, symmetric: bool) -> tuple[np.float32, int]:
    """Scale and zero point that cover `[low, high]`.

    Asymmetric: `scale = (high - low) / (2^bits - 1)` and `zero_point = round(-low / scale)`, after zero was included in
    the range.  Symmetric: the zero point is `2^(bits-1)`, and the scale is the smallest that reaches both ends; the
    negative side has one step more.

    Args:
        low: lower end of the interval to cover.
        high: upper end.
        bits: 2 to 16.
        symmetric: fix the zero point to the middle.

    Returns:
        scale (float32, at least `SCALE_FLOOR`) and zero point in `0 .. 2^bits - 1`.
    """
    scales, points = _quantizers(np.array([low]), np.array([high]), bits, symmetric)
    return np.float32(scales[0]), int(points[0])


def _quantizers(low: Floats, high: Floats, bits: int, symmetric: bool) -> tuple[Floats, Floats]:
    """`quantizer_for` for arrays of intervals; scales are float32 values held in float64."""
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    top, middle = float(2**bits - 1), float(2 ** (bits - 1))
    reach = np.maximum(high / (middle - 1), -low / middle) if symmetric else (high - low) / top
    scale = np.maximum(reach, SCALE_FLOOR).astype(np.float32).astype(np.float64)
    if symmetric:
        return scale, np.full(scale.shape, middle)
    return scale, np.clip(np.round(-low / scale), 0.0, top)


def quantization_error(stats: TensorStats, scale: float, zero_point: int, bits: int) -> float:
    """Mean squared error of quantizing what the histogram describes.

    Exact under one assumption, that values lie evenly within each bin: the squared rounding error is integrated in
    closed form, steps and clipped tails alike, however bins and steps align.

    Args:
        stats: what is quantized.
        scale: step, above zero.
        zero_point: stored integer that means zero.
        bits: the stored integers are `0 .. 2^bits - 1`.
    """
    return float(_errors(stats, np.array([float(scale)]), np.array([float(zero_point)]), bits)[0])


def _errors(stats: TensorStats, scales: Floats, points: Floats, bits: int) -> Floats:
    """`quantization_error` for several quantizers at once."""
    edges = _edges(stats)
    if stats.low == stats.high:
        steps = stats.low / scales
        return np.asarray((steps - _nearest(steps, points, bits)) ** 2 * scales**2)
    # In units of the step: the integral of (y - round(y))^2 up to y is n/12 + (y - n)^3 / 3 with n the nearest level,
    # and the same words hold beyond the ends, where n stays at the last level.
    steps = edges[None, :] / scales[:, None]
    level = _nearest(steps, points[:, None], bits)
    offset = steps - level
    integral = level / 12.0 + offset * offset * offset / 3.0
    density = stats.counts.astype(np.float64) / np.diff(edges)
    errors = (integral[:, 1:] - integral[:, :-1]) @ density * scales**3 / stats.count
    return np.asarray(np.maximum(errors, 0.0))


def _nearest(steps: Floats, points: Floats, bits: int) -> Floats:
    return np.clip(np.rint(steps), -points, float(2**bits - 1) - points)


def _edges(stats: TensorStats) -> Floats:
    """Borders of the bins, the outer ones drawn in to the observed range, so that no bin is wider than its data.

    An outer bin keeps at least 1/1024 of its width: all its values may equal the smallest or largest one.
    """
    edges: Floats = (np.arange(len(stats.counts) + 1, dtype=np.float64) + stats.first) * stats.width
    edges[0] = max(edges[0], min(stats.low, edges[1] - stats.width / 1024))
    edges[-1] = min(edges[-1], max(stats.high, edges[-2] + stats.width / 1024))
    return edges


# ------------------------------------------------------------------------------------------ the fast model for searches


@dataclass(frozen=True)
class Moments:
    """Cumulative moments of a histogram: the error of a quantizer in a handful of look-ups.

    Within the range the error is `step^2 / 12` per value, and no more than the value's own square; outside it is the
    squared distance to the end.  This is `quantization_error` but for the alignment of bins and steps.
    """

    low: float
    high: float
    width: float
    first: int
    table: Floats

    @staticmethod
    def of(stats: TensorStats) -> Moments:
        """Cumulative count, sum and sum of squares at each bin border: `table` is `[3, bins + 1]`."""
        edges = _edges(stats)
        widths = edges[1:] - edges[:-1]
        centre = edges[:-1] + 0.5 * widths
        table = np.zeros((3, len(edges)))
        table[0, 1:] = stats.counts
        table[1, 1:] = table[0, 1:] * centre
        table[2, 1:] = table[0, 1:] * (centre * centre + widths * widths / 12.0)
        return Moments(stats.low, stats.high, stats.width, stats.first, np.cumsum(table, axis=1))

    def errors(self, low: Floats, high: Floats, scale: Floats) -> Floats:
        """Mean squared error for ranges `[low, high]` (any shape) with the given steps."""
        below, under = self._below(low), self._below(high)
        above = self.table[:, -1].reshape(3, *(1,) * low.ndim) - under
        clipped = below[2] - low * (2.0 * below[1] - low * below[0])
        clipped += above[2] - high * (2.0 * above[1] - high * above[0])
        inside = np.minimum((under[0] - below[0]) * (scale * scale / 12.0), under[2] - below[2])
        total = np.maximum(clipped, 0.0) + np.maximum(inside, 0.0)
        return np.asarray(total / self.table[0, -1])

    def _below(self, at: Floats) -> Floats:
        """The moments of all values below `at`, linear within a bin."""
        last = self.table.shape[1] - 1
        place = np.clip(at / self.width - self.first, 0.0, float(last))
        place[at <= self.low] = 0.0
        place[at >= self.high] = last
        index = np.minimum(place.astype(np.intp), last - 1)
        left = self.table[:, index]
        return np.asarray(left + (self.table[:, index + 1] - left) * (place - index))


def ends(scale: Floats, point: Floats, bits: int) -> tuple[Floats, Floats]:
    """The smallest and largest value that a quantizer represents."""
    return -point * scale, (float(2**bits - 1) - point) * scale


def _modelled(moments: Moments, low: Floats, high: Floats, bits: int, symmetric: bool) -> Floats:
    scale, point = _quantizers(low, high, bits, symmetric)
    return moments.errors(*ends(scale, point, bits), scale)


def _best(stats: TensorStats, low: Floats, high: Floats, bits: int, symmetric: bool) -> tuple[float, float]:
    """The candidate with the least error by `quantization_error`; the first of equals."""
    scale, point = _quantizers(low, high, bits, symmetric)
    index = int(np.argmin(_errors(stats, scale, point, bits)))
    return float(low[index]), float(high[index])


# ---------------------------------------------------------------------------------------------------------- the methods


def minmax(stats: TensorStats, bits: int, symmetric: bool) -> tuple[float, float]:
    """The observed range, with zero."""
    return min(stats.low, 0.0), max(stats.high, 0.0)


def percentile(stats: TensorStats, bits: int, symmetric: bool) -> tuple[float, float]:
    """The quantiles `1 - p` and `p` (symmetric: `p` of the magnitude) for the best `p` of `PERCENTILES`."""
    edges = _edges(stats)
    share = np.concatenate([[0.0], np.cumsum(stats.counts.astype(np.float64))]) / stats.count
    tail = 1.0 - np.array(PERCENTILES) / 100.0
    if symmetric:
        size, order = _magnitudes(stats, edges, share)
        high = np.interp(1.0 - tail, size, order)
        low = np.maximum(-high, min(stats.low, 0.0))
        high = np.minimum(high, max(stats.high, 0.0))
    else:
        low = np.minimum(np.interp(tail, share, edges), 0.0)
        high = np.maximum(np.interp(1.0 - tail, share, edges), 0.0)
    return _best(stats, low, high, bits, symmetric)


def _magnitudes(stats: TensorStats, edges: Floats, share: Floats) -> tuple[Floats, Floats]:
    """Share of values within `[-m, m]` for ascending `m`, as (share, m)."""
    reach = np.linspace(0.0, max(abs(stats.low), abs(stats.high)), len(edges) + 1)
    within = np.interp(reach, edges, share) - np.interp(-reach, edges, share)
    return within, reach


def mse(stats: TensorStats, bits: int, symmetric: bool) -> tuple[float, float]:
    """The observed range, both ends shrunk by the same factor of 1.00, 0.99, … 0.21, with the least squared error."""
    return _best(stats, *_shrunk(stats, Moments.of(stats), bits, symmetric), bits, symmetric)


def _shrunk(stats: TensorStats, moments: Moments, bits: int, symmetric: bool) -> tuple[Floats, Floats]:
    """The candidates of `mse` that are worth an exact look: the whole range, and the best ones by the model."""
    low, high = minmax(stats, bits, symmetric)
    near = SHRINK[_shortlist(_modelled(moments, low * SHRINK, high * SHRINK, bits, symmetric), 4)]
    return low * near, high * near


def _shortlist(errors: Floats, n: int) -> NDArray[np.intp]:
    """Candidate 0 and the `n` best by the model."""
    return np.append(np.argsort(errors, kind="stable")[:n], 0)


def clip(stats: TensorStats, bits: int, symmetric: bool) -> tuple[float, float]:
    """Both ends searched apart: a grid of low and high ends, then a finer one around the best pair.

    The symmetric form has one number to search.  The error never exceeds that of `mse`, whose candidates compete too.
    """
    low, high = minmax(stats, bits, symmetric)
    moments = Moments.of(stats)
    if symmetric:
        reach = max(high, -low) * FINE_SHRINK
        lows, highs = np.maximum(low, -reach), np.minimum(high, reach)
    else:
        lows, highs = _grid(low * SPREAD, high * SPREAD)
        best = int(np.argmin(_modelled(moments, lows, highs, bits, symmetric)))
        lows, highs = _grid(
            np.minimum(np.maximum(lows[best] + FINE * low, low), 0.0),
            np.maximum(np.minimum(highs[best] + FINE * high, high), 0.0),
        )
    chosen = _shortlist(_modelled(moments, lows, highs, bits, symmetric), 3)
    rivals = _shrunk(stats, moments, bits, symmetric)
    low_ends, high_ends = np.append(lows[chosen], rivals[0]), np.append(highs[chosen], rivals[1])
    return _best(stats, low_ends, high_ends, bits, symmetric)


def _grid(lows: Floats, highs: Floats) -> tuple[Floats, Floats]:
    return np.repeat(lows, len(highs)), np.tile(highs, len(lows))


def entropy(stats: TensorStats, bits: int, symmetric: bool) -> tuple[float, float]:
    """The range whose quantized distribution is closest to the clipped one by Kullback-Leibler divergence.

    The method of TensorRT's entropy calibrator (S. Migacz, GTC 2017), made two-sided: the range is the observed one cut
    to `[-t, t]`, in whole bins, for a falling `t`; what is clipped is added to the outermost bins of P; Q spreads each
    level's count evenly over the bins that are not empty.  With no more bins than levels, Q is P without the clipped
    values.
    """
    low, high = minmax(stats, bits, symmetric)
    reach = max(high, -low)
    if symmetric:
        low, high = -reach, reach
    counts, first = _padded(stats, low, high)
    if len(counts) <= KL_LEAST_BINS:
        return minmax(stats, bits, symmetric)
    span = np.ceil(KL_SHRINK * (reach / stats.width))
    start = np.maximum(-span - first, 0.0).astype(np.intp)
    stop = np.minimum(span - first, float(len(counts))).astype(np.intp)
    keep = stop - start >= KL_LEAST_BINS
    start, stop = start[keep], stop[keep]
    best = int(np.argmin(_divergences(counts, start, stop, 2**bits)))
    return (
        max((first + float(start[best])) * stats.width, min(stats.low, 0.0)),
        min((first + float(stop[best])) * stats.width, max(stats.high, 0.0)),
    )


def _padded(stats: TensorStats, low: float, high: float) -> tuple[Floats, int]:
    """The counts on bins that reach from `low` to `high`, zero included, and the index of the first one."""
    first = min(int(np.floor(low / stats.width)), stats.first)
    last = max(int(np.ceil(high / stats.width)) - 1, stats.first + len(stats.counts) - 1)
    if last - first > 16 * len(stats.counts) + 1024:  # far from zero: the padding would be all there is
        return np.zeros(0), first
    counts = np.zeros(last - first + 1)
    counts[stats.first - first : stats.first - first + len(stats.counts)] = stats.counts
    return counts, first


def _divergences(counts: Floats, start: NDArray[np.intp], stop: NDArray[np.intp], levels: int) -> Floats:
    """KL(P || Q) for each clip range `[start, stop)` in bins; see `entropy`."""
    filled = np.concatenate([[0.0], np.cumsum(counts > 0)])
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    logs = np.log(np.maximum(counts, 1.0))
    own = np.concatenate([[0.0], np.cumsum(counts * logs)])
    size = stop - start
    levels = min(levels, int(size.max()))
    borders = start[:, None] + (np.arange(levels + 1)[None, :] * size[:, None] + levels - 1) // levels
    q = np.diff(mass[borders], axis=1)
    held = np.diff(filled[borders], axis=1)
    spread = np.log(np.maximum(q, 1.0) / np.maximum(held, 1.0))
    inside = mass[stop] - mass[start]
    rows = np.arange(len(start))
    # Sum over bins of p log(p/q), p and q in counts; the outermost bins hold their own count and what was clipped.
    total = own[stop] - own[start] - (q * spread).sum(axis=1)
    for end, outer, log_q in (
        (start, mass[start], spread[:, 0]),
        (stop - 1, mass[-1] - mass[stop], _last_filled(spread, borders, rows)),
    ):
        plain = counts[end]
        lumped = plain + outer
        total += lumped * np.log(np.maximum(lumped, 1.0)) - plain * logs[end] - outer * log_q
    whole = mass[-1]
    return np.asarray(total / whole - np.log(whole / np.maximum(inside, 1.0)))


def _last_filled(spread: Floats, borders: NDArray[np.intp], rows: NDArray[np.intp]) -> Floats:
    """Log of Q in the last level that holds at least one bin."""
    widths = np.diff(borders, axis=1)
    last = widths.shape[1] - 1 - np.argmax(widths[:, ::-1] > 0, axis=1)
    return np.asarray(spread[rows, last])


METHODS: Mapping[str, RangeMethod] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
    "clip": clip,
}
DEFAULT_METHOD = "clip"


def method_named(name: str) -> RangeMethod:
    """The range method of that name.

    Raises:
        RequestError: there is none.
    """
    if name not in METHODS:
        raise RequestError(
            "range method",
            found=repr(name),
            wanted="one of " + ", ".join(METHODS),
            cause="a misspelling",
            remedy=nearest(name, METHODS),
        )
    return METHODS[name]


