from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from quantempo.calib import partition as module
from quantempo.calib.partition import (
    MAX_GROUPS,
    PARTITIONS,
    Evidence,
    auto,
    choose_partition,
    interval_losses,
    optimal,
    predicted_loss,
    single,
    solve,
    uniform,
)  # fmt: skip
from quantempo.calib.ranges import quantization_error
from quantempo.calib.tables import build_table
from quantempo.contracts.partition import Partition
from quantempo.contracts.stats import StatsKey, TensorStats
from quantempo.errors import CalibrationError, RequestError

BASE = np.random.default_rng(2).standard_normal(3000)
Gain = Callable[[float], float]


def _evidence(tensors: Mapping[str, Gain], keys: int = 8, bits: int = 8, **more: Mapping[float, int]) -> Evidence:
    cells = {
        StatsKey("full", name, float(k * 50)): TensorStats.of((BASE * gain(k / (keys - 1))).astype(np.float32))
        for name, gain in tensors.items()
        for k in range(keys)
    }
    return Evidence(cells, dict.fromkeys(tensors, bits), **more)  # type: ignore[arg-type]


DRIFT: Mapping[str, Gain] = {"a": lambda t: 0.2 + 3 * t, "b": lambda t: math.exp(-2 * t), "c": lambda t: 1.0}
DRIFTING = _evidence(DRIFT)
STILL = _evidence({"a": lambda t: 1.0, "b": lambda t: 4.0})


def _brute_force(losses: NDArray[np.float64], groups: int) -> float:
    n = len(losses) - 1
    return min(
        sum(losses[a, b] for a, b in itertools.pairwise((0, *inner, n)))
        for inner in itertools.combinations(range(1, n), groups - 1)
    )


@pytest.mark.parametrize("groups", range(1, 9))
def test_dynamic_programming_equals_brute_force(groups: int) -> None:
    losses = DRIFTING.losses
    loss, borders = solve(losses, range(9), 8)[groups - 1]
    assert loss == pytest.approx(_brute_force(losses, groups), rel=1e-12)
    assert loss == pytest.approx(sum(losses[a, b] for a, b in itertools.pairwise(borders)), rel=1e-12)
    assert len(borders) == groups + 1
    assert predicted_loss(DRIFTING, optimal(DRIFTING, groups)) == pytest.approx(loss, rel=1e-12)


def test_dynamic_programming_equals_brute_force_on_any_costs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        losses = np.triu(rng.uniform(size=(8, 8)), 1)
        losses[np.tril_indices(8)] = np.inf
        for groups, (loss, _) in enumerate(solve(losses, range(8), 7), start=1):
            assert loss == pytest.approx(_brute_force(losses, groups))


def test_splitting_an_interval_never_raises_the_loss() -> None:
    losses = interval_losses(tuple(DRIFTING.tensors["a"].values()), 8)
    for a, m, b in itertools.combinations(range(9), 3):
        assert losses[a, m] + losses[m, b] <= losses[a, b] * (1 + 1e-12)


def test_loss_falls_with_nested_and_with_optimal_groups() -> None:
    nested = [predicted_loss(DRIFTING, uniform(DRIFTING, groups)) for groups in (1, 2, 4, 8)]
    best = [predicted_loss(DRIFTING, optimal(DRIFTING, groups)) for groups in (1, 2, 4, 8)]
    for losses in (nested, best):
        assert all(a > b for a, b in itertools.pairwise(losses))
    assert all(o <= u * (1 + 1e-12) for o, u in zip(best, nested, strict=True))


def _measured(evidence: Evidence, partition: Partition) -> dict[str, float]:
    """Inverse SQNR per tensor, of the table that would really be built."""
    table = build_table(evidence.stats, partition, "clip", evidence.bits_of)
    sums = dict.fromkeys(evidence.bits_of, 0.0)
    for name, cell in evidence.stats.items():
        scales, group = table.of(name.tensor), partition.group_of(name.key)
        error = quantization_error(
            cell, float(scales.scale[group]), int(scales.zero_point[group]), evidence.bits_of[name.tensor]
        )
        sums[name.tensor] += error * cell.count / cell.total_square
    return sums


def test_the_loss_is_that_of_the_built_table_with_a_group_per_key_and_a_lower_bound_with_fewer() -> None:
    for groups in (1, 2, 4, 8):
        partition = optimal(DRIFTING, groups)
        measured = sum(_measured(DRIFTING, partition).values())
        predicted = predicted_loss(DRIFTING, partition)
        assert measured / 1.6 < predicted < measured * 1.05
        if groups == 8:
            assert predicted == pytest.approx(measured, rel=0.05)


def test_groups_gain_more_at_fewer_bits_and_nothing_where_nothing_drifts() -> None:
    gains = {}
    for bits in (8, 6):
        evidence = _evidence(DRIFT, bits=bits)
        one = _measured(evidence, single(evidence))
        many = _measured(evidence, optimal(evidence, 8))
        assert many["a"] < one["a"] / 2
        assert many["c"] == pytest.approx(one["c"], rel=1e-6)
        gains[bits] = sum(one.values()) - sum(many.values())
    assert gains[6] > 4 * gains[8] > 0


