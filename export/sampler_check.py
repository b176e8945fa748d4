"""The tracer's post-condition: the program reproduces the scheduler on random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from quantempo.contracts.program import LATENTS, PREDICTION, Call, Clamp, Lin, Noise, StepProgram, Terms
from quantempo.errors import SchedulerRefused
from quantempo.export.sampler_loop import START_INDEX, Loop, Settings, refuse

TOLERANCE = 1e-5
"""Largest error of a sample relative to its largest value so far.  Schedulers that step in float32 reach 1e-6."""

_SHAPE = (2, 3, 2, 2)
Array = NDArray[np.float64]


def check_against_scheduler(program: StepProgram, scheduler: Any, settings: Settings) -> float:
    """Run scheduler and program side by side in float64 and compare the samples after every call.

    The predictions are random and bounded, so that an error is not amplified by feedback.

    Returns:
        The largest relative error.

    Raises:
        SchedulerRefused: if it exceeds `TOLERANCE`, or either side is not finite.
    """
    random = np.random.default_rng(0)
    draws = _Draws(random)
    loop = Loop(scheduler, settings, draws.fresh)
    noise = random.standard_normal(_SHAPE)
    registers: dict[str, Array] = {LATENTS: program.state[0].initial_scale * noise}
    sample = torch.from_numpy(loop.initial_scale * noise)
    if START_INDEX in settings.options:
        image = random.standard_normal(_SHAPE)
        registers[LATENTS] = registers[LATENTS] + program.options["image_scale"] * image
        sample = loop.add_noise(torch.from_numpy(image), torch.from_numpy(noise))
    worst, largest = 0.0, 0.0
    for index, call in enumerate(program.calls):
        prediction = np.tanh(random.standard_normal(_SHAPE))
        with draws if program.noise_draws else nullcontext():  # the mode sees every torch call, which costs time
            scaled = loop.model_input(sample, index)
            fed = _linear(call.inputs["sample"], registers)
            worst = max(worst, _difference(scaled, fed))
            sample = loop.step(torch.from_numpy(prediction.copy()), index, sample)
        _replay(call, registers, prediction, draws.taken)
        largest = max(largest, float(sample.abs().max()))
        worst = max(worst, float((sample - torch.from_numpy(registers[LATENTS])).abs().max()) / max(largest, 1e-30))
        if not worst <= TOLERANCE:  # also true for NaN
            raise _mismatch(scheduler, settings, index, worst)
    return worst


def _difference(stock: torch.Tensor, ours: Array) -> float:
    scale = max(float(stock.abs().max()), 1e-30)
    return float((stock - torch.from_numpy(ours)).abs().max()) / scale


def _mismatch(scheduler: Any, settings: Settings, index: int, error: float) -> SchedulerRefused:
    return refuse(
        scheduler,
        settings.steps,
        f"a relative error of {error:.1e} against the scheduler itself at call {index}",
        "its step does something that tracing on basis vectors does not see, or it is not finite here",
    )


def _linear(terms: Terms, registers: Mapping[str, Array]) -> Array:
    total: Array = np.zeros(_SHAPE)
    for name, coefficient in terms:
        total = total + coefficient * registers[name]
    return total


def _replay(call: Call, registers: dict[str, Array], prediction: Array, draws: list[Array]) -> None:
    registers[PREDICTION] = prediction
    for op in call.update:
        if isinstance(op, Lin):
            registers[op.to] = _linear(op.terms, registers)
        elif isinstance(op, Clamp):
            registers[op.to] = np.clip(registers[op.source], op.low, op.high)
        elif isinstance(op, Noise):
            registers[op.to] = draws[op.draw - 1]


class _Draws(TorchFunctionMode):
    """Hands the scheduler known noise, in order."""

    def __init__(self, random: np.random.Generator) -> None:
        super().__init__()
        self._random = random
        self.taken: list[Array] = []

    def fresh(self) -> torch.Tensor:
        """The next draw."""
        self.taken.append(self._random.standard_normal(_SHAPE))
        return torch.from_numpy(self.taken[-1].copy())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Torch's normal draws become ours; all else passes."""
        if func.__name__ in ("randn", "randn_like"):
            return self.fresh()
        return func(*args, **(kwargs or {}))
