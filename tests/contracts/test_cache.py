from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from quantempo.contracts.cache import (
    FULL,
    CachePlan,
    Cut,
    DeltaCut,
    FeatureCut,
    Probe,
    Schedule,
    SublayerCut,
    cached_program,
    check_cache_plan,
    check_cut,
    correction_inputs,
    merge_masks,
)
from quantempo.contracts.codec import canonical_json, from_data, parse_json
from quantempo.contracts.program import LATENTS, PREDICTION, Call, Decide, Lin, StepProgram
from quantempo.errors import DataError

MASK = SublayerCut(((True, False), (False, True)))
PLAN = CachePlan(
    model="0123", scheduler="DDIMScheduler", config="4567", policy="every", parameters={"interval": 2.0},
    cuts={"reuse.0": DeltaCut(1, 4, 6), "reuse.1": FeatureCut(("a/out", "b/out"))},
    schedules={"3": Schedule(("full", "reuse.0", "reuse.1"), row=5)},
    probe=Probe("modulated_input"), corrections=("feature", "latents"),
)


def _with(**changes: object) -> CachePlan:
    return replace(PLAN, **changes)  # type: ignore[arg-type]


def _program(calls: int, steps: int = 3) -> StepProgram:
    update = (Lin(LATENTS, ((PREDICTION, 1.0),)),)
    made = tuple(Call(float(i), {"sample": ((LATENTS, 1.0),)}, update, min(i, steps - 1)) for i in range(calls))
    return StepProgram("DDIMScheduler", steps, made)


def test_a_plan_survives_the_round_trip_through_text() -> None:
    dynamic = Schedule(("full", "reuse.2"), Decide("probe", 0.2, polynomial=(2.0, 1.0, 0.0)))
    plan = _with(cuts={**PLAN.cuts, "reuse.2": MASK}, schedules={**PLAN.schedules, "2": dynamic})
    assert from_data(CachePlan, parse_json(canonical_json(plan), "p"), "p") == plan
    assert json.loads(canonical_json(plan))["cuts"]["reuse.2"]["kind"] == "sublayers"


