"""Second moments of activations, which weight rounding needs.

A Gram matrix `Σ x xᵀ` says which weight errors of a layer matter.  Of each call only some rows are taken, evenly
spaced, so that collecting costs little beside the calls themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.table import ScaleTable
from quantempo.contracts.tensor_file import map_tensors, write_tensors

ROWS_PER_CALL = 256
MAX_CHANNELS = 2048
"""Tensors with more channels are left out: their matrices would outweigh the model (32 MiB each at this size)."""
PANEL = 192
"""Rows of a panel: as small as products stay fast."""


class GramCollector:
    """Sums `x xᵀ` per tensor over calls, in float64.

    The matrices are symmetric.  What is worked out, held and written is the upper triangle, as panels of `PANEL` rows
    from their diagonal to the right edge: little more than half of everything.

    Args:
        tensors: the tensors to watch; their last axis is the channel axis.
    """

    def __init__(self, tensors: Iterable[str]) -> None:
        self._squares: dict[str, NDArray[np.float64]] = {}
        self._sums: dict[tuple[str, float], NDArray[np.float64]] = {}
        self._products: dict[int, NDArray[np.float32]] = {}  # memory for one call's products, by channels
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
            chosen = np.ascontiguousarray(rows[:: -(-len(rows) // ROWS_PER_CALL)], np.float32)
            self._add_square(name, self._product(chosen))
            # Channel sums, and the number of rows behind them.
            self._add_sums((name, key), np.append(chosen.sum(0, np.float64), float(len(chosen))))

    def _product(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The panels of `rowsᵀ rows`, in memory that the next call writes again."""
        channels = rows.shape[1]
        panels = panels_of(channels)
        if channels not in self._products:
            self._products[channels] = np.empty(panels[-1][1].stop, np.float32)
        product = self._products[channels]
        for (start, stop), place in panels:
            out = product[place].reshape(stop - start, channels - start)
            np.matmul(rows[:, start:stop].T, rows[:, start:], out=out)
        return product

    def _add_square(self, name: str, panels: NDArray[Any]) -> None:
        known = self._squares.get(name)
        if known is None:
            self._squares[name] = panels.astype(np.float64)
        elif known.flags.writeable:
            known += panels
        else:  # still in the file that it was restored from
            self._squares[name] = known + panels

    def _add_sums(self, key: tuple[str, float], sums: NDArray[np.float64]) -> None:
        known = self._sums.get(key)
        self._sums[key] = sums if known is None else known + sums

    def add(self, other: GramCollector) -> None:
        """Add what another collector of the same tensors saw."""
        for name, square in other._squares.items():
            self._add_square(name, square)
        for key, sums in other._sums.items():
            self._add_sums(key, sums)

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
            specs[f"{name}|sums"] = ("float64", (len(keys), len(self._sums[name, keys[0]])))
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


@cache
def panels_of(channels: int) -> tuple[tuple[tuple[int, int], slice], ...]:
    """Rows of each panel of a matrix, and the panel's place among the numbers that are held."""
    found, at = [], 0
    for start in range(0, channels, PANEL):
        stop = min(start + PANEL, channels)
        size = (stop - start) * (channels - start)
        found.append(((start, stop), slice(at, at + size)))
        at += size
    return tuple(found)


def whole(square: NDArray[np.float64], channels: int) -> NDArray[np.float64]:
    """The symmetric matrix behind its panels."""
    matrix = np.empty((channels, channels))
    for (start, stop), place in panels_of(channels):
        panel = square[place].reshape(stop - start, channels - start)
        matrix[start:stop, start:] = panel
        matrix[start:, start:stop] = panel.T
        # Sums of the same products need not have the same last bit on both sides of the diagonal.
        corner = np.triu(panel[:, : stop - start])
        matrix[start:stop, start:stop] = corner + np.triu(corner, 1).T
    return matrix


class _Matrices(Mapping[str, NDArray[np.float64]]):
    """Matrices around the centres: one in memory at a time, as far as the reader lets go of them."""

    def __init__(
        self, squares: Mapping[str, NDArray[np.float64]], sums: Mapping[tuple[str, float], NDArray[np.float64]],
        centres: ScaleTable | None,
    ) -> None:
        self._squares, self._sums, self._centres = squares, sums, centres

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        keys = sorted(key for tensor, key in self._sums if tensor == name)
        found = whole(self._squares[name], len(self._sums[name, keys[0]]) - 1)
        centres = self._centres
        centre = centres.of(name).centre if centres is not None and name in centres.tensors else None
        if centres is None or centre is None:
            return found
        for key in keys:
            row, sums = centre[centres.partition.group_of(key)].astype(np.float64), self._sums[name, key]
            cross = np.outer(sums[:-1], row)
            found += sums[-1] * np.outer(row, row) - cross - cross.T
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._squares)

    def __len__(self) -> int:
        return len(self._squares)
