"""Second moments of activations, which weight rounding needs.

A Gram matrix `Σ x xᵀ` says which weight errors of a layer matter.  Of each call only some rows are taken, evenly
spaced, so that collecting costs little beside the calls themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS_PER_CALL = 256
MAX_CHANNELS = 2048
"""Tensors with more channels are left out: their matrices would outweigh the model (32 MiB each at this size)."""


class GramCollector:
    """Sums `x xᵀ` per tensor over calls, in float64.

    Args:
        tensors: the tensors to watch; their last axis is the channel axis.
    """

    def __init__(self, tensors: Iterable[str]) -> None:
        self._sums: dict[str, NDArray[np.float64] | None] = dict.fromkeys(sorted(tensors))

    def observe(self, taps: Mapping[str, NDArray[Any]]) -> None:
        """Add one call's tensors, each (…, channels)."""
        for name in self._sums:
            values = taps[name]
            if values.shape[-1] > MAX_CHANNELS:
                continue
            rows = values.reshape(-1, values.shape[-1])
            # Ceiling division: the stride covers the whole call, so all its samples count alike.
            chosen = rows[:: -(-len(rows) // ROWS_PER_CALL)]
            product = (chosen.T @ chosen).astype(np.float64)
            known = self._sums[name]
            self._sums[name] = product if known is None else known + product

    def matrices(self) -> dict[str, NDArray[np.float64]]:
        """The sums by tensor; tensors that were left out are not in it."""
        return {name: total for name, total in self._sums.items() if total is not None}
