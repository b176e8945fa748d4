"""Masks: which sublayers (attention, MLP) of which blocks a reusing call takes from the cache.

Here a mask is a row of booleans, True where the sublayer is reused, blocks in order and the sublayers of a block in the
order of the graph.  Errors are measured by `SublayerErrors`; `greedy` is the gradient-free baseline for the masks that
`quantempo.calib.tuning.router` learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.schedules import check_schedule
from quantempo.contracts.cache import SublayerCut
from quantempo.errors import RequestError

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]
"""(calls, sublayers): True where a call reuses a sublayer; rows of refreshing calls are all False."""


class SublayerErrors:
    """What it costs to reuse each sublayer at each call: squared change of its output since the refresh.

    Observe runs of `full` in the order of calls.  Kept are the outputs at the last refresh, and one number per call and
    sublayer.

    Args:
        calls: of the program.
        refreshes: the schedule.
        sublayers: names of their outputs, in the order of a mask.
        gates: by sublayer, name of the tensor that scales its output before it is added, and so weighs the change.
    """

    def __init__(
        self, calls: int, refreshes: Sequence[int], sublayers: Sequence[str], gates: Mapping[str, str] | None = None
    ) -> None:
        self.refreshes = check_schedule(refreshes, calls)
        self.sublayers, self._gates = tuple(sublayers), dict(gates or {})
        self.errors: Floats = np.zeros((calls, len(self.sublayers)))
        self._kept: dict[str, NDArray[Any]] = {}

    def observe(self, call: int, taps: Mapping[str, NDArray[Any]]) -> None:
        """Add one call: the outputs by name, each (rows, tokens, channels), and gates (rows, …, channels)."""
        for index, name in enumerate(self.sublayers):
            values = taps[name]
            if call in self.refreshes:
                self._kept[name] = np.array(values, copy=True)
                continue
            change = (values - self._kept[name]).astype(np.float64)
            if name in self._gates:
                gate = taps[self._gates[name]].astype(np.float64)
                change *= gate.reshape(len(gate), *[1] * (change.ndim - 2), gate.shape[-1])
            flat = change.ravel()
            self.errors[call, index] += float(flat @ flat)


def greedy(
    errors: Floats, refreshes: Sequence[int], count: int, savings: Sequence[float] | None = None
) -> Masks:
    """Reuse the `count` pairs of call and sublayer that cost the least, per unit of time that they save.

    Assumes that errors of different sublayers add up, which a learned mask does not.

    Args:
        errors: (calls, sublayers), from `SublayerErrors`.
        refreshes: calls that reuse nothing.
        count: pairs to reuse, at most what the schedule leaves.
        savings: time of each sublayer; all equal where left out.

    Raises:
        RequestError: a count out of range.
    """
    calls, sublayers = errors.shape
    schedule = check_schedule(refreshes, calls)
    available = (calls - len(schedule)) * sublayers
    if not 0 <= count <= available:
        raise RequestError(
            "cache mask", found=f"{count} reused sublayers", wanted=f"0 to {available}",
            cause=f"{calls - len(schedule)} calls reuse, and the model has {sublayers} sublayers",
            remedy=f"ask for {min(max(count, 0), available)}",
        )
    price = errors / (np.ones(sublayers) if savings is None else np.asarray(savings, np.float64))
    price[list(schedule)] = np.inf
    masks = np.zeros((calls, sublayers), bool)
    order = np.argsort(price, axis=None, kind="stable")[:count]
    masks[np.unravel_index(order, masks.shape)] = True
    return masks


def cut_of(row: NDArray[np.bool_], depth: int, blocks: str = "transformer_blocks") -> SublayerCut | None:
    """A mask's row as a cut; `None` where it reuses nothing.

    Raises:
        RequestError: the sublayers do not divide among the blocks.
    """
    if len(row) % depth:
        raise RequestError(
            "cache mask", found=f"{len(row)} sublayers", wanted=f"the same number for each of {depth} blocks",
            cause="the mask was learned for another depth", remedy="learn it anew for this model",
        )
    if not row.any():
        return None
    return SublayerCut(tuple(tuple(bool(v) for v in part) for part in row.reshape(depth, -1)), blocks)


def cuts_of(masks: Masks, depth: int, blocks: str = "transformer_blocks") -> list[SublayerCut | None]:
    """One cut per call, as `quantempo.contracts.cache.merge_masks` takes them."""
    return [cut_of(row, depth, blocks) for row in masks]


def total_error(errors: Floats, masks: Masks) -> float:
    """Summed errors of what is reused."""
    return float(errors[masks].sum())
