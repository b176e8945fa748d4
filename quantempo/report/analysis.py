"""What a bundle's scales do to each quantized tensor, from the calibration statistics and the bundle's own tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from quantempo.calib.ranges import quantization_error
from quantempo.calib.tables import cells_by_tensor, group_stats
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.stats import StatsKey, TensorStats
from quantempo.contracts.table import ScaleTable, TensorScales

SQNR_CAP_DB = 100.0
"""Shown for a tensor without error, such as one that is always zero."""


@dataclass(frozen=True)
class TensorNoise:
    """Signal to quantization noise of one tensor in each group, and who reads it.

    Args:
        tensor: value name in the float graph.
        sites: ids of the quantized sites that read it.
        sqnr_db: per group; mean square of the tensor over the mean square of its rounding and clipping error.
    """

    tensor: str
    sites: tuple[str, ...]
    sqnr_db: tuple[float, ...]

    @property
    def relative_noise(self) -> float:
        """Noise power over signal power, mean over the groups: what tensors are ranked by."""
        return float(np.mean([10 ** (-value / 10) for value in self.sqnr_db]))


@dataclass(frozen=True)
class Drift:
    """Range of a tensor over the calibrated group keys."""

    tensor: str
    sites: tuple[str, ...]
    keys: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Widest over narrowest range."""
        widths = [high - low for low, high in zip(self.low, self.high, strict=True)]
        return max(widths) / max(min(widths), 1e-30)


def noise_by_tensor(
    stats: Mapping[StatsKey, TensorStats], plan: QuantPlan, table: ScaleTable
) -> tuple[TensorNoise, ...]:
    """The noise of every quantized tensor under a table, the worst first.

    Args:
        stats: one cell per (graph, tensor, key, branch), of one graph.
        plan: which sites are quantized, and to how many bits.
        table: the scales in use.

    Raises:
        ScaleMissing: the table or the statistics lack a tensor of the plan.
    """
    readers = readers_of(plan)
    cells = cells_by_tensor(stats, sorted(readers))
    found = []
    for tensor, sites in readers.items():
        settings = plan.settings(next(site for site in plan.sites if site.id == sites[0]))
        assert settings is not None
        groups = group_stats(cells[tensor], table.partition, tensor)
        scales = table.of(tensor)
        values = [_sqnr_db(group, scales, at, settings.activation_bits) for at, group in enumerate(groups)]
        found.append(TensorNoise(tensor, sites, tuple(values)))
    return tuple(sorted(found, key=lambda noise: (-noise.relative_noise, noise.tensor)))


def drifts(stats: Mapping[StatsKey, TensorStats], plan: QuantPlan, count: int = 6) -> tuple[Drift, ...]:
    """The tensors whose range changes most over the timesteps."""
    readers = readers_of(plan)
    found = []
    for tensor, cells in cells_by_tensor(stats, sorted(readers)).items():
        keys = tuple(sorted(cells))
        low, high = (tuple(getattr(cells[key], end) for key in keys) for end in ("low", "high"))
        found.append(Drift(tensor, readers[tensor], keys, low, high))
    return tuple(sorted(found, key=lambda drift: (-drift.ratio, drift.tensor))[:count])


def readers_of(plan: QuantPlan) -> dict[str, tuple[str, ...]]:
    """The quantized sites by the tensor that they read."""
    readers: dict[str, tuple[str, ...]] = {}
    for site in plan.quantized():
        readers[site.tensor] = (*readers.get(site.tensor, ()), site.id)
    return readers


def _sqnr_db(stats: TensorStats, scales: TensorScales, group: int, bits: int) -> float:
    scale, zero_point = float(scales.scale[group]), int(scales.zero_point[group])
    if scales.centre is None:
        noise = quantization_error(stats, scale, zero_point, bits)
    else:
        noise = scale * scale / 12 + _clipped(stats, scales, group, bits)
    signal = stats.total_square / stats.count
    if signal <= 0 or noise <= signal * 10 ** (-SQNR_CAP_DB / 10):
        return SQNR_CAP_DB
    return 10 * math.log10(signal / noise)


def _clipped(stats: TensorStats, scales: TensorScales, group: int, bits: int) -> float:
    """Mean squared clipping error of a centred tensor, whose histogram is that of the values before centring.

    Each channel is taken to be spread evenly over its range: an end that lies `e` beyond the last level of a channel
    `w` wide contributes `e³ / 3w`.
    """
    assert stats.channels is not None
    assert scales.centre is not None
    low, high = stats.channels.astype(np.float64) - scales.centre[group]
    scale, zero_point = float(scales.scale[group]), int(scales.zero_point[group])
    width = np.maximum(high - low, 1e-30)
    above = np.clip(high - (2**bits - 1 - zero_point) * scale, 0, width)
    below = np.clip(-zero_point * scale - low, 0, width)
    return float(((above**3 + below**3) / (3 * width)).mean())
