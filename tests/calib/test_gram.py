"""Gram matrices of activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantempo.calib.gram import MAX_CHANNELS, PANEL, ROWS_PER_CALL, GramCollector, panels_of
from quantempo.contracts.partition import Partition
from quantempo.contracts.table import ScaleTable, TensorScales

RNG = np.random.default_rng(0)


def test_sums_outer_products_over_calls_and_rows() -> None:
    first, second = (RNG.standard_normal((2, 5, 8)).astype(np.float32) for _ in range(2))
    collector = GramCollector(["x"])
    collector.observe(0.0, {"x": first, "y": second})
    collector.observe(1.0, {"x": second})
    rows = np.concatenate([first.reshape(-1, 8), second.reshape(-1, 8)])
    np.testing.assert_allclose(collector.matrices()["x"], rows.T @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, PANEL - 1, PANEL, PANEL + 1, 3 * PANEL - 5])
def test_the_upper_panels_are_the_whole_matrix(channels: int, tmp_path: Path) -> None:
    values = RNG.standard_normal((2, 7, channels)).astype(np.float32)
    collector = GramCollector(["x"])
    collector.observe(0.0, {"x": values})
    rows, found = values.reshape(-1, channels), collector.matrices()["x"]
    np.testing.assert_allclose(found, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert np.array_equal(found, found.T)
    collector.save(tmp_path / "saved")
    again = GramCollector(["x"])
    again.restore(tmp_path / "saved")
    assert np.array_equal(again.matrices()["x"], found)


def test_little_more_than_half_of_a_matrix_is_held() -> None:
    assert panels_of(2048)[-1][1].stop < 0.56 * 2048**2


def test_collectors_add_up_without_touching_each_other() -> None:
    values = RNG.standard_normal((2, 5, 8)).astype(np.float32)
    first, second, total = (GramCollector(["x"]) for _ in range(3))
    first.observe(0.0, {"x": values})
    second.observe(0.0, {"x": values})
    total.add(first)
    total.add(second)
    assert np.array_equal(first.matrices()["x"], second.matrices()["x"])
    assert np.array_equal(total.matrices()["x"], 2 * first.matrices()["x"])


def test_rows_of_a_large_call_are_taken_evenly() -> None:
    values = RNG.standard_normal((8, ROWS_PER_CALL, 4)).astype(np.float32)
    collector = GramCollector(["x"])
    collector.observe(0.0, {"x": values})
    chosen = values.reshape(-1, 4)[::8]
    assert len(chosen) == ROWS_PER_CALL
    np.testing.assert_allclose(collector.matrices()["x"], chosen.T @ chosen, rtol=1e-4, atol=1e-3)


def test_a_tensor_with_very_many_channels_is_left_out() -> None:
    collector = GramCollector(["wide", "x"])
    collector.observe(0.0, {"wide": np.ones((1, MAX_CHANNELS + 1), np.float32), "x": np.ones((1, 2), np.float32)})
    assert sorted(collector.matrices()) == ["x"]


def test_centred_sums_are_those_of_what_is_left_after_each_groups_centre() -> None:
    calls = {key: RNG.standard_normal((2, 5, 4)).astype(np.float32) + key for key in (0.0, 1.0, 2.0)}
    collector = GramCollector(["x"])
    for key, values in calls.items():
        collector.observe(key, {"x": values})
    centre = RNG.standard_normal((2, 4)).astype(np.float32)
    one = np.ones(2, np.float32)
    partition = Partition((1.5,), 0.0, 2.0)
    table = ScaleTable(partition, {"x": TensorScales(one, np.zeros(2, np.int32), one, centre)})
    rows = np.concatenate([values.reshape(-1, 4) - centre[int(key > 1.5)] for key, values in calls.items()])
    np.testing.assert_allclose(collector.matrices(table)["x"], rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_a_collector_that_saw_nothing_has_no_matrices() -> None:
    assert GramCollector(["x"]).matrices() == {}


def test_a_saved_collector_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    calls = [(float(i % 2), RNG.standard_normal((2, 5, 8)).astype(np.float32)) for i in range(4)]
    whole, half = GramCollector(["x"]), GramCollector(["x"])
    for key, values in calls[:2]:
        whole.observe(key, {"x": values})
        half.observe(key, {"x": values})
    half.save(tmp_path / "half")
    again = GramCollector(["x"])
    again.restore(tmp_path / "half")
    for key, values in calls[2:]:
        whole.observe(key, {"x": values})
        again.observe(key, {"x": values})
    whole.save(tmp_path / "whole")
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    assert np.array_equal(again.matrices()["x"], whole.matrices()["x"])
