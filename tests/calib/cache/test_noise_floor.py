from __future__ import annotations

import numpy as np
import pytest

from quantempo.calib.cache import noise_floor
from quantempo.calib.cache.noise_floor import FloorFacts, facts_of, judge, relative_changes
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


def _facts(noise: float | list[float], calls: int = 12) -> FloorFacts:
    each = [noise] * calls if isinstance(noise, float) else noise
    return facts_of([_drift(calls)], [each])


def test_noise_above_the_change_leaves_earlier_refreshes_out() -> None:
    assert {e.order for e in judge((0, 3, 6, 9), _facts(1.0)).entries} == {0}
    assert {e.order for e in judge((0, 3, 6, 9), _facts(1e-9)).entries} == {1}
    # 4·sin²(0.05·k) is 0.0100 and 0.0399 for k = 1 and 2
    assert [e.order for e in judge((0, 3), _facts(0.02)).entries][:2] == [0, 1]


def test_reach_follows_from_the_change_and_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def cap(noise: float, tolerance: float) -> int:
        monkeypatch.setattr(noise_floor, "TOLERANCE", tolerance)
        return judge((0, 6), _facts(noise)).max_consecutive

    # 4·sin²(0.05·k) is 0.0100, 0.0399, 0.0893, 0.1579 for k = 1 to 4
    assert cap(0.0, 0.05) == 2
    assert cap(0.0, 0.005) == 0
    assert cap(0.1, 0.005) == 3  # below the noise a reuse costs nothing
    assert cap(0.0, 100.0) == 11
    monkeypatch.setattr(noise_floor, "TOLERANCE", 0.05)
    assert _facts(0.0).legal((0, 3, 6, 9))
    assert not _facts(0.0).legal((0, 4, 6, 9))
    assert _facts(0.0).cap() == 2
    assert _facts(0.1).cap() == 3


def test_all_inputs_are_recorded_and_features_count_alike() -> None:
    found = judge((0, 2), _facts([0.1, 0.2, 0.3, 0.4], 4))
    assert [(e.call, e.refresh, e.noise) for e in found.entries] == [(1, 0, 0.1), (3, 2, 0.3)]
    large = FeatureChanges(4, 4)
    for call in range(4):
        large.observe(call, 1e3 * np.ones((1, 50)) * (1 + call))
    both = facts_of([_drift(4), large], [[0.1] * 4, [0.3] * 4])
    assert both.noise[0] == pytest.approx(0.2)
    assert both.changes[0, 1] == pytest.approx((4 * np.sin(0.05) ** 2 + 0.25) / 2, rel=1e-9)
