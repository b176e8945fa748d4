"""The sampler tracer: a diffusers scheduler in, a step program out.

A scheduler is a linear map in sample, prediction and noise whose state is a few tensors.  So one run on basis vectors
reads off every coefficient: the sample, the prediction and each noise draw are basis vectors, and after each step every
tensor that the scheduler keeps becomes a fresh one, a register.  No scheduler has code of its own here.  See
docs/step-program.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from quantempo.contracts.codec import canonical_json, digest, parse_json
from quantempo.contracts.program import State, StepProgram, check_program
from quantempo.errors import DataError, MissingExtra, NotAModelDirectory, SchedulerRefused, nearest
from quantempo.export.sampler_check import check_against_scheduler
from quantempo.export.sampler_loop import START_INDEX, Loop, Settings, holders, refuse, replace_tensors, state_names
from quantempo.export.sampler_rows import NotLinear, Row, RowMode, coefficients, is_row_shaped, unit
from quantempo.export.sampler_tape import Tape, lower

IMAGE_SCALE = "image_scale"
"""Option of a program that starts from an image: `latents = image_scale * image + initial_scale * noise`."""

_CONFIG = "scheduler_config.json"


def scheduler_classes() -> dict[str, type]:
    """Every scheduler class of the installed diffusers, by name (Flax variants apart)."""
    base = diffusers.SchedulerMixin
    found = {}
    for name in sorted(dir(diffusers.schedulers)):  # not diffusers itself: its lazy names import every model
        item = getattr(diffusers.schedulers, name, None)
        if isinstance(item, type) and issubclass(item, base) and item is not base and not name.startswith("Flax"):
            found[item.__name__] = item
    return found


def load_scheduler(path: Path) -> Any:
    """The scheduler that a `scheduler_config.json` describes.

    Args:
        path: the file, or the directory that holds it.

    Raises:
        NotAModelDirectory: no such file.
        DataError: not a JSON object, or without a class name.
        SchedulerRefused: a class that diffusers does not have; remote code is never loaded.
        MissingExtra: a class that needs a package which is not installed.
    """
    file = path if path.name.endswith(".json") else path / _CONFIG
    if not file.is_file():
        raise NotAModelDirectory(
            str(file),
            found="no such file",
            wanted=f"a {_CONFIG} as diffusers writes it",
            cause="the path is not a scheduler directory",
            remedy="give the pipeline's scheduler folder",
        )
    config = parse_json(file.read_bytes(), str(file))
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise DataError(
            f"{file}._class_name",
            found=json.dumps(name),
            wanted="the name of a scheduler class",
            cause="the file is not a scheduler's configuration",
            remedy="save it anew with scheduler.save_pretrained",
        )
    classes = scheduler_classes()
    if name not in classes:
        if hasattr(diffusers, name) and "dummy" in getattr(diffusers, name).__module__:
            package = str(next(iter(set(getattr(diffusers, name)._backends) - {"torch"}), name))
            raise MissingExtra(f"scheduler {name}", package=package, extra="dev")
        raise SchedulerRefused(
            f"{file}._class_name",
            found=f"the class {name!r}",
            wanted=f"a scheduler class of diffusers {diffusers.__version__}",
            cause="a misspelling, a scheduler of another library or version, or remote code, which is never run",
            remedy=nearest(name, classes),
        )
    return classes[name].from_config(config)  # type: ignore[attr-defined]


def scheduler_identity(scheduler: Any) -> tuple[str, str]:
    """Class name and a digest of its configuration, equal for schedulers that sample alike.

    Private keys (paths, library version) do not count.  A shift that was set after construction does.
    """
    config = {key: _plain(value) for key, value in scheduler.config.items() if not key.startswith("_")}
    shift = getattr(scheduler, "shift", None)
    if shift is not None and shift != config.get("shift"):
        config["shift"] = _plain(shift)
    return type(scheduler).__name__, digest(canonical_json(config))


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    return list(scheduler_identity(value)) if hasattr(value, "config") else repr(value)


def trace_program(
    scheduler: Any, steps: int, *, eta: float | None = None, options: Mapping[str, float] | None = None
) -> StepProgram:
    """The step program of a scheduler.

    Args:
        scheduler: a diffusers scheduler; it is copied, never changed.
        steps: the user's number of steps.
        eta: stochasticity for the schedulers that take it; `None` is the scheduler's own default.
        options: numbers for the scheduler's `set_timesteps` (`mu`, `stage_index`, `original_inference_steps`, ...) or
            `step` (`s_churn`, `order`, ...), and `start_index`, the step at which image-to-image begins.

    Returns:
        A program that has been replayed against the scheduler itself on random data.

    Raises:
        SchedulerRefused: the scheduler is not linear, needs more than a sampling loop has, or refuses this step count.
        RequestError: an option that the scheduler does not take.
    """
    settings = Settings(steps, eta, dict(options or {}))
    try:
        program = _trace(scheduler, settings)
        check_program(program, f"{program.scheduler}, {steps} steps")
        check_against_scheduler(program, scheduler, settings)
    except NotLinear as verdict:
        raise refuse(scheduler, steps, verdict.found, verdict.reason) from verdict
    return program


def trace_programs(
    scheduler: Any,
    steps: Iterable[int],
    *,
    eta: float | None = None,
    options: Mapping[str, float] | None = None,
    on_skip: Callable[[int, str], None] | None = None,
) -> dict[int, StepProgram]:
    """Programs for many step counts; a count that the scheduler refuses is left out.

    Args:
        scheduler: as for `trace_program`.
        steps: the step counts.
        eta: as for `trace_program`.
        options: as for `trace_program`.
        on_skip: told each count that was left out, and why.

    Raises:
        SchedulerRefused: no count could be traced; the first reason.
    """
    programs: dict[int, StepProgram] = {}
    first: SchedulerRefused | None = None
    for count in steps:
        try:
            programs[count] = trace_program(scheduler, count, eta=eta, options=options)
        except SchedulerRefused as refusal:
            first = first or refusal
            if on_skip is not None:
                on_skip(count, f"{refusal.found}: {refusal.cause}")
    if first is not None and not programs:
        raise first
    return programs


def _trace(scheduler: Any, settings: Settings) -> StepProgram:
    tape = Tape()
    initial = tape.latents
    mode = RowMode(tape)
    loop = Loop(scheduler, settings, tape.noise)
    start, extra = _start(loop, mode, settings)
    if not all(map(math.isfinite, [start, *map(float, loop.timesteps)])):
        raise NotLinear("a timestep or initial scale that is not finite", "the schedule itself overflows here")
    sample = tape.row(initial)
    for index, timestep in enumerate(loop.timesteps):
        try:
            with mode:
                scaled = loop.model_input(sample, index)
            prediction = tape.begin(float(timestep), loop.step_of[index], tape.form(scaled))
            with mode:
                result = loop.step(prediction, index, sample)
        except (NotLinear, SchedulerRefused):
            raise
        except Exception as error:
            raise loop.scheduler_says("step", error) from error
        if not isinstance(result, Row) or not is_row_shaped(result):
            raise NotLinear("a new sample of another shape", "the step does not map a sample to a sample")
        sample = _close_call(tape, loop, result)
    return StepProgram(
        scheduler=type(scheduler).__name__,
        steps=settings.steps,
        calls=lower(tape.calls, initial),
        state=(State(initial_scale=start),),
        eta=loop.eta,
        options={**settings.options, **extra},
    )


def _start(loop: Loop, mode: RowMode, settings: Settings) -> tuple[float, dict[str, float]]:
    if START_INDEX not in settings.options:
        return loop.initial_scale, {}
    with mode:
        noised = loop.add_noise(unit(0), unit(1))
    values = coefficients(noised)
    if any(values[2:]):
        raise NotLinear("add_noise with further terms", "it is not a mixture of image and noise")
    return values[1], {IMAGE_SCALE: values[0]}


def _close_call(tape: Tape, loop: Loop, result: Row) -> Row:
    """Turn what the scheduler keeps into registers, finish the call, and hand out basis vectors for the next."""
    values: dict[int, int | None] = {}
    kept: list[Row] = []

    def collect(row: Row) -> Row:
        if not is_row_shaped(row):
            raise NotLinear("a kept tensor of another shape", "registers have the sample's shape")
        if id(row) not in values:
            kept.append(row)  # keeps the id alive
            values[id(row)] = tape.define(row, keep=True)
        return row

    slots: list[tuple[Any, str]] = [(loop, "carried")]
    slots += [(holder, name) for holder in holders(loop.scheduler) for name in state_names(holder)]
    for holder, name in slots:
        replace_tensors(getattr(holder, name), Row, collect)
    tape.finish(result)
    sample = tape.row(tape.latents)
    fresh = {key: tape.row(value) for key, value in values.items()}
    if values:
        for holder, name in slots:
            value = getattr(holder, name)
            new = replace_tensors(value, Row, lambda row: fresh[id(row)])
            if new is not value:
                setattr(holder, name, new)
    return sample
