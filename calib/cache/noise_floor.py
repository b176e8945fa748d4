"""The noise-floor rule: what a cache may do at a call, given how noisy quantization makes the cached features.

Two powers are compared, both relative to the power of the features: the quantization noise of the features that a
refresh caches, and the change of the float features from that refresh to a later call.

- Where the noise is at least the change, reuse as it is (order 0) is the best there is: what earlier refreshes could
  add is a difference of features, which is noise there.  The history correction leaves their predictions out.
- A refresh may serve calls as long as the change stays below the noise (reuse then costs nothing that is not lost
  already) or below `TOLERANCE`.  That reach caps the number of consecutive reuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.schedules import FeatureChanges, Schedule, check_schedule

Floats = NDArray[np.float64]
TOLERANCE = 1.0
"""Relative change (power) at which a cached feature tells no more about a later one than nothing at all would."""


@dataclass(frozen=True)
class FloorEntry:
    """One reusing call, with all that was decided on.

    Args:
        call, refresh: indices; the call reuses what the refresh cached.
        noise: quantization noise power of the refresh's features, relative to their power.
        change: of the float features from refresh to call, relative to the power at the call.
        order: 0 to reuse as it is, 1 where earlier refreshes may help.
    """

    call: int
    refresh: int
    noise: float
    change: float
    order: int


@dataclass(frozen=True)
class NoiseFloor:
    """The rule's verdict on a schedule.

    Args:
        entries: one per reusing call.
        max_consecutive: the smallest reach of a refresh of the schedule.
    """

    entries: tuple[FloorEntry, ...]
    max_consecutive: int


@dataclass(frozen=True, eq=False)
class FloorFacts:
    """What the rule is applied to; means over the cached features.

    Args:
        changes: `[a, k]`, relative power of the change of the float features from call a to call a + k.
        noise: per call, relative noise power of the quantized features.
    """

    changes: Floats
    noise: Floats

    @property
    def calls(self) -> int:
        """Of the program."""
        return len(self.noise)

    def reach(self, refresh: int) -> int:
        """How many calls after a refresh may reuse it, without a gap; all that were observed where none is too far."""
        change = self.changes[refresh, 1 : self.calls - refresh]
        tolerable = change <= max(float(self.noise[refresh]), TOLERANCE)
        return int(self.changes.shape[1] - 1 if tolerable.all() else np.argmin(tolerable))

    def cap(self) -> int:
        """The largest number of consecutive reuses that is within the reach of every refresh, at least 1."""
        return max(1, min((self.reach(call) for call in range(self.calls - 1)), default=1))

    def legal(self, refreshes: Sequence[int]) -> bool:
        """Whether each group of a schedule is within the reach of its refresh."""
        return all(b - a - 1 <= self.reach(a) for a, b in pairwise((*refreshes, self.calls)))


def facts_of(changes: Iterable[FeatureChanges], noise: Iterable[Sequence[float]]) -> FloorFacts:
    """Means over features, so that each counts alike whatever its size.

    Args:
        changes: of the float features, one each.
        noise: likewise, per call.
    """
    relative = np.mean([relative_changes(each) for each in changes], axis=0)
    return FloorFacts(relative, np.mean([np.asarray(each, np.float64) for each in noise], axis=0))


def judge(refreshes: Schedule, facts: FloorFacts) -> NoiseFloor:
    """Apply the rule to a schedule, whose groups are no longer than the changes were observed for."""
    schedule = check_schedule(refreshes, facts.calls)
    entries = []
    for refresh, stop in pairwise((*schedule, facts.calls)):
        floor = float(facts.noise[refresh])
        for call in range(refresh + 1, stop):
            change = float(facts.changes[refresh, call - refresh])
            entries.append(FloorEntry(call, refresh, floor, change, 1 if change > floor else 0))
    return NoiseFloor(tuple(entries), min(facts.reach(a) for a in schedule))


def relative_changes(changes: FeatureChanges) -> Floats:
    """`[a, k]`: Σ (X[a+k] - X[a])² over Σ X[a+k]²; infinite where call a + k is beyond the program."""
    calls, longest = changes.square.shape
    later = np.arange(calls)[:, None] + np.arange(longest)[None, :]
    inside = later < calls
    power = changes.power[np.minimum(later, calls - 1)]
    result: Floats = np.where(inside, changes.square / np.maximum(power, np.finfo(np.float64).tiny), np.inf)
    return result
