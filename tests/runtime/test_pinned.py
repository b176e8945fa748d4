"""Inputs whose contents are part of the graphs."""

from __future__ import annotations

import numpy as np
import pytest

from quantempo.contracts.codec import from_data, to_data
from quantempo.contracts.manifest import Denoiser, PinnedInput
from quantempo.errors import RequestError
from quantempo.runtime.request import check_pinned

MASK = PinnedInput("mask", "int64", (4,), (1.0, 1.0, 1.0, 0.0))


@pytest.mark.parametrize("value", [[[1, 1, 1, 0]], [[1, 1, 1, 0]] * 3, [1, 1, 1, 0]])
def test_the_same_contents_pass(value):
    check_pinned(MASK, np.array(value))


@pytest.mark.parametrize("value", [[[1, 1, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 1]], 1])
def test_other_contents_are_refused(value):
    with pytest.raises(RequestError, match=r"call, mask: found other contents, wanted \[1 1 1 0\] in every row"):
        check_pinned(MASK, np.array(value))


def test_single_numbers_are_compared():
    flag = PinnedInput("flag", "bool", (), (1.0,))
    check_pinned(flag, np.array([True, True]))
    with pytest.raises(RequestError, match="flag: found other contents"):
        check_pinned(flag, np.array([True, False]))


def test_a_manifest_without_pinned_inputs_is_as_before():
    assert "pinned" not in to_data(Denoiser(latents_shape=(4, 8, 8)))
    pinned = Denoiser(latents_shape=(4, 8, 8), pinned=(MASK,))
    assert from_data(Denoiser, to_data(pinned), "denoiser") == pinned
