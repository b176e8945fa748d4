"""Second moments of activations, which weight rounding needs.

A Gram matrix `Σ x xᵀ` says which weight errors of a layer matter.  Of each call only some rows are taken, evenly
spaced, so that collecting costs little beside the calls themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.table import ScaleTable

ROWS_PER_CALL = 256
MAX_CHANNELS = 2048
"""Tensors with more channels are left out: their matrices would outweigh the model (32 MiB each at this size)."""


class GramCollector:
    """Sums `x xᵀ` per tensor over calls, in float64.

    Args:
        tensors: the tensors to watch; their last axis is the channel axis.
    """

    def __init__(self, tensors: Iterable[str]) -> None:
        self._squares: dict[str, NDArray[np.float64]] = {}
        self._sums: dict[tuple[str, float], NDArray[np.float64]] = {}
        self._tensors = tuple(sorted(tensors))

    def observe(self, key: float, taps: Mapping[str, NDArray[Any]]) -> None:
        """Add one call's tensors, each (…, channels).

        Args:
            key: the call's group key.
            taps: values by tensor name.
        """
        for name in self._tensors:
            values = taps[name]
            channels = values.shape[-1]
            if channels > MAX_CHANNELS:
                continue
            rows = values.reshape(-1, channels)
            # Ceiling division: the stride covers the whole call, so all its samples count alike.
            chosen = rows[:: -(-len(rows) // ROWS_PER_CALL)]
            product = (chosen.T @ chosen).astype(np.float64)
            # Channel sums, and the number of rows behind them.
            sums = np.append(chosen.sum(0, np.float64), float(len(chosen)))
            self._squares[name] = self._squares[name] + product if name in self._squares else product
            known = self._sums.get((name, key))
            self._sums[name, key] = sums if known is None else known + sums

    def matrices(self, centres: ScaleTable | None = None) -> dict[str, NDArray[np.float64]]:
        """The sums by tensor; tensors that were left out are not in it.

        Args:
            centres: where it centres a tensor, the result is `Σ (x - m)(x - m)ᵀ` with the centre `m` of each call's
                group: what the product's integers really see.
        """
        found = dict(self._squares)
        for (name, key), sums in sorted(self._sums.items()):
            centre = centres.of(name).centre if centres is not None and name in centres.tensors else None
            if centres is None or centre is None:
                continue
            row = centre[centres.partition.group_of(key)].astype(np.float64)
            cross = np.outer(sums[:-1], row)
            found[name] = found[name] - cross - cross.T + sums[-1] * np.outer(row, row)
        return found
