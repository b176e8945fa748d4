"""Decisions at run time: which rows refresh their cached features and which reuse them.

The rule is written down at `quantempo.contracts.program.Decide`, its exact arithmetic in docs/step-program.md.  A row
has a state of its own, so neither batch mates nor guidance branches see each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.program import Decide

Array = NDArray[Any]
Float64s = NDArray[np.float64]


class Decisions:
    """The state of one lane's rows: reference indicator, sum of estimates and number of reuses since the last refresh.

    Args:
        rows: how many.
    """

    def __init__(self, rows: int) -> None:
        self._known = np.zeros(rows, np.bool_)
        self._sum = np.zeros(rows, np.float64)
        self._age = np.zeros(rows, np.int64)
        self._size = np.zeros(rows, np.float64)
        self._reference: Float64s = np.empty(0)
        self._scratch: list[Float64s] = []

    def forget(self) -> None:
        """All rows were refreshed without a look at the indicator."""
        self._known.fill(False)
        self._sum.fill(0.0)
        self._age.fill(0)

    def reused(self) -> None:
        """All rows reused their features without a look at the indicator."""
        self._age += 1

    def choose(self, decide: Decide, indicator: Array) -> NDArray[np.bool_]:
        """Decide for each row, and take note of it.

        Args:
            decide: the rule.
            indicator: (rows, …), of one shape throughout a run.

        Returns:
            Per row, whether it refreshes.
        """
        flat = indicator.reshape(len(self._known), -1)
        if self._reference.shape != flat.shape:
            self._reference = np.empty(flat.shape, np.float64)
            self._scratch = [np.empty(flat.shape[1], np.float64) for _ in range(2)]
            self._known.fill(False)
        refresh = np.ones(len(flat), np.bool_)
        for row, values in enumerate(flat):
            refresh[row] = not self._known[row] or self._outgrown(decide, row, values)
            if refresh[row]:
                self._sum[row], self._age[row] = 0.0, 0
            else:
                self._age[row] += 1
            if refresh[row] or decide.reference == "previous_call":
                np.copyto(self._reference[row], values)
                self._size[row] = self._magnitude(self._reference[row])
                self._known[row] = True
        return refresh

    def _outgrown(self, decide: Decide, row: int, values: Array) -> bool:
        difference = self._scratch[0]
        np.copyto(difference, values)
        np.subtract(difference, self._reference[row], out=difference)
        size = float(self._size[row])
        change = self._magnitude(difference) / size if size > 0.0 else math.nan
        if not math.isfinite(change):
            return True
        estimate = decide.polynomial[0]
        for coefficient in decide.polynomial[1:]:
            estimate = estimate * change + coefficient
        if estimate < 0.0:
            estimate = 0.0
        self._sum[row] += estimate
        measure = float(self._sum[row]) if decide.accumulate else estimate
        # Written so that a NaN refreshes.
        return not measure < decide.threshold or bool(self._age[row] >= decide.max_consecutive)

    def _magnitude(self, values: Float64s) -> float:
        """Sum of absolute values, strictly from first to last so that every runtime agrees."""
        running, absolute = self._scratch
        np.absolute(values, out=absolute)
        return float(np.add.accumulate(absolute, out=running)[-1])


def chunks(rows: NDArray[np.intp]) -> Iterator[list[int]]:
    """Rows in runs whose lengths are powers of two, longest first.

    So a lane needs few different batches, whatever its rows decide: some engines compile a graph for each.
    """
    start = 0
    while start < len(rows):
        length = 1 << ((len(rows) - start).bit_length() - 1)
        yield [int(row) for row in rows[start : start + length]]
        start += length
