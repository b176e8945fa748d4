"""The step programs that a calibration runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from quantempo.calib.trajectories import ProgramChoice
from quantempo.contracts.program import StepProgram
from quantempo.recipe import Recipe
from quantempo.stages.versions import require_compile_extra


def trace_scheduler(scheduler: Path, steps: int) -> StepProgram:
    """The step program of a scheduler directory."""
    require_compile_extra()
    from quantempo.export.sampler import load_scheduler, trace_program

    return trace_program(load_scheduler(scheduler), steps)


def by_expert(program: StepProgram, boundary: float | None, second: str = "low_noise") -> StepProgram:
    """The program with the second expert in the calls below a boundary timestep.

    Args:
        program: of one expert.
        boundary: `None` for a model with one expert.
        second: graph variant of the second expert.
    """
    if boundary is None:
        return program
    calls = tuple(
        dataclasses.replace(call, graph=second) if call.timestep < boundary else call for call in program.calls
    )
    return dataclasses.replace(program, calls=calls)


def calibration_programs(
    recipe: Recipe, own: Callable[[int], StepProgram], boundary: float | None = None
) -> dict[ProgramChoice, StepProgram]:
    """The ways to sample that a recipe asks for.

    Args:
        recipe: step counts and further schedulers.
        own: the program of the model's own scheduler for a number of steps.
        boundary: the timestep below which a second expert takes over.
    """
    programs = {ProgramChoice(steps): own(steps) for steps in recipe.steps}
    for index, folder in enumerate(recipe.schedulers):
        for steps in recipe.steps:
            program = by_expert(trace_scheduler(Path(folder), steps), boundary)
            choice = ProgramChoice(steps, program.scheduler)
            if choice in programs:  # two folders may hold one class with different settings
                choice = ProgramChoice(steps, f"{program.scheduler}#{index + 1}")
            programs[choice] = program
    return programs
