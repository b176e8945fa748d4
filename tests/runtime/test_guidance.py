from __future__ import annotations

import numpy as np
import pytest

from quantempo.runtime.guidance import Combine, plan_rows
from quantempo.runtime.rng import standard_normal

SHAPE = (3, 4, 5)


def pair(batch: int, guided: int) -> tuple[np.ndarray, np.ndarray]:
    return standard_normal(1, 0, 0, (batch, *SHAPE)), standard_normal(2, 0, 0, (guided, *SHAPE))


def test_conditional_rows_come_first_and_only_guided_samples_have_unconditional_ones() -> None:
    (rows,) = plan_rows([1.0, 4.0, 0.5, 2.0], "batched")
    assert rows.samples == (0, 1, 2, 3, 1, 3)
    assert rows.branches == ("conditional",) * 4 + ("unconditional",) * 2


def test_split_makes_two_calls_and_one_where_nothing_is_guided() -> None:
    first, second = plan_rows([1.0, 4.0], "split")
    assert (first.samples, second.samples) == ((0, 1), (1,))
    assert len(plan_rows([1.0, 1.0], "split")) == 1
    assert [len(r) for r in plan_rows([1.0, 1.0], "batched")] == [2]


def test_combined_is_float64_rounded_once() -> None:
    cond, null = pair(2, 2)
    out = np.empty_like(cond)
    Combine([1.5, 7.25], 0.0, SHAPE)(cond, null, out)
    for sample, scale in enumerate((1.5, 7.25)):
        c, u = cond[sample].astype(np.float64), null[sample].astype(np.float64)
        assert np.array_equal(out[sample], (u + scale * (c - u)).astype(np.float32))


def test_unguided_rows_of_a_mixed_batch_pass_unchanged() -> None:
    cond, null = pair(3, 1)
    out = np.empty_like(cond)
    Combine([1.0, 3.0, 1.0], 0.0, SHAPE)(cond, null, out)
    assert np.array_equal(out[[0, 2]], cond[[0, 2]])
    assert np.array_equal(out[1], (null[0] + 3.0 * (cond[1].astype(np.float64) - null[0])).astype(np.float32))


def test_full_rescale_gives_the_deviation_of_the_conditional_branch() -> None:
    cond, null = pair(1, 1)
    out = np.empty_like(cond)
    Combine([7.0], 1.0, SHAPE)(cond, null, out)
    assert out.std(ddof=1) == pytest.approx(cond.std(ddof=1), rel=1e-6)


def test_rescale_mixes_as_in_the_paper_with_the_sample_deviation() -> None:
    """The formula of diffusers' `rescale_noise_cfg`, whose `std` divides by n - 1."""
    cond, null = pair(2, 2)
    out = np.empty_like(cond)
    Combine([5.0, 5.0], 0.7, SHAPE)(cond, null, out)
    c, u = cond.astype(np.float64), null.astype(np.float64)
    plain = u + 5.0 * (c - u)
    ratio = c.std((1, 2, 3), ddof=1, keepdims=True) / plain.std((1, 2, 3), ddof=1, keepdims=True)
    assert np.abs(out - (0.7 * plain * ratio + 0.3 * plain)).max() < 1e-6
