from __future__ import annotations

import math

import pytest

from quantempo.contracts.codec import canonical_json, from_data, to_data
from quantempo.contracts.partition import Partition

THREE = Partition((10.0, 20.5), 0.0, 30.0)


@pytest.mark.parametrize(
    ("key", "group"),
    [(-1e9, 0), (0.0, 0), (math.nextafter(10.0, 0), 0), (10.0, 1), (20.0, 1), (20.5, 2), (30.0, 2), (1e9, 2)],
)
def test_intervals_are_half_open_and_every_key_has_a_group(key: float, group: int) -> None:
    assert THREE.group_of(key) == group


def test_groups_are_one_more_than_edges() -> None:
    assert THREE.groups == 3
    assert Partition.single(5.0, 5.0).groups == 1
    assert Partition.single(0.0, 9.0).group_of(-4.0) == 0


@pytest.mark.parametrize("edges", [(2.0, 1.0), (1.0, 1.0), (0.0, 3.0, 2.0)])
def test_edges_that_do_not_ascend_are_refused(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascend strictly"):
        Partition(edges, 0.0, 9.0)


def test_a_range_upside_down_is_refused() -> None:
    with pytest.raises(ValueError, match=r"low 9\.0 above high 0\.0"):
        Partition((), 9.0, 0.0)


def test_keys_far_outside_the_calibrated_range_are_told_apart() -> None:
    assert THREE.calibrated(0.0)
    assert THREE.calibrated(30.0)
    assert THREE.calibrated(35.0)
    assert not THREE.calibrated(100.0)
    assert not THREE.calibrated(-40.0)


def test_json_round_trip() -> None:
    assert from_data(Partition, to_data(THREE), "p") == THREE
    assert '"unit"' not in canonical_json(THREE)
    assert from_data(Partition, to_data(Partition((), 0.0, 1.0, "sigma")), "p").unit == "sigma"
