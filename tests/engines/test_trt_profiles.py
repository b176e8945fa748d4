"""Sizes of an engine: parsed, completed, and refused with the nearest legal one."""

from __future__ import annotations

import pytest

from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.trt_profiles import (
    Profile,
    Range,
    choose,
    complete,
    input_shapes,
    parse_profile,
    require_known,
)
from quantempo.errors import EngineError, RequestError

INPUTS = {"sample": TensorSpec("sample", "float32", ("batch", 4, "side")), "group": TensorSpec("group", "int64", ())}


@pytest.mark.parametrize(
    ("text", "span"), [("batch=1:2:8", Range(1, 2, 8)), ("batch=3", Range(3, 3, 3)), ("batch=2:6", Range(2, 2, 6))]
)
def test_a_profile_is_read_as_typed(text: str, span: Range) -> None:
    assert parse_profile(text) == Profile({"batch": span})
    assert parse_profile(f"{text}, side=7").sizes["side"] == Range(7, 7, 7)


@pytest.mark.parametrize("text", ["batch", "batch=", "batch=4:2:8", "batch=0:1:2", "=3", "batch=1:2:3:4", ""])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="wanted NAME=LOWEST:BEST:HIGHEST"):
        parse_profile(text)


def test_left_out_dimensions_take_their_default_and_an_open_one_is_refused() -> None:
    asked = (Profile({"side": Range(8, 8, 8)}), Profile({"side": Range(16, 16, 16)}))
    first, second = complete("g", INPUTS, asked, {"batch": Range(1, 2, 8)})
    assert (first.sizes["batch"], second.sizes["side"]) == (Range(1, 2, 8), Range(16, 16, 16))
    with pytest.raises(RequestError, match=r"no sizes for dimension 'side'.*\n.*\n.*--shapes side="):
        complete("g", INPUTS, (), {"batch": Range(1, 2, 8)})


def test_a_dimension_that_no_graph_has_is_refused() -> None:
    with pytest.raises(RequestError, match="did you mean 'batch'"):
        require_known([parse_profile("bathc=2")], ["batch"])


def test_shapes_of_the_inputs() -> None:
    shapes = input_shapes(INPUTS, parse_profile("batch=1:2:8,side=5"))
    assert shapes == {"sample": ((1, 4, 5), (2, 4, 5), (8, 4, 5))}


def test_the_profile_that_is_tuned_closest_is_chosen() -> None:
    profiles = [parse_profile("batch=1:1:8"), parse_profile("batch=2:6:8")]
    assert choose("e", profiles, {"batch": 1}) == 0
    assert choose("e", profiles, {"batch": 5}) == 1


def test_sizes_outside_every_profile_name_the_nearest_legal_ones() -> None:
    profiles = [parse_profile("batch=1:2:8,side=8:8:16"), parse_profile("batch=1:1:1,side=32")]
    with pytest.raises(EngineError) as caught:
        choose("engine", profiles, {"batch": 12, "side": 17})
    assert "found batch = 12, side = 17" in str(caught.value)
    assert "the nearest legal sizes are batch = 8, side = 16" in str(caught.value)
    assert "build again with --shapes" in str(caught.value)