def test_a_good_plan_passes() -> None:
    check_cache_plan(PLAN, "plan")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedules": {"2": Schedule(("reuse.0", "full"))}}, r"schedules\.2, call 0[\s\S]*no features to reuse yet"),
        ({"schedules": {"2": Schedule(("full", "reuse"))}},
         r"call 1: found the variant 'reuse'[\s\S]*did you mean 'reuse\.[01]'"),
        ({"schedules": {"2": Schedule(())}}, r"schedules\.2: found no calls"),
        ({"schedules": {"two": Schedule(("full",))}}, r"'two', wanted a number of steps"),
        ({"cuts": {"again": MASK}}, r"variant 'again', wanted names like 'reuse.0'"),
        ({"cuts": {"reuse.0": DeltaCut(1, 4, 6), "reuse.1": MASK}}, r"cuts\.reuse\.1: found depth 2, wanted 6"),
        ({"version": 2}, r"version: found 2, wanted 1"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_cache_plan(_with(**changes), "plan")


@pytest.mark.parametrize(
    ("decide", "words"),
    [
        (Decide("probe", -0.1), r"decide\.threshold: found -0\.1"),
        (Decide("probe", float("nan")), r"decide\.threshold: found nan"),
        (Decide("probe", 0.1, max_consecutive=0), r"max_consecutive: found 0"),
    ],
)
def test_decisions_out_of_range_are_refused(decide: Decide, words: str) -> None:
    schedules = {"2": Schedule(("full", "reuse.0"), decide)}
    with pytest.raises(DataError, match=words):
        check_cache_plan(_with(schedules=schedules), "plan")


def test_a_decision_needs_a_probe() -> None:
    schedules = {"2": Schedule(("full", "reuse.0"), Decide("probe", 0.1))}
    with pytest.raises(DataError, match="wanted a plan with a probe"):
        check_cache_plan(_with(schedules=schedules, probe=None), "plan")


@pytest.mark.parametrize(
    "cut",
    [
        FeatureCut(()), FeatureCut(("a", "a")), DeltaCut(4, 1, 6), DeltaCut(1, 6, 6), DeltaCut(-1, 2, 6),
        SublayerCut(()), SublayerCut(((False, False),)), SublayerCut(((True,), (True, False))),
    ],
)
def test_cuts_that_fit_no_graph_are_refused(cut: Cut) -> None:
    with pytest.raises(DataError, match=r"^here"):
        check_cut(cut, "here")


def test_a_program_gets_variants_and_rows() -> None:
    program = cached_program(_program(3), PLAN, "4567", {"reuse.0": correction_inputs("cache.0", "feature")})
    assert [call.graph for call in program.calls] == ["full", "reuse.0", "reuse.1"]
    assert [call.vectors for call in program.calls] == [{}, {"cache.0.gain": 6, "cache.0.bias": 6}, {}]
    assert [replace(call, graph="full", vectors={}) for call in program.calls] == list(_program(3).calls)


def test_decisions_fall_at_the_calls_that_may_reuse() -> None:
    decide = Decide("probe", 0.1)
    plan = _with(schedules={"3": Schedule(("full", "full", "reuse.0"), decide)})
    assert [call.decide for call in cached_program(_program(3), plan, "4567", {}).calls] == [None, None, decide]


def test_a_program_that_the_plan_was_not_fitted_for_is_refused() -> None:
    with pytest.raises(DataError, match=r"with 4 steps[\s\S]*a plan for DDIMScheduler with 3 steps"):
        cached_program(_program(4, steps=4), PLAN, "4567", {})
    with pytest.raises(DataError, match="and other settings"):
        cached_program(_program(3), PLAN, "89ab", {})
    with pytest.raises(DataError, match="a plan for DDIMScheduler"):
        cached_program(replace(_program(3), scheduler="PNDMScheduler"), PLAN, "4567", {})


def test_two_calls_per_step_are_counted_per_call() -> None:
    with pytest.raises(DataError, match=r"found 3 calls, wanted 5[\s\S]*two calls per step"):
        cached_program(_program(5), PLAN, "4567", {})


def _mask(bits: str) -> SublayerCut:
    return SublayerCut(tuple((a == "1", b == "1") for a, b in zip(bits[::2], bits[1::2], strict=True)))


def test_equal_masks_are_one_variant() -> None:
    cuts, names = merge_masks([None, _mask("1100"), _mask("0011"), _mask("1100")], 4)
    assert cuts == {"reuse.0": _mask("1100"), "reuse.1": _mask("0011")}
    assert names == (FULL, "reuse.0", "reuse.1", "reuse.0")


def test_masks_are_merged_where_that_costs_least() -> None:
    masks = [None, _mask("111110"), _mask("111101"), _mask("000011"), _mask("000011")]
    cuts, names = merge_masks(masks, 2)
    assert cuts == {"reuse.0": _mask("111100"), "reuse.1": _mask("000011")}
    assert names == (FULL, "reuse.0", "reuse.0", "reuse.1", "reuse.1")


def test_masks_without_common_ground_end_in_the_full_variant() -> None:
    assert merge_masks([None, _mask("1100"), _mask("0011")], 1) == ({}, (FULL, FULL, FULL))


def test_a_call_never_reuses_more_than_its_mask_allows() -> None:
    draw = random.Random(0)
    for bound in (1, 2, 3, 5):
        masks = [_mask("11" + "".join(draw.choice("01") for _ in range(8))) for _ in range(12)]
        cuts, names = merge_masks([None, *masks], bound)
        assert 1 <= len(cuts) <= bound
        for mask, name in zip(masks, names[1:], strict=True):
            for wanted, given in zip(mask.mask, cuts[name].mask, strict=True):
                assert all(w or not g for w, g in zip(wanted, given, strict=True))
