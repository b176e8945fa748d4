"""Paired moments: what least squares needs of `x` and `y`, per channel, merged batch by batch in float64.

Second moments are kept about the running means, so that a small slope on a large mean keeps its digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PairedMoments:
    """Weighted moments of pairs (x, y), each field of shape (channels,).

    Args:
        weight: Σ w.
        mean_x, mean_y: weighted means.
        xx, xy, yy: Σ w·(x - mean_x)², Σ w·(x - mean_x)(y - mean_y), Σ w·(y - mean_y)².
    """

    weight: Floats
    mean_x: Floats
    mean_y: Floats
    xx: Floats
    xy: Floats
    yy: Floats

    @staticmethod
    def empty(channels: int) -> PairedMoments:
        """Moments of nothing."""
        return PairedMoments(*(np.zeros(channels) for _ in range(6)))

    @staticmethod
    def of(x: NDArray[Any], y: NDArray[Any], axis: int = 1, weights: Floats | None = None) -> PairedMoments:
        """Moments of one batch.

        The three second moments are reduced by the same operations, so that equal `x` and `y` give equal moments to the
        last bit, and with them a fit that is exactly the identity.

        Args:
            x: axis 0 runs over samples.
            y: of the same shape.
            axis: of the channels.
            weights: of the same shape, or left out for 1.

        Raises:
            ValueError: the shapes differ.
        """
        if x.shape != y.shape:
            raise ValueError(f"shapes {x.shape} and {y.shape} of a pair differ")
        flat_x, flat_y = _channels_last(x, axis), _channels_last(y, axis)
        if weights is None:
            w: Any = 1.0
            weight = np.full(flat_x.shape[1], float(len(flat_x)))
        else:
            w = _channels_last(weights, axis)
            weight = w.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_x, mean_y = (np.nan_to_num((w * v).sum(axis=0) / weight) for v in (flat_x, flat_y))
        dx, dy = flat_x - mean_x, flat_y - mean_y
        xx, xy, yy = ((w * a * b).sum(axis=0) for a, b in ((dx, dx), (dx, dy), (dy, dy)))
        return PairedMoments(weight, mean_x, mean_y, xx, xy, yy)

    def merge(self, other: PairedMoments) -> PairedMoments:
        """Moments of both sets of pairs (Chan, Golub and LeVeque 1983)."""
        weight = self.weight + other.weight
        share = other.weight / np.where(weight > 0, weight, 1.0)
        gap_x, gap_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between = self.weight * share
        return PairedMoments(
            weight, self.mean_x + share * gap_x, self.mean_y + share * gap_y,
            self.xx + other.xx + between * gap_x * gap_x,
            self.xy + other.xy + between * gap_x * gap_y, self.yy + other.yy + between * gap_y * gap_y,
        )  # fmt: skip

    def pooled(self) -> PairedMoments:
        """One channel that holds the scatter of all channels about their own means."""
        total = (np.array([field.sum()]) for field in (self.xx, self.xy, self.yy))
        return PairedMoments(np.array([self.weight.sum()]), np.zeros(1), np.zeros(1), *total)

    def squared_error(self, gain: Floats, bias: Floats) -> Floats:
        """Σ w·(y - gain·x - bias)² per channel, never below zero."""
        spread = self.yy - 2 * gain * self.xy + gain * gain * self.xx
        offset = self.mean_y - gain * self.mean_x - bias
        result: Floats = np.maximum(spread, 0.0) + self.weight * offset * offset
        return result


def merged(parts: list[PairedMoments]) -> PairedMoments:
    """Moments of all parts together; at least one part."""
    return reduce(PairedMoments.merge, parts)


def _channels_last(values: NDArray[Any], axis: int) -> Floats:
    moved = np.moveaxis(values, axis, -1)
    flat: Floats = np.ascontiguousarray(moved, np.float64).reshape(-1, moved.shape[-1])
    return flat
