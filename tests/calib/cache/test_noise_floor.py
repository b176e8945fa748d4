from __future__ import annotations

import numpy as np
import pytest

from quantempo.calib.cache.noise_floor import judge, relative_changes
from quantempo.calib.cache.schedules import FeatureChanges


def _drift(calls: int = 12, speed: float = 0.1) -> FeatureChanges:
    """Features of power 1 that turn by a fixed angle per call."""
    changes = FeatureChanges(calls, calls)
    for call in range(calls):
        changes.observe(call, np.array([[np.cos(speed * call), np.sin(speed * call)]]))
    return changes


def test_relative_change_is_that_of_the_definition() -> None:
    relative = relative_changes(_drift())
    assert relative[2, 3] == pytest.approx(4 * np.sin(0.15) ** 2, rel=1e-9)
    assert np.isinf(relative[10, 5])


def test_noise_above_the_change_forbids_extrapolation() -> None:
    curvature = np.full(12, 1e-6)
    loud = judge((0, 3, 6, 9), _drift(), [1.0] * 12, curvature)
    assert {e.order for e in loud.entries} == {0}
    quiet = judge((0, 3, 6, 9), _drift(), [1e-9] * 12, curvature)
    assert {e.order for e in quiet.entries if e.refresh} == {1}
    assert {e.order for e in quiet.entries if not e.refresh} == {0}  # no two refreshes yet


def test_extrapolation_that_multiplies_the_noise_beyond_its_gain_is_not_taken() -> None:
    entry = judge((0, 3, 6), _drift(), [0.006] * 12, np.zeros(12)).entries[2]
    assert (entry.call, entry.refresh) == (4, 3)
    assert entry.multiplied == pytest.approx(0.006 * ((4 / 3) ** 2 + (1 / 3) ** 2))
    assert entry.change > entry.noise
    assert entry.order == int(entry.multiplied < entry.change + entry.noise)


def test_cap_follows_from_noise_and_tolerance() -> None:
    def cap(noise: float, tolerance: float) -> int:
        return judge((0, 6), _drift(), [noise] * 12, tolerance=tolerance).max_consecutive

    # 4·sin²(0.05·k) is 0.0100, 0.0399, 0.0893, 0.1579 for k = 1 to 4
    assert cap(0.0, 0.05) == 2
    assert cap(0.0, 0.005) == 0
    assert cap(0.1, 0.005) == 3  # below the noise a reuse costs nothing
    assert cap(0.0, 100.0) == 11
    assert cap(0.0, 0.09) >= cap(0.0, 0.05)


def test_without_curvature_everything_is_order_zero_and_all_inputs_are_recorded() -> None:
    found = judge((0, 2), _drift(4), [0.1, 0.2, 0.3, 0.4])
    assert [(e.call, e.refresh, e.noise, e.order) for e in found.entries] == [(1, 0, 0.1, 0), (3, 2, 0.3, 0)]
    assert all(e.curvature is None for e in found.entries)
