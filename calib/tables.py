"""Statistics and a partition to a scale table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.ranges import SCALE_FLOOR, method_named, quantizer_for
from quantempo.contracts.partition import Partition
from quantempo.contracts.stats import StatsKey, TensorStats
from quantempo.contracts.table import ScaleTable, TensorScales
from quantempo.errors import CalibrationError, ScaleMissing

Cells = Mapping[StatsKey, TensorStats]


def cells_by_tensor(
    stats: Cells, tensors: Sequence[str], graph: str | None = None
) -> dict[str, dict[float, TensorStats]]:
    """The cells of each tensor by ascending group key, branches merged.

    Args:
        stats: all cells.
        tensors: value names in the float graph.
        graph: the graph variant; `None` where the cells hold only one.

    Raises:
        ScaleMissing: a tensor has no cell.
        CalibrationError: several graph variants and no choice among them.
    """
    graphs = sorted({key.graph for key in stats})
    if graph is None and len(graphs) > 1:
        raise CalibrationError(
            "scale table",
            found="statistics of the graphs " + ", ".join(graphs),
            wanted="one graph",
            cause="variants of a model see different activations and need tables of their own",
            remedy="pass graph=NAME",
        )
    found: dict[str, dict[float, TensorStats]] = {tensor: {} for tensor in tensors}
    for key in sorted(stats, key=lambda k: (k.tensor, k.key, k.branch, k.graph)):
        if key.tensor in found and (graph is None or key.graph == graph):
            cells = found[key.tensor]
            cells[key.key] = cells[key.key].merge(stats[key]) if key.key in cells else stats[key]
    for tensor, cells in found.items():
        if not cells:
            raise ScaleMissing(
                f"calibration, tensor {tensor!r}",
                found=f"no statistics among {len({k.tensor for k in stats})} tensors",
                wanted="at least one observed call",
                cause="the tensor was not tapped, or the graph that holds it never ran",
                remedy="calibrate with this plan",
            )
    return found


def group_stats(
    cells: Mapping[float, TensorStats], partition: Partition, tensor: str = "tensor"
) -> tuple[TensorStats, ...]:
    """The cells of one tensor merged into groups, in ascending order of the key.

    Raises:
        ScaleMissing: a group holds no observed key.
    """
    groups: list[list[TensorStats]] = [[] for _ in range(partition.groups)]
    for key in sorted(cells):
        groups[partition.group_of(key)].append(cells[key])
    for index, members in enumerate(groups):
        if not members:
            ends = (float("-inf"), *partition.edges, float("inf"))
            raise ScaleMissing(
                f"scale table, tensor {tensor!r}, group {index}",
                found=f"no observed {partition.unit} in [{ends[index]:g}, {ends[index + 1]:g})",
                wanted="at least one",
                cause=f"the partition has {partition.groups} groups, and calibration saw {len(cells)} keys",
                remedy="use fewer groups, or calibrate with more steps",
            )
    return tuple(reduce(TensorStats.merge, members) for members in groups)


def build_table(
    stats: Cells,
    partition: Partition,
    method: str,
    bits_of: Mapping[str, int],
    *,
    centred: Collection[str] = (),
    graph: str | None = None,
) -> ScaleTable:
    """Scales of every tensor in every group, in the asymmetric and in the symmetric form.

    Args:
        stats: one cell per (graph, tensor, key, branch).
        partition: which keys share a row.
        method: name of a range method.
        bits_of: the tensors that need scales, with their number of bits.
        centred: tensors whose channels are shifted to the middle of their ranges before they are quantized.
        graph: the graph variant; `None` where the cells hold only one.

    Raises:
        ScaleMissing: a tensor has no cell, a group has no observed key, or a centred tensor has no ranges of channels.
        RequestError: there is no such method.
    """
    search = method_named(method)
    cells = cells_by_tensor(stats, sorted(bits_of), graph)
    tensors = {}
    for tensor in sorted(bits_of):
        bits = bits_of[tensor]
        groups = group_stats(cells[tensor], partition, tensor)
        intervals = [[search(group, bits, symmetric) for group in groups] for symmetric in (False, True)]
        centre = None
        if tensor in centred:
            centre = np.stack([_centre(group, tensor) for group in groups])
            intervals = [
                [_around(group, row, *ends) for group, row, ends in zip(groups, centre, found, strict=True)]
                for found in intervals
            ]
        skewed = [quantizer_for(*ends, bits, False) for ends in intervals[0]]
        middle = [quantizer_for(*ends, bits, True) for ends in intervals[1]]
        tensors[tensor] = TensorScales(
            np.array([scale for scale, _ in skewed], np.float32),
            np.array([point for _, point in skewed], np.int32),
            np.array([scale for scale, _ in middle], np.float32),
            centre,
        )
    return ScaleTable(partition, tensors)


def _centre(stats: TensorStats, tensor: str) -> NDArray[np.float32]:
    """The middle of each channel's range."""
    if stats.channels is None:
        raise ScaleMissing(
            f"scale table, tensor {tensor!r}", found="no ranges of its channels", wanted="one for each channel",
            cause="the statistics were collected for a plan that does not centre this tensor",
            remedy="calibrate with this plan",
        )
    low, high = stats.channels.astype(np.float64)
    middle: NDArray[np.float32] = ((low + high) / 2).astype(np.float32)
    return middle


def _around(stats: TensorStats, centre: NDArray[np.float32], low: float, high: float) -> tuple[float, float]:
    """The interval for `x - centre`: its exact range, clipped by as much as a method clips the range of `x`.

    The histogram is that of `x`, so a method's choice can be carried over as a ratio alone.
    """
    assert stats.channels is not None
    lows, highs = stats.channels.astype(np.float64) - centre
    return (
        float(lows.min()) * (low / stats.low if stats.low < 0 else 1.0),
        float(highs.max()) * (high / stats.high if stats.high > 0 else 1.0),
    )


def floored(table: ScaleTable) -> dict[str, int]:
    """In how many groups a tensor was zero throughout calibration, so that its scale is the least one; by tensor."""
    counts = {name: int((scales.scale <= np.float32(SCALE_FLOOR)).sum()) for name, scales in table.tensors.items()}
    return {name: count for name, count in sorted(counts.items()) if count}
