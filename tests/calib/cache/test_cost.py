from __future__ import annotations

import math
from dataclasses import replace

import pytest

from quantempo.calib.cache.cost import Candidate, choose, float_psnr_at, loses_to_fewer_steps, pareto, predicted_ms
from quantempo.contracts.program import Call, Decide, StepProgram
from quantempo.errors import RequestError

FEWER = [
    Candidate(f"float, {n} steps", "fewer_steps", 10.0 * n, p) for n, p in ((5, 20.0), (10, 30.0), (20, 40.0))
]
PLANS = [
    Candidate("every:1", "plan", 100.0, 50.0),
    Candidate("every:2", "plan", 60.0, 45.0),
    Candidate("every:3", "plan", 45.0, 35.0),
    Candidate("bad", "plan", 150.0, 34.0),
]
ALL = [*FEWER, *PLANS]


def _program(graphs: list[str], decide: Decide | None = None) -> StepProgram:
    calls = tuple(
        Call(float(i), {}, (), i, graph=g, decide=None if g == "full" else decide) for i, g in enumerate(graphs)
    )
    return StepProgram("DDIMScheduler", len(graphs), calls)


def test_predicted_time_is_the_sum_of_the_calls() -> None:
    program = _program(["full", "reuse.0", "reuse.1", "full"])
    times = {"full": 10.0, "reuse.0": 3.0, "reuse.1": 5.0}
    assert predicted_ms(program, times, overhead_ms=0.5) == 28.0 + 2.0
    with pytest.raises(RequestError, match=r"reuse\.1"):
        predicted_ms(program, {"full": 1.0, "reuse.0": 1.0})


def test_predicted_time_of_decisions_at_run_time() -> None:
    program = _program(["full", "reuse.0"], Decide("probe", 0.1))
    times = {"full": 10.0, "reuse.0": 2.0}
    assert predicted_ms(program, times, probe_ms=1.0, skipped=0.75) == 10 + 1 + 0.75 * 2 + 0.25 * 10


def test_front_has_nothing_that_is_beaten() -> None:
    assert [c.name for c in pareto(PLANS)] == ["every:3", "every:2", "every:1"]
    for a in pareto(ALL):
        assert not any(b.milliseconds <= a.milliseconds and b.psnr_db > a.psnr_db for b in ALL)


def test_measured_time_counts_where_there_is_one() -> None:
    slow = replace(PLANS[1], measured_ms=500.0)
    assert slow.milliseconds == 500.0
    assert slow not in pareto([*PLANS, slow])


def test_float_with_fewer_steps_is_interpolated() -> None:
    assert float_psnr_at(49.0, ALL) == -math.inf
    assert float_psnr_at(50.0, ALL) == 20.0
    assert float_psnr_at(75.0, ALL) == 25.0
    assert float_psnr_at(1e9, ALL) == 40.0
    assert float_psnr_at(1e9, PLANS) == -math.inf


def test_a_plan_that_loses_to_fewer_steps_is_never_chosen() -> None:
    assert loses_to_fewer_steps(PLANS[3], ALL)
    with pytest.raises(RequestError, match="loses to the float model"):
        choose([*FEWER, PLANS[3]])
    # At 150 ms the float model has 35 dB: the plan's 34 dB are fast enough and good enough, and still not taken.
    with pytest.raises(RequestError, match="cache budget"):
        choose([*FEWER, PLANS[3]], min_psnr=30.0, max_ms=200.0)


def test_budgets() -> None:
    assert choose(ALL, min_psnr=40.0).name == "every:2"
    assert choose(ALL, max_ms=70.0).name == "every:2"
    assert choose(ALL, max_ms=1e6).name == "every:1"
    assert choose(ALL, min_psnr=30.0, max_ms=50.0).name == "every:3"
    assert choose(ALL).name == "every:3"  # the only one faster than any row of the float model: nothing to lose to


def test_impossible_budgets_name_the_nearest_policy() -> None:
    with pytest.raises(RequestError, match=r"nearest policy is every:1: 50\.0 dB"):
        choose(ALL, min_psnr=60.0)
    with pytest.raises(RequestError, match="nearest policy is every:3"):
        choose(ALL, max_ms=10.0)
    with pytest.raises(RequestError, match="nearest policy is every:2"):
        choose(ALL, min_psnr=48.0, max_ms=70.0)
