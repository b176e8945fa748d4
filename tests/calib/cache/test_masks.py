from __future__ import annotations

import numpy as np
import pytest

from quantempo.calib.cache.masks import SublayerErrors, cut_of, cuts_of, greedy, total_error
from quantempo.contracts.cache import SublayerCut, merge_masks
from quantempo.errors import RequestError

ERRORS = np.random.default_rng(0).uniform(0.1, 1, (6, 4))
REFRESHES = (0, 3)


@pytest.mark.parametrize("count", range(17))
def test_greedy_is_the_cheapest_choice_of_its_size(count: int) -> None:
    masks = greedy(ERRORS, REFRESHES, count)
    assert masks.sum() == count
    assert not masks[list(REFRESHES)].any()
    free = np.sort(np.delete(ERRORS, REFRESHES, axis=0).ravel())
    assert total_error(ERRORS, masks) == pytest.approx(free[:count].sum())


def test_greedy_beats_random_masks_of_equal_count() -> None:
    rng = np.random.default_rng(1)
    chosen = total_error(ERRORS, greedy(ERRORS, REFRESHES, 8))
    for _ in range(50):
        masks = np.zeros((6, 4), bool)
        free = rng.permutation(16)[:8]
        masks[np.array([1, 2, 4, 5])[free // 4], free % 4] = True
        assert chosen <= total_error(ERRORS, masks)


def test_savings_are_weighed_against_errors() -> None:
    errors = np.array([[0.0, 0.0], [1.0, 2.0]])
    assert greedy(errors, (0,), 1).tolist() == [[False, False], [True, False]]
    assert greedy(errors, (0,), 1, savings=(1.0, 4.0)).tolist() == [[False, False], [False, True]]


def test_counts_out_of_range_are_refused() -> None:
    with pytest.raises(RequestError, match="ask for 16"):
        greedy(ERRORS, REFRESHES, 17)


def test_errors_are_squared_changes_since_the_refresh() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 6, 3, 5, 2)).astype(np.float32)
    gate = rng.standard_normal((6, 3, 2)).astype(np.float32)
    seen = SublayerErrors(6, REFRESHES, ("a", "b"), {"b": "gate"})
    for call in range(6):
        seen.observe(call, {"a": a[call], "b": b[call], "gate": gate[call]})
    assert seen.errors[0].tolist() == [0, 0]
    assert seen.errors[5, 0] == pytest.approx(((a[5] - a[3]).astype(np.float64) ** 2).sum(), rel=1e-6)
    wanted = (((b[4] - b[3]) * gate[4][:, None, :]).astype(np.float64) ** 2).sum()
    assert seen.errors[4, 1] == pytest.approx(wanted, rel=1e-5)


def test_masks_become_cuts_and_equal_ones_one_variant() -> None:
    masks = greedy(ERRORS, REFRESHES, 0)
    masks[[1, 4]] = [True, False, False, True]
    masks[5] = [True, False, False, False]
    cuts = cuts_of(masks, depth=2)
    assert cuts[0] is None
    assert cuts[1] == SublayerCut(((True, False), (False, True)))
    variants, calls = merge_masks(cuts, bound=8)
    assert calls == ("full", "reuse.0", "full", "full", "reuse.0", "reuse.1")
    assert merge_masks(cuts, bound=1)[1] == ("full", "reuse.0", "full", "full", "reuse.0", "reuse.0")
    assert len(variants) == 2


def test_a_mask_for_another_depth_is_refused() -> None:
    with pytest.raises(RequestError, match="another depth"):
        cut_of(np.ones(12, bool), depth=5)
