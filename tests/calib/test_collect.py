from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quantempo.calib.collect import ExactSum, StatsCollector, read_note
from quantempo.contracts.stats import StatsKey, TensorStats
from quantempo.errors import CalibrationError, DataError, NonFiniteActivation

Call = tuple[float, dict[str, NDArray[np.float32]], tuple[int, ...]]


def _calls(n: int = 6) -> list[Call]:
    rng = np.random.default_rng(5)
    return [
        (
            float(key % 3) * 50.0,
            {t: (rng.standard_normal((2, 3, 7)) * 10.0**scale).astype(np.float32) for scale, t in enumerate("ab")},
            (2 * key, 2 * key + 1),
        )
        for key in range(n)
    ]


def _collect(calls: list[Call], tensors: str = "ab") -> StatsCollector:
    collector = StatsCollector("full", list(tensors))
    for key, taps, seeds in calls:
        collector.observe(key, taps, seeds=seeds)
    return collector


def _bytes(collector: StatsCollector, folder: Path) -> bytes:
    collector.save(folder / "stats.safetensors")
    return (folder / "stats.safetensors").read_bytes()


def test_a_cell_holds_all_values_of_its_calls() -> None:
    calls = _calls()
    stats = _collect(calls).stats()
    assert list(stats) == sorted(stats, key=lambda k: (k.tensor, k.key))
    for name, cell in stats.items():
        values = np.concatenate([taps[name.tensor] for key, taps, _ in calls if key == name.key])
        whole = TensorStats.of(values)
        assert np.array_equal(cell.counts, whole.counts)
        assert (cell.count, cell.low, cell.high) == (whole.count, whole.low, whole.high)
        assert cell.total_square == pytest.approx(whole.total_square, rel=1e-12)


def test_the_file_does_not_depend_on_order_or_on_who_observed_what(tmp_path: Path) -> None:
    calls = _calls()
    expected = _bytes(_collect(calls), tmp_path)
    assert _bytes(_collect(calls[::-1]), tmp_path) == expected
    parts = [_collect(calls[i::3]) for i in range(3)]
    for first, *rest in itertools.permutations(parts):
        assert _bytes(first.merge(*rest), tmp_path) == expected
    assert _bytes(_collect(calls, "b").merge(_collect(calls, "a")), tmp_path) == expected
    assert _bytes(_collect(calls[:-1]), tmp_path) != expected


def test_merge_leaves_its_parts_alone(tmp_path: Path) -> None:
    one, two = _collect(_calls()[:3]), _collect(_calls()[3:])
    before = _bytes(one, tmp_path)
    one.merge(two)
    assert _bytes(one, tmp_path) == before
    assert one.merge(one).stats()[StatsKey("full", "a", 0.0)].count == 2 * one.stats()[StatsKey("full", "a", 0.0)].count


def test_loading_gives_back_every_bit(tmp_path: Path) -> None:
    collector = _collect(_calls())
    first = _bytes(collector, tmp_path)
    loaded = StatsCollector.load(tmp_path / "stats.safetensors")
    assert _bytes(loaded, tmp_path) == first
    assert loaded.samples() == collector.samples() == {0.0: 4, 50.0: 4, 100.0: 4}
    for (name, a), (other, b) in zip(collector.stats().items(), loaded.stats().items(), strict=True):
        assert name == other
        assert (a.total, a.total_square, a.exponent, a.first) == (b.total, b.total_square, b.exponent, b.first)
        assert b.counts.dtype == np.uint64


def test_observing_goes_on_after_loading_as_if_never_interrupted(tmp_path: Path) -> None:
    calls = _calls()
    _collect(calls[:4]).save(tmp_path / "half.safetensors", note={"done": 4})
    assert read_note(tmp_path / "half.safetensors") == {"done": 4}
    resumed = StatsCollector.load(tmp_path / "half.safetensors")
    for key, taps, seeds in calls[4:]:
        resumed.observe(key, taps, seeds=seeds)
    assert _bytes(resumed, tmp_path) == _bytes(_collect(calls), tmp_path)


