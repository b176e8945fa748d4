from __future__ import annotations

import numpy as np
import pytest

from quantempo.calib.cache.reuse_errors import ReuseErrors, probed_calls
from quantempo.calib.cache.schedules import cost_of, every, programmed
from quantempo.errors import RequestError

CALLS, LONGEST, INTERVAL = 8, 4, 2
RNG = np.random.default_rng(0)
PREDICTIONS = RNG.standard_normal((CALLS, 2, 3, 4, 4))
FED = RNG.standard_normal((CALLS, 2, 3, 4, 4))
NOISE = RNG.standard_normal((CALLS, CALLS, 2, 3, 4, 4)) * np.linspace(0.05, 0.4, CALLS)[:, None, None, None, None, None]


def observed(noise: np.ndarray = NOISE) -> ReuseErrors:
    errors = ReuseErrors(CALLS, LONGEST, INTERVAL)
    for call in range(CALLS):
        for refresh in range(max(0, call - LONGEST + 1), call):
            errors.observe(
                call, refresh, PREDICTIONS[call] + noise[call, refresh], list(PREDICTIONS[:call]), FED[call],
                PREDICTIONS[call],
            )
    return errors


def test_errors_are_the_mean_squares_of_what_reuse_gets_wrong() -> None:
    found = observed().errors(corrected=False)
    assert found[5, 2] == pytest.approx(np.mean(NOISE[5, 3] ** 2), rel=1e-9)
    assert np.isnan(found[1, 2])
    assert not found[:, 0].any()


def test_a_correction_never_leaves_more_than_there_was() -> None:
    plain, corrected = (observed().errors(c) for c in (False, True))
    tried = ~np.isnan(plain)
    assert (corrected[tried] <= plain[tried] * (1 + 1e-9)).all()
    assert corrected[tried].sum() < plain[tried].sum()


def test_an_error_that_the_history_explains_costs_nothing_once_corrected() -> None:
    noise = np.zeros_like(NOISE)
    for call in range(CALLS):
        for refresh in range(call):
            noise[call, refresh] = 0.3 * PREDICTIONS[refresh] - 0.2 * FED[call]
    errors = observed(noise)
    assert np.nanmax(errors.errors(corrected=True)) < 1e-6 * np.nanmax(errors.errors(corrected=False))


def test_gains_turn_errors_of_predictions_into_errors_of_final_latents() -> None:
    errors = observed()
    single = errors.errors(corrected=False)[:, 1]
    gains = errors.gains({call: 3.0 * float(np.sqrt(single[call])) for call in range(1, CALLS)})
    np.testing.assert_allclose(gains, 9.0)
    some = errors.gains({1: float(np.sqrt(single[1])), 5: 10.0 * float(np.sqrt(single[5]))})
    assert some[3] == pytest.approx(10.0)  # between 1 and 100, in logarithms
    assert errors.gains({}).tolist() == [1.0] * CALLS


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_costs_are_sums_over_a_group_and_unknown_groups_are_out_of_reach(exponent: float) -> None:
    errors, gains = observed(), np.linspace(1, 2, CALLS)
    costs, plain = errors.costs(gains, False, exponent), errors.errors(False)
    wanted = sum((gains[2 + k] * plain[2 + k, k]) ** exponent for k in range(1, 3))
    assert costs[2, 5] == pytest.approx(wanted)
    assert costs[2, 3] == 0
    assert np.isinf(costs[0, 5])
    best = programmed(costs, INTERVAL, (1, LONGEST))
    assert cost_of(costs, best) <= cost_of(costs, every(CALLS, INTERVAL))


def test_calls_to_probe_are_dense_at_the_end() -> None:
    assert probed_calls(8, 24) == tuple(range(1, 8))
    found = probed_calls(50, 24)
    assert len(found) == len(set(found)) == 24
    assert found[0] == 1
    assert found[-8:] == tuple(range(42, 50))


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(RequestError, match="groups of up to 1"):
        ReuseErrors(8, 1, 2)
