"""Brownian motion over noise level, exact in distribution, from independent normal draws.

Two SDE schedulers of diffusers take their noise from a Brownian tree: the noise of an interval is the increment of one
path over it, divided by the square root of its length, so the noise of overlapping intervals is correlated.  The same
path is built here point by point: outside the known times a draw extends it, inside an interval a draw bridges it
(Lévy's construction).  The arithmetic works on numbers, tensors and traced rows alike.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Any


class BrownianPath:
    """Increments of a Brownian motion; callable as diffusers' noise samplers are.

    Args:
        draw: a fresh standard normal tensor at each call.

    Attributes:
        increments: the state of the path, which a tracer turns into registers between calls.
    """

    def __init__(self, draw: Callable[[], Any]) -> None:
        self._draw = draw
        self._times: list[float] = []
        self.increments: list[Any] = []  # over [times[i], times[i + 1]]
        self._ceiling = math.inf

    def __call__(self, start: Any, end: Any) -> Any:
        """The increment between two times over the square root of their distance.

        The path runs downwards, the way a sampler walks; an upward interval has the opposite sign.  What lies above
        the interval is forgotten, so that a long loop holds few increments.

        Args:
            start: a noise level, as a number or a tensor of one element.
            end: another one.

        Raises:
            ValueError: the interval is empty, or reaches above what has been forgotten.
        """
        low, high = sorted((float(start), float(end)))
        if not low < high <= self._ceiling:
            raise ValueError(f"noise over [{low}, {high}] was asked for below {self._ceiling}: it cannot be drawn")
        if not self._times:
            self._times.append(low)
        self._know(low)
        self._know(high)
        first, last = self._times.index(low), self._times.index(high)
        total = self.increments[first]
        for increment in self.increments[first + 1 : last]:
            total = total + increment
        del self._times[last + 1 :], self.increments[last:]
        self._ceiling = high
        return total / math.copysign(math.sqrt(high - low), float(start) - float(end))

    def _know(self, time: float) -> None:
        times, increments = self._times, self.increments
        at = bisect.bisect_left(times, time)
        if at < len(times) and times[at] == time:
            return
        if at == len(times):
            increments.append(self._draw() * math.sqrt(time - times[-1]))
        elif at == 0:
            increments.insert(0, self._draw() * math.sqrt(times[0] - time))
        else:
            left, right = time - times[at - 1], times[at] - time
            whole = increments[at - 1]
            spread = math.sqrt(left * right / (left + right))
            first = whole * (left / (left + right)) + self._draw() * spread
            increments[at - 1 : at] = [first, whole - first]
        times.insert(at, time)