def test_branches_have_cells_of_their_own_and_samples_count_once() -> None:
    collector = StatsCollector("full", ["a"])
    for branch, value in (("cond", 1.0), ("uncond", -1.0)):
        collector.observe(10.0, {"a": np.full((2, 3), value, np.float32)}, seeds=(1, 2), branch=branch)
    stats = collector.stats()
    assert stats[StatsKey("full", "a", 10.0, "cond")].low == 1.0
    assert stats[StatsKey("full", "a", 10.0, "uncond")].high == -1.0
    assert collector.samples() == {10.0: 2}


@pytest.mark.parametrize(("row", "seed"), [(0, 11), (1, 22), (2, 33), (3, 11), (5, 33)])
def test_non_finite_activation_names_tensor_timestep_and_the_seed_of_the_row(row: int, seed: int) -> None:
    taps = {"a": np.zeros((6, 4), np.float32), "b": np.zeros((6, 4), np.float32)}
    taps["b"][row, 2] = np.nan
    with pytest.raises(NonFiniteActivation, match=f"tensor 'b' at timestep 950, seed {seed}: found NaN in 1 of 24"):
        StatsCollector("full", ["a", "b"]).observe(950.0, taps, seeds=(11, 22, 33))


def test_non_finite_activation_without_rows_per_sample_names_all_seeds() -> None:
    with pytest.raises(NonFiniteActivation, match=r"seeds 11, 22: found infinity"):
        StatsCollector("full", ["a"]).observe(1.0, {"a": np.full(5, np.inf, np.float32)}, seeds=(11, 22))


def test_missing_and_empty_taps_are_errors() -> None:
    collector = StatsCollector("full", ["a", "b"])
    with pytest.raises(CalibrationError, match="tensor 'b' at timestep 3: found no such tap"):
        collector.observe(3.0, {"a": np.ones(2, np.float32)}, seeds=(1,))
    with pytest.raises(CalibrationError, match="without values"):
        collector.observe(3.0, {"a": np.ones(0, np.float32)}, seeds=(1,))


def test_a_missing_cell_is_an_error_after_merging_passes() -> None:
    calls = _calls()
    merged = _collect(calls, "a").merge(_collect(calls[:2], "b"))
    with pytest.raises(CalibrationError, match=r"tensor 'b': found no statistics at timestep 100"):
        merged.stats()


def test_nothing_observed_and_nothing_to_observe_are_errors() -> None:
    with pytest.raises(CalibrationError, match="no observed call"):
        StatsCollector("full", ["a"]).stats()
    with pytest.raises(CalibrationError, match="no tensor to observe"):
        StatsCollector("full", [])


def test_graphs_are_not_mixed() -> None:
    with pytest.raises(CalibrationError, match="statistics of graph 'reuse'"):
        _collect(_calls()).merge(StatsCollector("reuse", ["a"]))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named_as_damaged(keep: int, tmp_path: Path) -> None:
    data = _bytes(_collect(_calls()), tmp_path)
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[:keep])
    with pytest.raises(DataError, match=r"cut.safetensors: found .*\n.*delete it|cut.safetensors") as caught:
        StatsCollector.load(path)
    assert "calibrate again" in str(caught.value)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _bytes(_collect(_calls()), tmp_path)

    def fail(self: Path, data: bytes) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        _collect(_calls()[:2]).save(tmp_path / "stats.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
    assert (tmp_path / "stats.safetensors").read_bytes() == old


def test_exact_sum_does_not_depend_on_order() -> None:
    terms = [1e16, 1.0, -1e16, 1e-9, 3.3, -7e5, 2.0**-60]
    sums = {tuple(ExactSum(order).canonical()) for order in itertools.permutations(terms)}
    assert len(sums) == 1
    assert float(ExactSum(terms)) == pytest.approx(1 + 1e-9 + 3.3 - 7e5, rel=1e-15)
    assert ExactSum([1.0, -1.0]).canonical() == []
