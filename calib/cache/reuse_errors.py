"""What reuse costs at each call, as the final latents see it: the cost that `programmed` schedules minimise.

The change of a feature says little about the harm that it does.  Here reuse itself is tried: at every call of a float
run the reusing graph computes its prediction from the features of each of the last calls.  Its squared error, as it is
or as the history correction leaves it, times the call's *gain* (squared error of the final latents per squared error of
this prediction) is what the call adds to the final error, if the errors of calls are independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.history import TERMS, least_squares, squared_error
from quantempo.errors import RequestError

Floats = NDArray[np.float64]
TINY = float(np.finfo(np.float64).tiny)


class ReuseErrors:
    """Second moments of the terms of the history correction, for each call and each refresh that may serve it, with the
    refresh before at the mean distance.

    Args:
        calls: of the program.
        longest: the largest group of calls that one refresh may serve, itself included.
        interval: mean distance of refreshes, at which errors are judged.
    """

    def __init__(self, calls: int, longest: int, interval: int) -> None:
        if calls < 1 or longest < 2 or interval < 1:
            raise RequestError(
                "errors of reuse", found=f"{calls} calls, groups of up to {longest}, interval {interval}",
                wanted="at least 1 call, groups of 2 and an interval of 1", cause="a slip", remedy="use larger numbers",
            )
        self.calls, self.longest, self.interval = calls, min(longest, calls), interval
        size = len(TERMS) + 1
        self._moments: Floats = np.zeros((calls, self.longest, size, size))
        self._elements: Floats = np.zeros((calls, self.longest))

    def observe(
        self, call: int, refresh: int, reused: NDArray[Any], predictions: Sequence[NDArray[Any]], fed: NDArray[Any],
        wanted: NDArray[Any],
    ) -> None:
        """Add one call that was tried; all arrays (rows, …), after guidance.

        Args:
            call: its index.
            refresh: index of the call whose features it reused.
            reused: the reusing graph's prediction.
            predictions: of the full graph, at all calls up to the refresh at least.
            fed: what the denoiser was fed at the call.
            wanted: the prediction of the full graph.
        """
        before = predictions[refresh - min(self.interval, self.longest, refresh)]
        parts = (reused, predictions[refresh], before, fed, wanted)
        terms = np.stack([np.asarray(v, np.float64).ravel() for v in parts])
        self._moments[call, call - refresh] += terms @ terms.T
        self._elements[call, call - refresh] += terms.shape[1]

    def errors(self, corrected: bool) -> Floats:
        """`[i, k]`: mean squared error of call `i` on features of call `i - k`; NaN where it was not tried."""
        found = np.full(self._elements.shape, math.nan)
        found[:, 0] = 0.0
        plain = np.eye(len(TERMS))[0]
        for call, distance in zip(*np.nonzero(self._elements), strict=True):
            moments = self._moments[call, distance]
            coefficients = least_squares(moments) if corrected else plain
            found[call, distance] = squared_error(moments, coefficients) / self._elements[call, distance]
        return found

    def gains(self, sensitivities: Mapping[int, float]) -> Floats:
        """Per call, squared error of the final latents per squared error of the prediction.

        Args:
            sensitivities: by call, root mean square error of the final latents of a run in which it alone reuses the
                features of the call before.  Calls in between are interpolated, in logarithms.
        """
        single = self.errors(corrected=False)[:, 1]
        known = {c: s * s / max(float(single[c]), TINY) for c, s in sensitivities.items() if c and s > 0}
        if not known:
            return np.ones(self.calls)
        at = sorted(known)
        result: Floats = np.exp(np.interp(np.arange(self.calls), at, [math.log(known[c]) for c in at]))
        return result

    def costs(self, gains: Sequence[float] | Floats, corrected: bool, exponent: float = 1.0) -> Floats:
        """`[a, b]`: what the calls `a .. b - 1` add to the final error when call `a` serves them all.

        Args:
            gains: from `gains`.
            corrected: whether the history correction will be there.
            exponent: of the squared errors before they are added; 1 where those of calls are independent, 0.5 where
                they point the same way.
        """
        errors = (self.errors(corrected) * np.asarray(gains)[:, None]) ** exponent
        costs = np.full((self.calls + 1, self.calls + 1), math.inf)
        for a in range(self.calls):
            reach = min(self.longest, self.calls - a)
            costs[a, a + 1 : a + reach + 1] = np.cumsum([errors[a + k, k] for k in range(reach)])
        return costs


def probed_calls(calls: int, most: int) -> tuple[int, ...]:
    """Calls whose sensitivity is measured: the last third of `most` calls, the rest evenly; all where there are few."""
    if calls - 1 <= most:
        return tuple(range(1, calls))
    tail = most // 3
    rest = np.unique(np.linspace(1, calls - tail - 1, most - tail).round().astype(int))
    return (*(int(c) for c in rest), *range(calls - tail, calls))
