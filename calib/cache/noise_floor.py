"""The noise-floor rule: what a cache may do at a call, given how noisy quantization makes the cached features.

Two powers are compared, both relative to the power of the features: the quantization noise of the features that a
refresh caches, and the change of the float features from that refresh to a later call.

- Where the noise is at least the change, reuse as it is (order 0) is the best there is: an extrapolation over `r`
  intervals multiplies the noise power by `(1 + r)² + r²` and has less than the noise to gain.
- Where the change is larger, order 1 is worth it only if what it leaves, its own curvature error and the multiplied
  noise, is below what order 0 leaves, the change and the noise.
- A refresh may serve calls as long as the change stays below the noise (reuse then costs nothing that is not lost
  already) or below `tolerance`.  The largest such distance, the smallest over all refreshes of a schedule, caps the
  number of consecutive reuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.schedules import FeatureChanges, check_schedule

Floats = NDArray[np.float64]
TOLERANCE = 0.1
"""Relative change (power) that a reuse may leave, -10 dB."""


@dataclass(frozen=True)
class FloorEntry:
    """One reusing call, with all that was decided on.

    Args:
        call, refresh: indices; the call reuses what the refresh cached.
        noise: quantization noise power of the refresh's features, relative to their power.
        change: of the float features from refresh to call, relative to the power at the call.
        curvature: relative power of what a linear extrapolation from the two latest refreshes leaves; `None` where it
            is unknown.
        multiplied: the noise after that extrapolation.
        order: 0 to reuse as it is, 1 where extrapolation is expected to be closer.
    """

    call: int
    refresh: int
    noise: float
    change: float
    curvature: float | None
    multiplied: float | None
    order: int


@dataclass(frozen=True)
class NoiseFloor:
    """The rule's verdict on a schedule.

    Args:
        entries: one per reusing call.
        max_consecutive: the cap on consecutive reuse that follows.
        tolerance: what it was made with.
    """

    entries: tuple[FloorEntry, ...]
    max_consecutive: int
    tolerance: float


def judge(
    refreshes: Sequence[int],
    changes: FeatureChanges,
    noise: Sequence[float],
    curvature: Floats | None = None,
    tolerance: float = TOLERANCE,
) -> NoiseFloor:
    """Apply the rule to a schedule.

    Args:
        refreshes: the schedule.
        changes: of the float features, observed over at least its longest group.
        noise: per call, noise power of the quantized features relative to their power.
        curvature: per call, squared error of the linear extrapolation from the two latest refreshes, relative to the
            power at the call; NaN or left out where unknown.
        tolerance: see `TOLERANCE`.
    """
    schedule = check_schedule(refreshes, changes.calls)
    relative = relative_changes(changes)
    entries = []
    for number, (refresh, stop) in enumerate(pairwise((*schedule, changes.calls))):
        for call in range(refresh + 1, stop):
            bent = None if curvature is None or number == 0 or np.isnan(curvature[call]) else float(curvature[call])
            reach = (call - refresh) / (refresh - schedule[number - 1]) if number else 0.0
            change, floor = float(relative[refresh, call - refresh]), float(noise[refresh])
            multiplied = None if bent is None else ((1 + reach) ** 2 + reach**2) * floor
            better = bent is not None and multiplied is not None and bent + multiplied < change + floor
            order = 1 if better and change > floor else 0
            entries.append(FloorEntry(call, refresh, floor, change, bent, multiplied, order))
    caps = [_reach(relative[a], changes.calls - a, float(noise[a]), tolerance) for a in schedule]
    return NoiseFloor(tuple(entries), min(caps), tolerance)


def relative_changes(changes: FeatureChanges) -> Floats:
    """`[a, k]`: Σ (X[a+k] - X[a])² over Σ X[a+k]²; infinite where call a + k is beyond the program."""
    calls, longest = changes.square.shape
    later = np.arange(calls)[:, None] + np.arange(longest)[None, :]
    inside = later < calls
    power = changes.power[np.minimum(later, calls - 1)]
    result: Floats = np.where(inside, changes.square / np.maximum(power, np.finfo(np.float64).tiny), np.inf)
    return result


def _reach(change: Floats, left: int, noise: float, tolerance: float) -> int:
    """How many calls after a refresh may reuse it, without a gap; all that were observed where none is too far."""
    tolerable = change[1:left] <= max(noise, tolerance)
    return int(len(change) - 1 if tolerable.all() else np.argmin(tolerable))
