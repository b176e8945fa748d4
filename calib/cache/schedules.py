"""Static schedules: at which denoiser calls the cached features are refreshed; all other calls reuse them.

A schedule is an ascending tuple of call indices that starts with 0.  It counts *calls*, not steps: a two-call method
such as Heun visits two points per step, and features change between them as well.

To add a schedule, write one function that returns such a tuple.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.comparison import clearly_lower
from quantempo.calib.partition import solve
from quantempo.errors import RequestError

Floats = NDArray[np.float64]
Schedule = tuple[int, ...]


def check_schedule(refreshes: Sequence[int], calls: int) -> Schedule:
    """The schedule as a tuple, if it can be run.

    Raises:
        RequestError: the first call reuses, an index lies outside the program, or the indices do not ascend.
    """
    if not refreshes or refreshes[0] != 0:
        raise _refuse(
            f"a first call that reuses (refreshes at {list(refreshes)[:4]})", "a refresh at call 0",
            "nothing is cached before the first refresh", "add call 0",
        )
    if refreshes[-1] >= calls:
        raise _refuse(
            f"a refresh at call {refreshes[-1]} of a program with {calls} calls", f"calls 0 to {calls - 1}",
            "the schedule was made for another number of steps, or counts something else than calls",
            "make the schedule for this program",
        )
    if any(a >= b for a, b in pairwise(refreshes)):
        raise _refuse(
            f"refreshes at {list(refreshes)}", "ascending calls", "a slip in a hand-written plan", "sort them",
        )
    return tuple(int(i) for i in refreshes)


def serving(refreshes: Sequence[int], calls: int) -> tuple[int, ...]:
    """For each call the refresh whose features it sees: itself where it refreshes."""
    schedule = check_schedule(refreshes, calls)
    return tuple(a for a, b in pairwise((*schedule, calls)) for _ in range(a, b))


def every(calls: int, interval: int) -> Schedule:
    """A refresh at every `interval`-th call."""
    _check_interval(calls, interval)
    return tuple(range(0, calls, interval))


def power_law(calls: int, interval: int, power: float = 1.3, centre: float = 0.0) -> Schedule:
    """As many refreshes as `every`, placed the more densely the nearer to `centre`.

    Call indices are `centre + sign(x)·|x|^power` for evenly spaced `x` (DeepCache, Ma et al. 2024, section 3.3).  Where
    two refreshes would fall on one call the power is lowered until they are apart; at 1 they are even.

    Args:
        calls: of the program.
        interval: mean distance of refreshes.
        power: at least 1.
        centre: a call index, 0 to `calls`.

    Raises:
        RequestError: an interval, power or centre out of range.
    """
    _check_interval(calls, interval)
    if not power >= 1 or not 0 <= centre <= calls:
        raise _refuse(
            f"power {power:g}, centre {centre:g}", f"a power of at least 1 and a centre in 0 to {calls}", "a slip",
            f"use power {max(1.0, power):g} and centre {min(max(centre, 0), calls):g}",
        )
    count = -(-calls // interval)
    while power > 1:
        ends = [math.copysign(abs(end) ** (1 / power), end) for end in (-centre, calls - centre)]
        x = np.linspace(ends[0], ends[1], count + 1)[1:-1]
        inner = np.floor(centre + np.sign(x) * np.abs(x) ** power + 1e-9).astype(int)
        found = sorted({0, *inner.tolist()})
        if len(found) == count and found[-1] < calls:
            return tuple(found)
        power -= 0.02
    return tuple(int(i) for i in np.floor(np.arange(count) * calls / count + 1e-9))


class FeatureChanges:
    """How far features move from call to call, for all pairs of calls at most `longest` - 1 apart.

    Feed it the calls of each run in order; a call 0 begins a new run.  Of a run it keeps the last `longest` - 1
    features alone, and reduces each new one against them as it comes.

    Args:
        calls: of the program.
        longest: the largest group of calls that one refresh may serve, itself included.
    """

    def __init__(self, calls: int, longest: int) -> None:
        if calls < 1 or longest < 1:
            raise _refuse(f"{calls} calls, groups of up to {longest}", "at least 1 of each", "a slip", "use 1 or more")
        self.calls, self.longest = calls, min(longest, calls)
        self.absolute: Floats = np.zeros((calls, self.longest))
        """`[a, k]`: Σ |X[a+k] - X[a]| over all elements and runs."""
        self.square: Floats = np.zeros((calls, self.longest))
        """`[a, k]`: Σ (X[a+k] - X[a])²."""
        self.size: Floats = np.zeros(calls)
        """Σ |X| of each call."""
        self.power: Floats = np.zeros(calls)
        """Σ X² of each call."""
        self.elements: NDArray[np.int64] = np.zeros(calls, np.int64)
        self._recent: dict[str, deque[tuple[int, NDArray[Any]]]] = {}

    def observe(self, call: int, features: NDArray[Any], lane: str = "") -> None:
        """Add one call's features.

        Args:
            call: its index.
            features: any shape, the same within a run.
            lane: name of the stream that the features belong to, where branches or samples run in calls of their own.
        """
        recent = self._recent.setdefault(lane, deque(maxlen=self.longest - 1))
        if call == 0:
            recent.clear()
        for earlier, other in recent:
            if 0 < call - earlier < self.longest:
                difference = (features - other).ravel().astype(np.float64)
                self.absolute[earlier, call - earlier] += float(np.abs(difference).sum())
                self.square[earlier, call - earlier] += float(difference @ difference)
        flat = features.ravel().astype(np.float64)
        self.size[call] += float(np.abs(flat).sum())
        self.power[call] += float(flat @ flat)
        self.elements[call] += features.size
        recent.append((call, np.array(features, copy=True)))

    def merge(self, other: FeatureChanges) -> FeatureChanges:
        """The changes of both sets of runs."""
        merged = FeatureChanges(self.calls, self.longest)
        for name in ("absolute", "square", "size", "power", "elements"):
            getattr(merged, name)[...] = getattr(self, name) + getattr(other, name)
        return merged

    def costs(self) -> Floats:
        """`[a, b]`: `Σ_i Σ |X_i - X_a|` over the calls `a .. b - 1`, which call `a` serves; infinite out of reach.

        That is what CacheQuant (Liu et al. 2025) minimises.
        """
        costs = np.full((self.calls + 1, self.calls + 1), math.inf)
        for a in range(self.calls):
            reach = min(self.longest, self.calls - a)
            costs[a, a + 1 : a + reach + 1] = np.cumsum(self.absolute[a, :reach])
        return costs


def sum_of_costs(changes: Iterable[FeatureChanges]) -> Floats:
    """The costs of several features together, each relative to its size over the program."""
    total: Floats = np.zeros(0)
    for each in changes:
        costs = each.costs() / max(float(each.size.sum()), np.finfo(np.float64).tiny)
        total = costs if not total.size else total + costs
    return total


def bounds_of(interval: int) -> tuple[int, int]:
    """The smallest and the largest group that dynamic programming allows for a mean interval."""
    return -(-interval // 2), 2 * interval


def programmed(costs: Floats, interval: int, bounds: tuple[int, int] | None = None) -> Schedule:
    """The schedule of least cost among those with `ceil(calls / interval)` refreshes whose groups lie within bounds.

    Exact, by dynamic programming.  Where the bounds cannot tile the program, the last group may be shorter.

    Args:
        costs: from `FeatureChanges.costs`.
        interval: mean distance of refreshes.
        bounds: smallest and largest group; default: half and double the interval.

    Raises:
        RequestError: no schedule fits the bounds, or the features were observed for shorter groups than asked for.
    """
    calls = len(costs) - 1
    _check_interval(calls, interval)
    shortest, longest = bounds or bounds_of(interval)
    groups = -(-calls // interval)
    legal = np.full_like(costs, math.inf)
    for a in range(calls):
        for b in range(a + shortest, min(a + longest, calls) + 1):
            legal[a, b] = costs[a, b]
    if groups * shortest > calls:
        for a in range(max(0, calls - shortest), calls):
            legal[a, calls] = costs[a, calls]
    cost, borders = solve(legal, range(calls + 1), groups)[-1]
    if not math.isfinite(cost):
        raise _refuse(
            f"{groups} groups of {shortest} to {longest} calls", f"groups that tile {calls} calls",
            "the bounds are too narrow, or the features were observed over shorter distances",
            "widen the bounds, and observe the features with longest at least as large",
        )
    return borders[:-1]


def shifted(refreshes: Sequence[int], calls: int, longest: int) -> list[Schedule]:
    """All schedules in which some consecutive refreshes lie one call earlier or later, the fewest moved first.

    Two groups change their length, those between keep theirs: a schedule can so take a call from one end of the program
    and give it to the other.

    Args:
        refreshes: the schedule.
        calls: of the program.
        longest: the largest group of calls.
    """
    found = []
    for size in range(1, len(refreshes)):
        for first in range(1, len(refreshes) - size + 1):
            for step in (-1, 1):
                part = tuple(r + step for r in refreshes[first : first + size])
                moved = (*refreshes[:first], *part, *refreshes[first + size :])
                if all(0 < b - a <= longest for a, b in pairwise((*moved, calls))):
                    found.append(moved)
    return found


def improved(
    refreshes: Sequence[int], calls: int, longest: int, error: Callable[[Schedule], Floats], runs: int,
    cost: Callable[[Schedule], float] | None = None,
) -> Schedule:
    """A schedule with as many refreshes and a clearly lower error, by moving refreshes by one call at a time.

    Args:
        refreshes: where to start; given back where nothing is clearly lower.
        calls: of the program.
        longest: the largest group of calls.
        error: of a schedule, measured, one value per sample; it may be slow.
        runs: how often it is asked at most.
        cost: a guess of the error, by which moves are sorted; infinite for moves that are not legal; default: the
            fewest moved refreshes first.
    """
    best = check_schedule(refreshes, calls)
    lowest, asked = error(best), 0
    tried = {best}
    while True:
        moves = [m for m in shifted(best, calls, longest) if m not in tried]
        if cost is not None:
            moves = sorted((m for m in moves if math.isfinite(cost(m))), key=cost)
        for moved in moves:
            if asked >= runs:
                return best
            asked += 1
            tried.add(moved)
            found = error(moved)
            if clearly_lower(found, lowest):
                best, lowest = moved, found
                break
        else:
            return best


def cost_of(costs: Floats, refreshes: Sequence[int]) -> float:
    """The cost of a schedule."""
    calls = len(costs) - 1
    return float(sum(costs[a, b] for a, b in pairwise((*check_schedule(refreshes, calls), calls))))


def _check_interval(calls: int, interval: int) -> None:
    if calls < 1 or interval < 1:
        raise _refuse(
            f"interval {interval} over {calls} calls", "an interval of at least 1 over at least 1 call", "a slip",
            "use interval 1 for no reuse, 2 for every other call",
        )


def _refuse(found: str, wanted: str, cause: str, remedy: str) -> RequestError:
    return RequestError("cache schedule", found=found, wanted=wanted, cause=cause, remedy=remedy)
