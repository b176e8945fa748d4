from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quantempo.contracts.codec import canonical_json, from_data
from quantempo.contracts.program import LATENTS, PREDICTION, Call, Clamp, Lin, Noise, StepProgram, check_program
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
