from __future__ import annotations

from typing import Any

import pytest

from quantempo.contracts.program import Call, StepProgram
from quantempo.contracts.step_policy import StepPolicy, apply_policy, policy_of, read_policy
from quantempo.errors import DataError

PUBLISHED: dict[str, Any] = {
    "schema_version": 1, "type": "first_last_n", "index_space": "denoising_loop_iteration", "scope": ["transformer"],
    "default_mode": "native", "first_steps": {"count": 3, "mode": "a16"}, "last_steps": {"count": 2, "mode": "a16"},
    "overlap": "a16", "reasoner": "a16",
}


def config(**changes: Any) -> dict[str, Any]:
    policy = {key: value for key, value in {**PUBLISHED, **changes}.items() if value is not ...}
    return {"quantization_config": {"quant_algo": "FP8", "runtime": {"diffusion_step_policy": policy}}}


def program(steps: int, calls_per_step: int = 1) -> StepProgram:
    calls = tuple(Call(1000.0 - i, {}, (), i // calls_per_step) for i in range(steps * calls_per_step))
    return StepProgram("S", steps, calls)


def test_the_published_form_is_read_and_written() -> None:
    policy = read_policy(config(), "config.json")
    assert policy == StepPolicy(3, 2)
    again = {"quantization_config": {"runtime": {"diffusion_step_policy": policy.data()}}}
    assert read_policy(again, "config.json") == policy
    assert set(policy.data()) == set(PUBLISHED)


@pytest.mark.parametrize("content", [{}, {"quantization_config": {}}, {"quantization_config": {"runtime": {}}}])
def test_a_checkpoint_without_a_policy_has_none(content: dict[str, Any]) -> None:
    assert read_policy(content, "config.json") is None


def test_a_native_end_counts_for_nothing() -> None:
    assert read_policy(config(last_steps={"count": 4, "mode": "native"}), "c") == StepPolicy(3, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, r"schema_version: found 2, wanted 1"),
        ({"type": "every_other"}, r"type: found 'every_other', wanted 'first_last_n'"),
        ({"default_mode": "a16"}, "default_mode"),
        ({"index_space": ...}, r"index_space: found None"),
        ({"overlap": "native"}, "overlap"),
        ({"first_steps": {"count": -1, "mode": "a16"}}, "first_steps.*at least 0"),
        ({"first_steps": {"count": 1, "mode": "fp8"}}, "a mode among a16, native"),
        ({"last_steps": ...}, "last_steps: found None"),
        ({"middle_steps": 3}, "middle_steps: found an unknown key"),
    ],
)
def test_what_is_half_understood_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_policy(config(**changes), "config.json")


@pytest.mark.parametrize("per_step", [1, 2])
def test_the_ends_of_a_run_call_the_float_variant(per_step: int) -> None:
    changed = apply_policy(program(8, per_step), StepPolicy(2, 1))
    assert [call.step for call in changed.calls if call.graph == "float"] == [
        step for step in (0, 1, 7) for _ in range(per_step)
    ]
    assert policy_of(changed) == StepPolicy(2, 1)
    assert [c.timestep for c in changed.calls] == [c.timestep for c in program(8, per_step).calls]


def test_a_short_run_is_all_float_and_an_empty_policy_changes_nothing() -> None:
    assert all(call.graph == "float" for call in apply_policy(program(3), StepPolicy(2, 2)).calls)
    assert apply_policy(program(3), StepPolicy()) == program(3)
    assert StepPolicy().empty
    assert policy_of(program(3)) == StepPolicy()


def test_a_program_with_float_steps_in_the_middle_follows_no_policy() -> None:
    odd = apply_policy(program(9), StepPolicy(1, 1))
    middle = apply_policy(program(9), StepPolicy(5, 0)).calls[4]
    calls = (*odd.calls[:4], middle, *odd.calls[5:])
    with pytest.raises(DataError, match="float steps"):
        policy_of(StepProgram("S", 9, calls))