def test_auto_gives_each_drifting_key_its_group_with_edges_midway() -> None:
    partition = auto(_evidence({"a": lambda t: math.exp(4 * t)}))
    assert partition.edges == tuple(25.0 + 50.0 * i for i in range(7))
    assert (partition.low, partition.high) == (0.0, 350.0)


def test_auto_merges_everything_where_nothing_drifts() -> None:
    assert auto(STILL).groups == 1


def test_auto_merges_only_the_still_part() -> None:
    partition = auto(_evidence({"a": lambda t: 1.0 if t < 0.5 else math.exp(8 * (t - 0.5))}))
    assert partition.group_of(0.0) == partition.group_of(150.0)
    groups = [partition.group_of(key) for key in (150.0, 200.0, 250.0, 300.0, 350.0)]
    assert groups == sorted(set(groups))


def test_auto_stays_under_its_loss() -> None:
    finest = predicted_loss(DRIFTING, optimal(DRIFTING, 8))
    assert 10 * math.log10(predicted_loss(DRIFTING, auto(DRIFTING)) / finest) <= module.MERGE_LOSS_DB


def test_auto_keeps_to_the_limit_of_groups() -> None:
    many = _evidence({"a": lambda t: math.exp(6 * t)}, keys=MAX_GROUPS + 6)
    assert auto(many).groups <= MAX_GROUPS
    assert auto(many, 5).groups == 5


def test_auto_merges_keys_that_few_samples_visited() -> None:
    samples = {float(k * 50): 32 for k in range(8)} | {100.0: 2, 350.0: 7}
    partition = auto(_evidence({"a": lambda t: math.exp(4 * t)}, samples=samples))
    assert partition.group_of(100.0) == partition.group_of(150.0) != partition.group_of(50.0)
    assert partition.group_of(350.0) == partition.group_of(300.0)
    assert partition.groups == 6


def test_auto_with_few_samples_everywhere_is_one_group() -> None:
    samples = {float(k * 50): 0 for k in range(8)} | {0.0: 1}
    assert auto(_evidence({"a": lambda t: math.exp(4 * t)}, samples=samples)).groups == 1


def test_single_and_uniform_cover_the_calibrated_range() -> None:
    assert single(DRIFTING) == Partition((), 0.0, 350.0)
    assert uniform(DRIFTING, 2).edges == (175.0,)


def test_one_calibrated_key_is_enough() -> None:
    cells = {StatsKey("full", "a", 7.0): TensorStats.of(BASE.astype(np.float32))}
    evidence = Evidence(cells, {"a": 8})
    assert auto(evidence) == single(evidence) == optimal(evidence, 1) == Partition((), 7.0, 7.0)


def test_a_silent_call_does_not_break_the_loss() -> None:
    evidence = _evidence({"a": lambda t: max(0.0, t - 0.3)})
    assert np.all(np.isfinite(evidence.losses[np.triu_indices(9, 1)]))
    assert auto(evidence).groups >= 2


def test_words_of_the_user() -> None:
    assert choose_partition("optimal:3", DRIFTING) == choose_partition("3", DRIFTING) == choose_partition(3, DRIFTING)
    assert choose_partition("uniform:4", DRIFTING) == uniform(DRIFTING, 4)
    assert choose_partition("single", DRIFTING).groups == 1
    assert choose_partition("auto", DRIFTING) == auto(DRIFTING)
    assert set(PARTITIONS) == {"auto", "single", "uniform", "optimal"}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("autp", "did you mean 'auto'"),
        ("optimal", "write for example optimal:8"),
        ("uniform:x", "not a number"),
        ("optimal:9", "9 groups for 8 calibrated timesteps"),
        ("0", "wanted 1 to 8"),
        ("", "known: auto"),
    ],
)
def test_bad_words_are_refused(spec: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        choose_partition(spec, DRIFTING)


def test_uniform_refuses_an_interval_without_a_key() -> None:
    cells = {
        StatsKey("full", "a", key): TensorStats.of(BASE.astype(np.float32)) for key in (0.0, 1.0, 2.0, 100.0, 101.0)
    }
    with pytest.raises(RequestError, match="holds no calibrated key"):
        uniform(Evidence(cells, {"a": 8}), 3)


def test_tensors_seen_at_different_keys_are_refused() -> None:
    cells = {StatsKey("full", name, key): TensorStats.of(BASE.astype(np.float32)) for name, key in (("a", 0), ("b", 1))}
    with pytest.raises(CalibrationError, match="2 different sets of keys"):
        _ = Evidence(cells, {"a": 8, "b": 8}).keys


def test_a_new_partition_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def halves(evidence: Evidence, groups: int) -> Partition:
        return Partition((evidence.keys[len(evidence.keys) // 2],), evidence.keys[0], evidence.keys[-1])

    monkeypatch.setattr(module, "PARTITIONS", {**PARTITIONS, "halves": halves})
    assert choose_partition("halves", DRIFTING).edges == (200.0,)
