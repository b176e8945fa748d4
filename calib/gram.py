"""Second moments of activations, which weight rounding needs.

A Gram matrix `Σ x xᵀ` says which weight errors of a layer matter.  Of each call only some rows are taken, evenly
spaced, so that collecting costs little beside the calls themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.table import ScaleTable
from quantempo.contracts.tensor_file import map_tensors, write_tensors

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

    def add(self, other: GramCollector) -> None:
        """Add what another collector of the same tensors saw."""
        for name, square in other._squares.items():
            self._squares[name] = self._squares[name] + square if name in self._squares else square
        for key, sums in other._sums.items():
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def matrices(self, centres: ScaleTable | None = None) -> Mapping[str, NDArray[np.float64]]:
        """The sums by tensor, each worked out when it is asked for; tensors that were left out are not in it.

        Args:
            centres: where it centres a tensor, the result is `Σ (x - m)(x - m)ᵀ` with the centre `m` of each call's
                group: what the product's integers really see.
        """
        return _Matrices(self._squares, self._sums, centres)

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file, in one step."""
        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        arrays: list[Callable[[], NDArray[np.float64]]] = []
        for name, square in sorted(self._squares.items()):
            keys = sorted(key for tensor, key in self._sums if tensor == name)
            specs[f"{name}|squares"] = ("float64", square.shape)
            specs[f"{name}|keys"] = ("float64", (len(keys),))
            specs[f"{name}|sums"] = ("float64", (len(keys), len(square) + 1))
            arrays += [
                partial(np.asarray, square), partial(np.array, keys, np.float64), partial(self._sums_of, name, keys)
            ]
        write_tensors(path, specs, (array() for array in arrays))

    def _sums_of(self, name: str, keys: Sequence[float]) -> NDArray[np.float64]:
        return np.stack([self._sums[name, key] for key in keys])

    def restore(self, path: Path) -> None:
        """Become what was saved; the matrices stay in the file until they are read or added to.

        Raises:
            DataError: the file is damaged or of another kind.
        """
        flat = map_tensors(path)
        self._squares, self._sums = {}, {}
        for name in self._tensors:
            if f"{name}|squares" in flat:
                self._squares[name] = flat[f"{name}|squares"]
                for key, sums in zip(flat[f"{name}|keys"], flat[f"{name}|sums"], strict=True):
                    self._sums[name, float(key)] = sums


class _Matrices(Mapping[str, NDArray[np.float64]]):
    """Matrices around the centres: one in memory at a time, as far as the reader lets go of them."""

    def __init__(
        self, squares: Mapping[str, NDArray[np.float64]], sums: Mapping[tuple[str, float], NDArray[np.float64]],
        centres: ScaleTable | None,
    ) -> None:
        self._squares, self._sums, self._centres = squares, sums, centres

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        found = self._squares[name]
        centres = self._centres
        centre = centres.of(name).centre if centres is not None and name in centres.tensors else None
        if centres is None or centre is None:
            return found
        for key in sorted(key for tensor, key in self._sums if tensor == name):
            row, sums = centre[centres.partition.group_of(key)].astype(np.float64), self._sums[name, key]
            cross = np.outer(sums[:-1], row)
            found = found - cross - cross.T + sums[-1] * np.outer(row, row)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._squares)

    def __len__(self) -> int:
        return len(self._squares)
