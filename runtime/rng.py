"""Noise that every runtime can reproduce to the last bit: Philox 4x32-10, then the inverse normal distribution.

Definition (a runtime in another language follows it literally):

- key: the 64-bit seed, low word first.  Counter words of block `b`: `(b & 0xffffffff, b >> 32, stream, draw)`, where
  `stream` numbers the samples of a seed and `draw` the tensors of a run (0 is the initial noise, `k` the k-th `noise`).
- a block gives four words `w0..w3`; element `2b` of the flattened tensor comes from `(w0, w1)`, element `2b + 1` from
  `(w2, w3)`: `k = (high word << 32 | low word) >> 11` with the first word of the pair as the low one;
  `p = (k | 1) · 2^-53`, an odd multiple of 2^-53, so that `p` and `1 - p` are exact and never 0 or 1.
- `z = Φ⁻¹(p)` by algorithm AS 241 (PPND16) in float64 with `+ - * / sqrt` and the logarithm of `log64`, in the order
  written here and without contraction; rounded once to float32.

An element depends on seed, stream, draw and its index alone: never on the batch, on threads or on earlier draws.

Sources: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); Wichura, Algorithm AS 241, Applied
Statistics 37 (1988).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float64s = NDArray[np.float64]
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


class NoiseSource(Protocol):
    """Where a run's noise comes from."""

    def draw(self, index: int, out: NDArray[np.float32]) -> None:
        """Fill `out` (batch, …) with standard normals; 0 is the initial noise, `k` the k-th `noise` operation."""


class PhiloxNoise:
    """Counter-based noise.

    Args:
        streams: (seed, stream) per sample.
    """

    def __init__(self, streams: Sequence[tuple[int, int]]) -> None:
        self.streams = tuple(streams)

    @staticmethod
    def from_seeds(seeds: int | Sequence[int], batch: int) -> PhiloxNoise:
        """One seed gives sample `i` the stream `i` of that seed; a list gives each sample its own seed and stream 0."""
        if isinstance(seeds, int):
            return PhiloxNoise([(seeds, i) for i in range(batch)])
        return PhiloxNoise([(seed, 0) for seed in seeds])

    def draw(self, index: int, out: NDArray[np.float32]) -> None:
        """See `NoiseSource.draw`."""
        for row, (seed, stream) in enumerate(self.streams):
            out[row] = standard_normal(seed, stream, index, out.shape[1:])


def standard_normal(seed: int, stream: int, draw: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A float32 tensor of standard normals; see the module's text for its definition."""
    count = math.prod(shape)
    blocks = (count + 1) // 2
    index = np.arange(blocks, dtype=np.uint64)
    counter = (index & _MASK, index >> _SHIFT, np.full(blocks, stream, np.uint64), np.full(blocks, draw, np.uint64))
    w0, w1, w2, w3 = philox(counter, seed)
    uniform = np.empty((blocks, 2), np.float64)
    for column, (low, high) in enumerate(((w0, w1), (w2, w3))):
        bits = ((high << _SHIFT | low) >> np.uint64(11)) | np.uint64(1)
        uniform[:, column] = bits.astype(np.float64) * 2.0**-53
    normal = inverse_normal(uniform.reshape(-1)[:count])
    result: NDArray[np.float32] = normal.astype(np.float32).reshape(shape)
    return result


def philox(counter: Sequence[NDArray[np.uint64]], key: int) -> tuple[NDArray[np.uint64], ...]:
    """Philox 4x32-10.

    Args:
        counter: four arrays of 32-bit words, held in uint64 so that products need no splitting.
        key: 64 bits.

    Returns:
        Four arrays of 32-bit words, held in uint64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


_LN2_HIGH = 6.93147180369123816490e-01
"""ln 2 rounded to 33 bits, so that a small integer times it is exact."""
_LN2_LOW = 1.90821492927058770002e-10
_SQRT_HALF = 0.7071067811865476
_ATANH_TERMS = tuple(1.0 / (2 * n + 1) for n in range(11, 0, -1))


def log64(x: Float64s) -> Float64s:
    """Natural logarithm of positive normal numbers, by operations that round the same everywhere.

    `x = m · 2^e` with `m` in `[√½, √2)`; `log m = 2 · atanh(s)`, `s = (m - 1) / (m + 1)`, by eleven terms of its
    series after the first, in Horner's order.  Error below 2 units in the last place of the result.
    """
    mantissa, exponent = np.frexp(x)
    small = mantissa < _SQRT_HALF
    mantissa = np.where(small, mantissa * 2.0, mantissa)
    power = (exponent - small).astype(np.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = np.full_like(s, _ATANH_TERMS[0])
    for coefficient in _ATANH_TERMS[1:]:
        series = series * square + coefficient
    tail = series * square * s
    result: Float64s = power * _LN2_HIGH + (power * _LN2_LOW + 2.0 * (s + tail))
    return result


_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_MIDDLE = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0),
)  # fmt: skip
"""Numerator and denominator of AS 241's three rational functions, highest power first."""


def _ratio(table: tuple[tuple[float, ...], tuple[float, ...]], r: Float64s) -> Float64s:
    sides = []
    for coefficients in table:
        value: Any = coefficients[0]
        for coefficient in coefficients[1:]:
            value = value * r + coefficient
        sides.append(value)
    result: Float64s = sides[0] / sides[1]
    return result


def inverse_normal(p: Float64s) -> Float64s:
    """Φ⁻¹ by AS 241 (PPND16), relative error about 1e-16, for odd multiples of 2^-53 (any `p` in (0, 1) works)."""
    q = p - 0.5
    r = 0.180625 - q * q
    result = q * _ratio(_CENTRE, r)
    tails = np.flatnonzero(np.abs(q) > 0.425)
    if tails.size:
        side = p[tails]
        r = np.sqrt(-log64(np.minimum(side, 1.0 - side)))
        value = np.where(r <= 5.0, _ratio(_MIDDLE, r - 1.6), _ratio(_FAR, r - 5.0))
        result[tails] = np.where(q[tails] < 0.0, -value, value)
    return result
