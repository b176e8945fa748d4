from __future__ import annotations

import numpy as np
import pytest

from quantempo.calib.ranges import METHODS, quantizer_for
from quantempo.calib.tables import build_table, cells_by_tensor, floored, group_stats
from quantempo.contracts.partition import Partition
from quantempo.contracts.stats import StatsKey, TensorStats
from quantempo.errors import CalibrationError, RequestError, ScaleMissing

RNG = np.random.default_rng(1)


def _stats(scales: dict[float, float], tensor: str = "x", branch: str = "") -> dict[StatsKey, TensorStats]:
    return {
        StatsKey("full", tensor, key, branch): TensorStats.of(
            (np.abs(RNG.standard_normal(2000)) * scale - 0.1).astype(np.float32)
        )
        for key, scale in scales.items()
    }


STATS = {**_stats({0.0: 1.0, 50.0: 2.0, 100.0: 8.0}), **_stats({0.0: 3.0, 50.0: 3.0, 100.0: 3.0}, "y")}
PARTITION = Partition((25.0, 75.0), 0.0, 100.0)


@pytest.mark.parametrize("method", METHODS)
def test_each_group_has_the_range_of_its_own_cells_in_both_forms(method: str) -> None:
    table = build_table(STATS, PARTITION, method, {"x": 8, "y": 6})
    scales = table.of("x")
    assert scales.scale.dtype == np.float32
    assert scales.zero_point.dtype == np.int32
    assert 6 < scales.scale[2] / scales.scale[0] < 10
    for group, key in enumerate((0.0, 50.0, 100.0)):
        cell = STATS[StatsKey("full", "x", key)]
        expected = quantizer_for(*METHODS[method](cell, 8, False), 8, False)
        assert (scales.scale[group], scales.zero_point[group]) == expected
        assert scales.symmetric_scale[group] == quantizer_for(*METHODS[method](cell, 8, True), 8, True)[0]
    assert table.of("y").zero_point.max() < 2**6


def test_cells_of_a_group_are_merged_across_keys_and_branches() -> None:
    stats = {**_stats({0.0: 1.0, 50.0: 2.0}, branch="cond"), **_stats({0.0: 5.0, 50.0: 1.0}, branch="uncond")}
    merged = group_stats(cells_by_tensor(stats, ["x"])["x"], Partition.single(0.0, 50.0))
    assert len(merged) == 1
    assert merged[0].count == 8000
    assert merged[0].high == max(cell.high for cell in stats.values())


def test_the_table_does_not_depend_on_the_order_of_cells() -> None:
    turned = dict(reversed(list(STATS.items())))
    one, two = (build_table(s, PARTITION, "clip", {"y": 8, "x": 8}).arrays() for s in (STATS, turned))
    assert list(one) == list(two)
    for name, array in one.items():
        assert np.array_equal(array, two[name])


def test_a_tensor_without_statistics_is_an_error() -> None:
    with pytest.raises(ScaleMissing, match="tensor 'z': found no statistics") as caught:
        build_table(STATS, PARTITION, "clip", {"x": 8, "z": 8})
    assert "calibrate with this plan" in str(caught.value)


def test_a_group_without_an_observed_key_is_an_error() -> None:
    crowded = Partition((25.0, 75.0, 90.0), 0.0, 100.0)
    with pytest.raises(ScaleMissing, match=r"tensor 'x', group 2: found no observed timestep in \[75, 90\)"):
        build_table(STATS, crowded, "minmax", {"x": 8})


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(RequestError, match="did you mean 'minmax'"):
        build_table(STATS, PARTITION, "minimax", {"x": 8})


def test_graph_variants_need_a_choice() -> None:
    other = {StatsKey("reuse", k.tensor, k.key): v for k, v in _stats({0.0: 9.0, 50.0: 9.0, 100.0: 9.0}).items()}
    with pytest.raises(CalibrationError, match="full, reuse"):
        build_table({**STATS, **other}, PARTITION, "minmax", {"x": 8})
    full = build_table({**STATS, **other}, PARTITION, "minmax", {"x": 8}, graph="full")
    assert np.array_equal(full.of("x").scale, build_table(STATS, PARTITION, "minmax", {"x": 8}).of("x").scale)


def test_constant_tensors_get_a_usable_scale() -> None:
    stats = {StatsKey("full", "c", k): TensorStats.of(np.zeros(4, np.float32)) for k in (0.0, 50.0, 100.0)}
    scales = build_table(stats, PARTITION, "clip", {"c": 8}).of("c")
    assert np.all(np.isfinite(1 / scales.scale))
    assert np.all(np.isfinite(1 / scales.symmetric_scale))


def test_centred_tensors_are_scaled_for_what_is_left_after_the_middle_of_each_channel() -> None:
    offsets = np.array([-30.0, 5.0, 0.0, 90.0], np.float32)
    values = {
        key: (RNG.uniform(-1, 1, (40, 4)) * width + offsets * key).astype(np.float32)
        for key, width in ((1.0, 1.0), (2.0, 3.0))
    }
    stats = {StatsKey("full", "x", key): TensorStats.of(v, channels=True) for key, v in values.items()}
    scales = build_table(stats, Partition((1.5,), 1.0, 2.0), "minmax", {"x": 8}, centred=["x"]).of("x")
    assert scales.centre is not None
    for group, seen in enumerate(values.values()):
        np.testing.assert_allclose(scales.centre[group], (seen.min(0) + seen.max(0)) / 2, rtol=1e-6, atol=1e-6)
        left = seen - scales.centre[group]
        assert scales.scale[group] == quantizer_for(left.min(), left.max(), 8, False)[0]
        assert scales.scale[group] < TensorStats.of(seen).high / 255


def test_a_method_that_clips_clips_centred_values_by_the_same_share() -> None:
    values = np.concatenate([RNG.standard_normal(40000), [40.0]]).astype(np.float32).reshape(-1, 1)
    cell = TensorStats.of(values, channels=True)
    low, high = METHODS["mse"](cell, 4, False)
    assert high < 0.5 * cell.high, "the case must be one that is clipped"
    scales = build_table({StatsKey("full", "x", 0.0): cell}, Partition.single(0.0, 0.0), "mse", {"x": 4}, centred=["x"])
    half = (cell.high - cell.low) / 2
    expected, _ = quantizer_for(-half * low / cell.low, half * high / cell.high, 4, False)
    np.testing.assert_allclose(scales.of("x").scale[0], expected, rtol=1e-5)


def test_centring_needs_the_ranges_of_channels() -> None:
    with pytest.raises(ScaleMissing, match="tensor 'x': found no ranges of its channels"):
        build_table(STATS, PARTITION, "minmax", {"x": 8}, centred=["x"])


def test_tensors_that_were_zero_throughout_are_named_with_their_groups() -> None:
    dead = {StatsKey("full", "d", key, ""): TensorStats.of(np.zeros(8, np.float32)) for key in (0.0, 50.0)}
    alive = {StatsKey("full", "d", 100.0, ""): TensorStats.of(np.ones(8, np.float32))}
    table = build_table({**STATS, **dead, **alive}, PARTITION, "minmax", {"x": 8, "y": 8, "d": 8})
    assert floored(table) == {"d": 2}
    assert floored(build_table(STATS, PARTITION, "minmax", {"x": 8, "y": 8})) == {}
