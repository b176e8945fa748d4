"""What step programs are measured against: the stock scheduler's own loop, and a replay that shares no code with ours.

Both sides get the same initial noise, the same draws and the same deterministic fake denoiser, in float64.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from quantempo.contracts.program import Clamp, Lin, Noise, StepProgram

SHAPE = (2, 3, 4, 4)
Array = NDArray[np.float64]


def fake_denoiser(sample: Array, timestep: float) -> Array:
    """A cheap stand-in for a network: non-linear in the sample and in the timestep, bounded, and well conditioned."""
    phase = math.sin(0.37 * timestep) + 0.001 * timestep
    result: Array = 0.6 * np.tanh(sample) + 0.2 * np.sin(0.5 * sample + phase) + 0.1 * math.cos(0.05 * timestep)
    return result


class Draws:
    """Numbered standard normal tensors; draw 0 is the initial noise."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self.count = 0

    def at(self, number: int) -> Array:
        return np.random.default_rng((self._seed, number)).standard_normal(SHAPE)

    def next(self, *_: Any, **__: Any) -> torch.Tensor:
        self.count += 1
        return torch.from_numpy(self.at(self.count))


class BrownianByPath:
    """The noise sampler of SDE schedulers, from absolute positions of one path."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._position: dict[float, Any] = {}

    def _at(self, level: float) -> Any:
        known = self._position
        if level in known:
            return known[level]
        below = [k for k in known if k < level]
        above = [k for k in known if k > level]
        if not known:
            known[level] = torch.zeros(SHAPE, dtype=torch.float64)
        elif not below:
            known[level] = known[min(above)] + math.sqrt(min(above) - level) * self._draws.next()
        elif not above:
            known[level] = known[max(below)] - math.sqrt(level - max(below)) * self._draws.next()
        else:
            low, high = max(below), min(above)
            share = (high - level) / (high - low)
            mean = (1.0 - share) * known[high] + share * known[low]
            known[level] = mean + math.sqrt((high - level) * (level - low) / (high - low)) * self._draws.next()
        return known[level]

    def __call__(self, start: Any, end: Any) -> torch.Tensor:
        start, end = float(start), float(end)
        low, high = min(start, end), max(start, end)
        first, second = (self._at(low), self._at(high)) if not self._position else (self._at(high), self._at(low))
        bottom, top = (first, second) if low in self._position and first is self._position[low] else (second, first)
        drawn: torch.Tensor = (bottom - top) / math.sqrt(high - low) * (1.0 if start > end else -1.0)
        return drawn


def stock_loop(
    scheduler: Any, steps: int, *, eta: float | None = None, options: Mapping[str, float] | None = None, seed: int = 0
) -> list[Array]:
    """The sample after each call of a stock pipeline's loop.  `scheduler` is changed: give a fresh one."""
    options = dict(options or {})
    start = options.pop("start_index", None)
    takes = inspect.signature(scheduler.set_timesteps).parameters
    for_schedule: dict[str, Any] = {
        k: int(v) if k in ("stage_index", "original_inference_steps") else v for k, v in options.items() if k in takes
    }
    for_step: dict[str, Any] = {k: int(v) if k == "order" else v for k, v in options.items() if k not in takes}
    if eta is not None:
        for_step["eta"] = eta
    if "intermediate_timesteps" in takes and steps != 2:
        for_schedule["intermediate_timesteps"] = None
    scheduler.set_timesteps(steps, **for_schedule)
    draws = Draws(seed)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = BrownianByPath(draws)
    timesteps = scheduler.timesteps
    name = type(scheduler).__name__
    if name in ("SCMScheduler", "DDPMWuerstchenScheduler"):
        timesteps = timesteps[:-1]
    noise = torch.from_numpy(draws.at(0))
    sample = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if start is not None:
        first = int(start) * getattr(scheduler, "order", 1)
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        image = torch.from_numpy(reference_image())
        if hasattr(scheduler, "add_noise"):
            sample = scheduler.add_noise(image, noise, timesteps[:1])
        else:
            sample = scheduler.scale_noise(image, timesteps[:1], noise)
    with mock.patch.object(torch, "randn", draws.next), mock.patch.object(torch, "randn_like", draws.next):
        return _run(scheduler, timesteps, sample, for_step)


def _run(scheduler: Any, timesteps: Any, sample: torch.Tensor, for_step: dict[str, Any]) -> list[Array]:
    name = type(scheduler).__name__
    samples: list[Array] = []
    old = None
    for i, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        output = torch.from_numpy(fake_denoiser(scaled.double().numpy(), float(t)))
        if name == "CogVideoXDPMScheduler":
            back = timesteps[i - 1] if i else None
            sample, old = scheduler.step(output, old, t, back, sample, return_dict=False, **for_step)
        elif name == "UnCLIPScheduler":
            following = timesteps[i + 1] if i + 1 < len(timesteps) else None
            sample = scheduler.step(output, t, sample, prev_timestep=following).prev_sample
        elif name == "DDPMWuerstchenScheduler":
            sample = scheduler.step(output, t.expand(SHAPE[0]), sample).prev_sample
        else:
            sample = scheduler.step(output, t, sample, return_dict=False, **for_step)[0]
        samples.append(sample.double().numpy().copy())
    return samples


def reference_image() -> Array:
    """The image that image-to-image runs start from."""
    return np.tanh(np.random.default_rng(99).standard_normal(SHAPE))


def replay(program: StepProgram, *, seed: int = 0) -> list[Array]:
    """The sample after each call of a step program, in float64."""
    draws = Draws(seed)
    registers: dict[str, Array] = {"latents": program.state[0].initial_scale * draws.at(0)}
    if "image_scale" in program.options:
        registers["latents"] = registers["latents"] + program.options["image_scale"] * reference_image()
    samples = []
    for call in program.calls:
        fed = sum((c * registers[r] for r, c in call.inputs["sample"]), np.zeros(SHAPE))
        registers["prediction"] = fake_denoiser(fed, call.timestep)
        for op in call.update:
            if isinstance(op, Lin):
                registers[op.to] = sum((c * registers[r] for r, c in op.terms), np.zeros(SHAPE))
            elif isinstance(op, Clamp):
                registers[op.to] = np.minimum(np.maximum(registers[op.source], op.low), op.high)
            elif isinstance(op, Noise):
                registers[op.to] = draws.at(op.draw)
            else:
                raise AssertionError(op)
        del registers["prediction"]  # nothing may read it in the next call
        samples.append(registers["latents"].copy())
    return samples


def relative_error(ours: list[Array], stock: list[Array], calls: int = 20) -> float:
    """The largest difference over the first calls and at the end, relative to the largest value of that sample.

    Raises:
        AssertionError: the loops differ in length, or a value is not finite.
    """
    assert len(ours) == len(stock), f"{len(ours)} calls against {len(stock)}"
    worst = 0.0
    for a, b in [*[*zip(ours, stock, strict=True)][:calls], (ours[-1], stock[-1])]:
        assert np.isfinite(a).all()
        assert np.isfinite(b).all()
        worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    return worst
