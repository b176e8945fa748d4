"""Reduce tapped tensors to statistics as they come, with memory that depends on the number of cells alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from quantempo.contracts.codec import canonical_json, parse_json
from quantempo.contracts.stats import StatsKey, TensorStats
from quantempo.errors import CalibrationError, DataError, NonFiniteActivation

FORMAT = "quantempo-stats-2"
Array = NDArray[Any]


class ExactSum:
    """A sum of floats without rounding, so that it does not depend on the order of its terms.

    The value is kept as a few floats that do not overlap (J. R. Shewchuk, Adaptive precision floating-point
    arithmetic, 1997); two are usually enough.
    """

    __slots__ = ("parts",)

    def __init__(self, parts: Iterable[float] = ()) -> None:
        self.parts: list[float] = []
        for part in parts:
            self.add(part)

    def add(self, term: float) -> None:
        """Add one float."""
        kept = []
        for part in self.parts:
            big, small = (term, part) if abs(term) >= abs(part) else (part, term)
            total = big + small
            rest = small - (total - big)
            if rest:
                kept.append(rest)
            term = total
        self.parts = [*kept, term]

    def canonical(self) -> list[float]:
        """The one list of floats for this value: the rounded value, then the rounded rest, and so on."""
        rest, found = list(self.parts), []
        while value := fsum(rest):
            found.append(value)
            rest.append(-value)
        return found

    def __float__(self) -> float:
        return fsum(self.parts)


class _Cell:
    """Statistics so far, with sums that do not depend on the order of the merges."""

    __slots__ = ("square", "stats", "total")

    def __init__(self, stats: TensorStats, total: ExactSum, square: ExactSum) -> None:
        self.stats, self.total, self.square = stats, total, square

    @staticmethod
    def of(stats: TensorStats) -> _Cell:
        return _Cell(stats, ExactSum([stats.total]), ExactSum([stats.total_square]))

    def copy(self) -> _Cell:
        return _Cell(self.stats, ExactSum(self.total.parts), ExactSum(self.square.parts))

    def add(self, other: _Cell) -> None:
        self.stats = self.stats.merge(other.stats)
        for mine, theirs in ((self.total, other.total), (self.square, other.square)):
            for part in theirs.parts:
                mine.add(part)

    def result(self) -> TensorStats:
        return replace(self.stats, total=float(self.total), total_square=float(self.square))


class StatsCollector:
    """Statistics of one graph's tapped tensors, one cell per (tensor, group key, branch).

    Counts, ranges and sums are the same to the last bit in whatever order, and by however many collectors, the same
    calls were observed.

    Args:
        graph: name of the graph variant.
        tensors: what every call has to deliver.
        by_channel: those of them whose channels (the last axis) get ranges of their own.
    """

    def __init__(self, graph: str, tensors: Sequence[str], by_channel: Iterable[str] = ()) -> None:
        if not tensors:
            raise CalibrationError(
                f"statistics of graph {graph!r}",
                found="no tensor to observe",
                wanted="at least one",
                cause="the plan keeps every site in float",
                remedy="quantize at least one site",
            )
        self.graph = graph
        self.tensors = tuple(sorted(set(tensors)))
        self.by_channel = frozenset(by_channel)
        self._cells: dict[StatsKey, _Cell] = {}
        self._samples: Counter[tuple[float, str]] = Counter()

    def observe(self, key: float, taps: Mapping[str, Array], *, seeds: Sequence[int], branch: str = "") -> None:
        """Add one denoiser call.

        Args:
            key: the call's group key.
            taps: tensor name to values; names that were not asked for are ignored.
            seeds: of the samples in the batch, in order of rows; the rows may repeat them for a second branch.
            branch: name of the branch, where branches run as calls of their own.

        Raises:
            NonFiniteActivation: a tensor holds NaN or infinity; names tensor, timestep and seed.
            CalibrationError: a tensor is missing or empty.
        """
        key = float(key)
        for tensor in self.tensors:
            values = taps.get(tensor)
            if values is None or not np.size(values):
                raise CalibrationError(
                    f"calibration, tensor {tensor!r} at timestep {key:g}",
                    found="no such tap" if values is None else "a tap without values",
                    wanted="its values in every call",
                    cause="the engine does not offer this inner tensor as an output",
                    remedy="open the engine with this tensor among its extra outputs",
                )
            try:
                cell = _Cell.of(TensorStats.of(values, channels=tensor in self.by_channel))
            except ValueError as error:
                raise _non_finite(tensor, key, np.asarray(values, np.float32), seeds) from error
            name = StatsKey(self.graph, tensor, key, branch)
            if name in self._cells:
                self._cells[name].add(cell)
            else:
                self._cells[name] = cell
        self._samples[key, branch] += len(seeds)

    def merge(self, *others: StatsCollector) -> StatsCollector:
        """A collector that holds what this one and the others observed: other calls, other tensors, or both.

        Raises:
            CalibrationError: the collectors belong to different graphs.
        """
        everyone = (self, *others)
        by_channel = frozenset().union(*(c.by_channel for c in everyone))
        merged = StatsCollector(self.graph, sorted({t for c in everyone for t in c.tensors}), by_channel)
        for collector in (self, *others):
            if collector.graph != self.graph:
                raise CalibrationError(
                    f"statistics of graph {self.graph!r}",
                    found=f"statistics of graph {collector.graph!r}",
                    wanted="the same graph",
                    cause="results of different runs were mixed up",
                    remedy="merge the collectors of each graph apart",
                )
            for name, cell in collector._cells.items():
                if name in merged._cells:
                    merged._cells[name].add(cell)
                else:
                    merged._cells[name] = cell.copy()
        # Tensors may have been split over passes: then the same samples were seen several times.
        for tensors in {c.tensors for c in (self, *others)}:
            seen: Counter[tuple[float, str]] = Counter()
            for collector in (c for c in (self, *others) if c.tensors == tensors):
                seen.update(collector._samples)
            merged._samples |= seen
        return merged

    def at(self, keys: Iterable[float]) -> StatsCollector:
        """A collector that saw the calls at some group keys alone."""
        wanted = frozenset(keys)
        found = StatsCollector(self.graph, self.tensors, self.by_channel)
        found._cells = {name: cell.copy() for name, cell in self._cells.items() if name.key in wanted}
        found._samples = Counter({name: n for name, n in self._samples.items() if name[0] in wanted})
        return found

    def stats(self) -> dict[StatsKey, TensorStats]:
        """All cells in canonical order: by tensor, key, branch.

        Raises:
            CalibrationError: a tensor lacks a cell that another one has, or nothing was observed.
        """
        self._check_complete()
        return {name: self._cells[name].result() for name in self._names()}

    def samples(self) -> dict[float, int]:
        """How many samples visited each group key, by ascending key."""
        most: dict[float, int] = {}
        for (key, _), n in sorted(self._samples.items()):
            most[key] = max(most.get(key, 0), n)
        return most

    def largest(self) -> dict[str, float]:
        """The largest magnitude of each tensor over all calls."""
        found = dict.fromkeys(self.tensors, 0.0)
        for name, cell in self._cells.items():
            found[name.tensor] = max(found[name.tensor], abs(cell.stats.low), abs(cell.stats.high))
        return found

    def _names(self) -> list[StatsKey]:
        return sorted(self._cells, key=lambda name: (name.tensor, name.key, name.branch))

    def _check_complete(self) -> None:
        calls = {(name.key, name.branch) for name in self._cells}
        if not calls:
            raise CalibrationError(
                f"statistics of graph {self.graph!r}",
                found="no observed call",
                wanted="at least one",
                cause="the trajectories never ran this graph",
                remedy="calibrate with a program that calls it",
            )
        for tensor in self.tensors:
            for key, branch in sorted(calls):
                if StatsKey(self.graph, tensor, key, branch) not in self._cells:
                    raise CalibrationError(
                        f"statistics of graph {self.graph!r}, tensor {tensor!r}",
                        found=f"no statistics at timestep {key:g}" + (f", branch {branch!r}" if branch else ""),
                        wanted="a cell for every call that was observed",
                        cause="one of several passes over the trajectories failed or is missing",
                        remedy="run the missing pass, then merge again",
                    )

    def save(self, path: Path, *, note: Mapping[str, Any] | None = None) -> None:
        """Write everything to one safetensors file, in one step: the old file or the new one, nothing between.

        Args:
            path: its folder must exist.
            note: JSON data that comes back from `read_note`.
        """
        names = self._names()
        cells = [self._cells[name] for name in names]
        samples = sorted(self._samples.items())
        branches = sorted({name.branch for name in names})
        counts = [cell.stats.counts for cell in cells]
        flat = np.concatenate(counts) if counts else np.zeros(0, np.uint64)
        arrays: dict[str, Array] = {
            "tensor": np.array([self.tensors.index(name.tensor) for name in names], np.int32),
            "key": np.array([name.key for name in names], np.float64),
            "branch": np.array([branches.index(name.branch) for name in names], np.int32),
            "count": np.array([cell.stats.count for cell in cells], np.int64),
            "low": np.array([cell.stats.low for cell in cells], np.float64),
            "high": np.array([cell.stats.high for cell in cells], np.float64),
            "exponent": np.array([cell.stats.exponent for cell in cells], np.int32),
            "first": np.array([cell.stats.first for cell in cells], np.int64),
            "bins": np.array([len(c) for c in counts], np.int32),
            "counts": flat.astype(np.uint32) if not flat.size or flat.max() < 2**32 else flat,
            "sample_key": np.array([key for (key, _), _ in samples], np.float64),
            "sample_branch": np.array([branches.index(branch) for (_, branch), _ in samples], np.int32),
            "sample_count": np.array([n for _, n in samples], np.int64),
        }
        for field in ("total", "square"):
            parts = [getattr(cell, field).canonical() for cell in cells]
            arrays[field] = np.array([value for part in parts for value in part], np.float64)
            arrays[f"{field}_parts"] = np.array([len(part) for part in parts], np.int32)
        ranges = [cell.stats.channels for cell in cells]
        arrays["channels"] = np.array([0 if r is None else r.shape[1] for r in ranges], np.int32)
        arrays["channel_ranges"] = np.concatenate(
            [r.reshape(-1) for r in ranges if r is not None] or [np.zeros(0, np.float32)]
        )
        header = {
            "format": FORMAT, "graph": self.graph, "tensors": self.tensors, "by_channel": sorted(self.by_channel),
            "branches": branches, "note": note,
        }
        # One metadata entry: the order of several is not fixed.
        _write_atomically(path, save(arrays, metadata={"quantempo": canonical_json(header)}))

    @staticmethod
    def load(path: Path) -> StatsCollector:
        """The collector that `save` wrote.

        Raises:
            DataError: the file is damaged or of another kind.
        """
        header, arrays = _read(path)
        try:
            collector = StatsCollector(header["graph"], header["tensors"], header["by_channel"])
            stops = np.cumsum(arrays["bins"])
            channel_stops = np.cumsum(2 * arrays["channels"].astype(np.int64))
            sums = {name: _split(arrays[name], arrays[f"{name}_parts"]) for name in ("total", "square")}
            for i, stop in enumerate(stops):
                tensor, branch = header["tensors"][arrays["tensor"][i]], header["branches"][arrays["branch"][i]]
                stats = TensorStats(
                    int(arrays["count"][i]), float(arrays["low"][i]), float(arrays["high"][i]),
                    fsum(sums["total"][i]), fsum(sums["square"][i]), int(arrays["exponent"][i]),
                    int(arrays["first"][i]), arrays["counts"][stop - arrays["bins"][i] : stop].astype(np.uint64),
                    _channels(arrays["channel_ranges"], int(channel_stops[i]), int(arrays["channels"][i])),
                )  # fmt: skip
                name = StatsKey(collector.graph, tensor, float(arrays["key"][i]), branch)
                collector._cells[name] = _Cell(stats, ExactSum(sums["total"][i]), ExactSum(sums["square"][i]))
            visits = zip(arrays["sample_key"], arrays["sample_branch"], arrays["sample_count"], strict=True)
            collector._samples = Counter({(float(key), header["branches"][at]): int(n) for key, at, n in visits})
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        return collector


def read_note(path: Path) -> Any:
    """What was passed to `StatsCollector.save` as `note`."""
    return _read(path)[0].get("note")


def _channels(flat: Array, stop: int, channels: int) -> NDArray[np.float32] | None:
    return flat[stop - 2 * channels : stop].reshape(2, channels) if channels else None


def _split(flat: Array, lengths: Array) -> list[list[float]]:
    stops = np.cumsum(lengths)
    return [[float(v) for v in flat[stop - n : stop]] for stop, n in zip(stops, lengths, strict=True)]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    header = parse_json(metadata.get("quantempo", "null"), str(path))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _damaged(path, "no header of " + FORMAT)
    return header, arrays


def _damaged(path: Path, found: str) -> DataError:
    return DataError(
        str(path),
        found=found,
        wanted="calibration statistics",
        cause="the file is damaged, or of another kind or version",
        remedy="delete it and calibrate again",
    )


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _non_finite(tensor: str, key: float, values: Array, seeds: Sequence[int]) -> NonFiniteActivation:
    """Name the samples whose rows are not finite; rows are samples, or samples twice (two branches in one call)."""
    guilty = list(seeds)
    finite = np.isfinite(values)
    if values.ndim and len(values) in (len(seeds), 2 * len(seeds)):
        rows = np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))
        guilty = [seeds[i] for i in sorted({int(row) % len(seeds) for row in rows})]
    bad = values[~finite]
    what = "NaN" if np.isnan(bad).any() else "infinity"
    who = ("seed " if len(guilty) == 1 else "seeds ") + ", ".join(str(seed) for seed in guilty[:8])
    return NonFiniteActivation(
        f"calibration, tensor {tensor!r} at timestep {key:g}, {who}" + (", …" if len(guilty) > 8 else ""),
        found=f"{what} in {bad.size} of {values.size} values",
        wanted="finite values",
        cause="the float model overflows on this sample, for example with weights made for another number type",
        remedy="sample this seed with the float model; if it fails there too, leave the seed out or repair the model",
    )
