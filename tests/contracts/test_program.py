from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quantempo.contracts.codec import canonical_json, from_data
from quantempo.contracts.program import (
    LATENTS,
    PREDICTION,
    Call,
    Clamp,
    Correct,
    Decide,
    Lin,
    Noise,
    StepProgram,
    check_program,
)
from quantempo.errors import DataError

SAMPLE = {"sample": ((LATENTS, 1.0),)}
PROGRAM = StepProgram(
    "Example",
    2,
    (
        Call(
            900.0,
            SAMPLE,
            (
                Lin("x0", ((LATENTS, 2.0), (PREDICTION, -1.0))),
                Clamp("x0", "x0", -1.0, 1.0),
                Noise("noise", 1),
                Lin(LATENTS, (("x0", 0.5), ("noise", 0.1))),
            ),
            0,
        ),
        Call(
            400.0,
            {"sample": ((LATENTS, 1.0), ("x0", 0.25))},
            (Lin(LATENTS, ((PREDICTION, 1.0),)), Noise("noise", 2)),
            1,
            0.4,
        ),
    ),
    eta=1.0,
)


def _with(*updates: object, call: int = 0) -> StepProgram:
    calls = list(PROGRAM.calls)
    calls[call] = replace(calls[call], update=updates)
    return replace(PROGRAM, calls=tuple(calls))


def test_json_round_trip_keeps_every_number() -> None:
    text = canonical_json(PROGRAM)
    assert from_data(StepProgram, json.loads(text), "p") == PROGRAM
    odd = replace(PROGRAM, calls=(replace(PROGRAM.calls[0], timestep=1 / 3),))
    assert from_data(StepProgram, json.loads(canonical_json(odd)), "p").calls[0].timestep == 1 / 3


def test_the_group_key_is_the_timestep_unless_given() -> None:
    assert [call.key for call in PROGRAM.calls] == [900.0, 0.4]


def test_draws_and_registers_are_counted() -> None:
    assert PROGRAM.noise_draws == 2
    assert PROGRAM.registers() == (LATENTS, "x0", "noise")


def test_a_sound_program_passes() -> None:
    check_program(PROGRAM, "p")


def test_an_input_that_reads_an_unwritten_register_is_refused() -> None:
    call = replace(PROGRAM.calls[0], inputs={"sample": (("old", 1.0),)})
    with pytest.raises(DataError, match=r"p: call 0: found input 'sample' reads register 'old'"):
        check_program(replace(PROGRAM, calls=(call,)), "p")


def test_an_operation_that_reads_an_unwritten_register_is_refused() -> None:
    with pytest.raises(DataError, match="lin reads register 'ghost'"):
        check_program(_with(Lin(LATENTS, (("ghost", 1.0),))), "p")
    with pytest.raises(DataError, match="clamp reads register 'ghost'"):
        check_program(_with(Clamp(LATENTS, "ghost", 0, 1)), "p")


def test_registers_are_written_in_order_and_live_on() -> None:
    with pytest.raises(DataError, match="call 0: found clamp reads register 'x0'"):
        check_program(_with(Clamp("x0", "x0", -1.0, 1.0), Lin("x0", ((LATENTS, 1.0),))), "p")
    with pytest.raises(DataError, match="call 1: found input 'sample' reads register 'x0'"):
        check_program(_with(Lin(LATENTS, ((PREDICTION, 1.0),))), "p")


def test_the_prediction_cannot_be_an_input() -> None:
    call = replace(PROGRAM.calls[1], inputs={"sample": ((PREDICTION, 1.0),)})
    with pytest.raises(DataError, match="call 1: found input 'sample' reads register 'prediction'"):
        check_program(replace(PROGRAM, calls=(PROGRAM.calls[0], call)), "p")


def test_other_versions_and_empty_programs_are_refused() -> None:
    with pytest.raises(DataError, match="version: found 2, wanted 1"):
        check_program(replace(PROGRAM, version=2), "p")
    with pytest.raises(DataError, match="calls: found none"):
        check_program(replace(PROGRAM, calls=()), "p")


def test_a_program_without_latents_is_refused() -> None:
    program = replace(PROGRAM, state=(), calls=(Call(1.0, {}, (Noise("n", 1),), 0),))
    with pytest.raises(DataError, match="no register 'latents'"):
        check_program(program, "p")


def _decides(*decisions: Decide) -> StepProgram:
    calls = tuple(replace(PROGRAM.calls[0], decide=decide) for decide in decisions)
    return replace(PROGRAM, calls=calls)


@pytest.mark.parametrize(
    ("decide", "words"),
    [
        (Decide("probe", -0.1), r"call 0: decide\.threshold: found -0\.1, wanted a finite number of at least 0"),
        (Decide("probe", float("inf")), r"threshold: found inf"),
        (Decide("probe", float("nan")), r"threshold: found nan"),
        (Decide("probe", 0.1, max_consecutive=0), r"max_consecutive: found 0, wanted at least 1"),
        (Decide("probe", 0.1, polynomial=()), r"polynomial: found \[\], wanted at least one coefficient"),
        (Decide("probe", 0.1, polynomial=(1.0, float("nan"))), r"polynomial: found \[1\.0, nan\]"),
    ],
)
def test_a_decision_out_of_range_is_refused(decide: Decide, words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_program(_decides(decide), "p")


def test_all_decisions_of_a_program_look_at_one_indicator_in_one_way() -> None:
    check_program(_decides(Decide("probe", 0.0), Decide("probe", 0.3, accumulate=False)), "p")
    for other in (Decide("probe.2", 0.3), Decide("probe", 0.3, reference="last_refresh")):
        with pytest.raises(DataError, match=r"call 1: decide: found probe '.*, wanted 'probe' with 'previous_call'"):
            check_program(_decides(Decide("probe", 0.0), other), "p")


def test_negative_rows_are_refused() -> None:
    with pytest.raises(DataError, match=r"call 0: found vector 'cache\.0\.gain' of row -1"):
        check_program(replace(PROGRAM, calls=(replace(PROGRAM.calls[0], vectors={"cache.0.gain": -1}),)), "p")
    with pytest.raises(DataError, match="found correct of row -2, wanted a row of at least 0"):
        check_program(_with(Correct(LATENTS, PREDICTION, "g", "b", -2)), "p")


def test_corrections_and_decisions_survive_json() -> None:
    call = replace(
        PROGRAM.calls[0], vectors={"cache.0.gain": 3}, update=(Correct(LATENTS, PREDICTION, "g", "b", 2),),
        decide=Decide("probe", 0.25, "full", (2.0, -1.0), False, "last_refresh", 4),
    )
    program = replace(PROGRAM, calls=(call,))
    assert from_data(StepProgram, json.loads(canonical_json(program)), "p") == program
