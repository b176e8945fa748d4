"""How a stock pipeline drives a scheduler: the one place that knows calling conventions.

The same driver runs the traced pass (on rows) and the check (on numbers), so the two differ in nothing but the tensors.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from quantempo.errors import RequestError, SchedulerRefused, nearest
from quantempo.export.sampler_noise import BrownianPath
from quantempo.export.sampler_rows import NotLinear

START_INDEX = "start_index"
_CALLER_GIVEN = frozenset(["self", "model_output", "timestep", "sample", "eta", "generator", "return_dict"])
_DRIVEN = frozenset(["old_pred_original_sample", "timestep_back", "prev_timestep"])

# The last entry of these schedules is where the trajectory ends, not a call (Würstchen and SANA-Sprint pipelines).
_ENDS_WITH_TARGET = frozenset(("DDPMWuerstchenScheduler", "SCMScheduler"))


@dataclass(frozen=True)
class Settings:
    """What a loop is run with.

    Args:
        steps: the user's number of steps.
        eta: stochasticity; `None` leaves the scheduler's own default.
        options: further numbers for `set_timesteps` or `step`, and `start_index`.
    """

    steps: int
    eta: float | None
    options: Mapping[str, float]


@cache
def _parameters(method: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(method).parameters


def parameters(scheduler: Any, method: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of a scheduler's method, empty where it has none."""
    function = getattr(type(scheduler), method, None)
    return _parameters(inspect.unwrap(function)) if function is not None else {}


def refuse(scheduler: Any, steps: int, found: str, cause: str, remedy: str = "") -> SchedulerRefused:
    """The refusal that names class and the option that is likely to blame."""
    option, meaning = suspect_option(scheduler)
    name = type(scheduler).__name__ + (f" with {option}" if option else "")
    advice = f"leave out {option}, which makes another sampler, or choose another scheduler" if option else ""
    return SchedulerRefused(
        f"{name}, {steps} steps",
        found=found,
        wanted="a step that is linear in sample, prediction and noise, and that needs nothing else",
        cause=f"{cause} ({option}: {meaning})" if option else cause,
        remedy=remedy or advice or "choose another scheduler; docs/schedulers.md lists those that work",
    )


def suspect_option(scheduler: Any) -> tuple[str, str]:
    """The configured option that is known to make a step non-linear, and what it does; empty strings if none."""
    config = scheduler.config
    if config.get("thresholding"):
        return "thresholding=True", "dynamic thresholding divides by a quantile of the data"
    if str(config.get("variance_type", "")).startswith("learned"):
        return f"variance_type={config['variance_type']!r}", "the denoiser would have to predict the variance too"
    return "", ""


def step_index(position: int, calls: int, steps: int, order: int) -> int:
    """The user's step that a call belongs to, counted as stock pipelines count.

    A pipeline takes the calls in excess of `steps * order` as warm-up of the first step.
    """
    return max(0, position - max(0, calls - steps * order)) // order


class Loop:
    """A private copy of a scheduler, ready to be driven.

    Args:
        scheduler: copied, never touched.
        settings: steps, eta and options.
        draw: a fresh standard normal tensor, for schedulers that bring their own noise sampler.

    Raises:
        SchedulerRefused: a missing method, an input that only a special pipeline has, or a step count that the
            scheduler does not take.
        RequestError: an option that the scheduler does not take.
    """

    def __init__(self, scheduler: Any, settings: Settings, draw: Callable[[], Any]) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        self.settings = settings
        self._refuse_foreign_interfaces()
        self._step_options = self._set_timesteps()
        order = int(getattr(self.scheduler, "order", 1))
        self._first = int(settings.options.get(START_INDEX, 0)) * order
        timesteps = self.scheduler.timesteps
        if type(scheduler).__name__ in _ENDS_WITH_TARGET:
            timesteps = timesteps[:-1]
        if not len(timesteps):
            raise refuse(self.scheduler, settings.steps, "an empty schedule", "there is nothing to run")
        if not 0 <= self._first < len(timesteps):
            raise RequestError(
                f"option {START_INDEX!r}",
                found=str(settings.options.get(START_INDEX)),
                wanted=f"at least 0 and below {-(-len(timesteps) // order)}",
                cause="it lies outside the schedule",
                remedy=f"choose a start within the {settings.steps} steps",
            )
        if self._first and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self._first)
        self.timesteps = timesteps[self._first :]
        total = len(timesteps)
        self.step_of = [step_index(i + self._first, total, settings.steps, order) for i in range(len(self.timesteps))]
        self.step_of = [s - self.step_of[0] for s in self.step_of]
        self.carried: Any = None
        if hasattr(self.scheduler, "noise_sampler"):
            self.scheduler.noise_sampler = BrownianPath(draw)

    def _refuse_foreign_interfaces(self) -> None:
        steps, step = self.settings.steps, parameters(self.scheduler, "step")
        if not step or not hasattr(self.scheduler, "set_timesteps"):
            methods = [m for m in dir(type(self.scheduler)) if m.startswith("step")]
            raise refuse(
                self.scheduler,
                steps,
                f"no method 'step' but {', '.join(methods) or 'none like it'}",
                "its pipeline drives it through an interface of its own",
            )
        if "LongTensor" in str(step["sample"].annotation if "sample" in step else ""):
            raise refuse(self.scheduler, steps, "a state of integer tokens", "it is a discrete scheduler")
        missing = [
            name
            for name, parameter in step.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            and name not in _CALLER_GIVEN | _DRIVEN
        ]
        if missing:
            raise refuse(
                self.scheduler,
                steps,
                f"a step that needs {', '.join(missing)}",
                "these tensors come from its own pipeline and are no part of a sampling loop in general",
            )

    def _set_timesteps(self) -> dict[str, Any]:
        scheduler, settings = self.scheduler, self.settings
        for_schedule, for_step = parameters(scheduler, "set_timesteps"), parameters(scheduler, "step")
        schedule: dict[str, Any] = {}
        step: dict[str, Any] = {"return_dict": False} if "return_dict" in for_step else {}
        for name, value in settings.options.items():
            if name == START_INDEX:
                continue
            if name in for_schedule:
                schedule[name] = _typed(value, for_schedule[name])
            elif name in for_step and name not in _CALLER_GIVEN:
                step[name] = _typed(value, for_step[name])
            else:
                raise _unknown_option(scheduler, name, [*for_schedule, *for_step])
        if "eta" in for_step:
            if settings.eta is not None:
                step["eta"] = settings.eta
        elif settings.eta:
            raise RequestError(
                f"eta of {type(scheduler).__name__}",
                found=str(settings.eta),
                wanted="none",
                cause="this scheduler's step takes no eta",
                remedy="leave eta out",
            )
        if "intermediate_timesteps" in for_schedule and settings.steps != 2:
            schedule.setdefault("intermediate_timesteps", None)  # SCM's default fits two steps only
        try:
            scheduler.set_timesteps(settings.steps, **schedule)
        except Exception as error:
            raise self.scheduler_says("set_timesteps", error) from error
        return step

    @property
    def eta(self) -> float | None:
        """The eta that the step runs with, `None` where it takes none."""
        parameter = parameters(self.scheduler, "step").get("eta")
        if parameter is None:
            return None
        return float(parameter.default if self.settings.eta is None else self.settings.eta)

    @property
    def initial_scale(self) -> float:
        """`init_noise_sigma`, or 1 where the scheduler has none."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def add_noise(self, image: Any, noise: Any) -> Any:
        """The starting sample of image-to-image."""
        add = getattr(self.scheduler, "add_noise", None)
        try:
            if add is not None:
                return add(image, noise, self.timesteps[:1])
            return self.scheduler.scale_noise(image, self.timesteps[:1], noise)
        except NotLinear:
            raise
        except Exception as error:
            raise self.scheduler_says("add_noise", error) from error

    def model_input(self, sample: Any, index: int) -> Any:
        """The sample as the denoiser sees it."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return sample if scale is None else scale(sample, self.timesteps[index])

    def step(self, prediction: Any, index: int, sample: Any) -> Any:
        """The next sample."""
        given: dict[str, Any] = dict(self._step_options)
        names, timestep = parameters(self.scheduler, "step"), self.timesteps[index]
        if type(self.scheduler).__name__ == "DDPMWuerstchenScheduler":
            timestep = timestep.expand(sample.shape[0])  # its pipeline passes one time per image
        if "prev_timestep" in names:  # unCLIP: the next entry of the schedule
            given["prev_timestep"] = self.timesteps[index + 1] if index + 1 < len(self.timesteps) else None
        if "old_pred_original_sample" in names:  # CogVideoX: the pipeline carries the last x0
            given["old_pred_original_sample"] = self.carried
            given["timestep_back"] = self.timesteps[index - 1] if index else None
        result = self.scheduler.step(model_output=prediction, timestep=timestep, sample=sample, **given)
        if "old_pred_original_sample" in names:
            self.carried = result[1]
        return result[0]

    def scheduler_says(self, method: str, error: Exception) -> SchedulerRefused:
        """A refusal in the scheduler's own words."""
        words = " ".join(str(error).split()) or type(error).__name__
        words = words if len(words) <= 240 else words[:237] + "..."
        cause = f"the scheduler's own {method} fails for this configuration or step count"
        unset = [
            name
            for name, p in parameters(self.scheduler, "set_timesteps").items()
            if p.default is None and name not in self.settings.options and name in ("mu", "stage_index")
        ]
        remedy = ""
        if method == "set_timesteps" and unset:
            cause += f"; its pipeline gives it {' and '.join(unset)}"
            remedy = f"give them: options={{{', '.join(f'{name!r}: ...' for name in unset)}}}"
        tensors = [
            name
            for name, p in parameters(self.scheduler, "step").items()
            if "Tensor" in str(p.annotation)
            and p.default is None
            and name not in _DRIVEN
            and name not in ("timestep", "sample", "variance_noise", "per_token_timesteps", "r_timestep")
        ]
        if method == "step" and tensors and isinstance(error, (TypeError, AttributeError)):
            cause = f"its step needs {', '.join(tensors)}, which only its own pipeline has"
        return refuse(
            self.scheduler,
            self.settings.steps,
            f"{type(error).__name__} from {method}: {words.rstrip('.')}",
            cause,
            remedy,
        )


def _typed(value: float, parameter: inspect.Parameter) -> Any:
    hint = str(parameter.annotation)
    if "float" not in hint and float(value).is_integer():
        return bool(value) if "bool" in hint and parameter.name != "mu" else int(value)
    return float(value)


def _unknown_option(scheduler: Any, name: str, known: list[str]) -> RequestError:
    names = [k for k in known if k not in _CALLER_GIVEN | _DRIVEN | {"device", "num_inference_steps"}]
    return RequestError(
        f"option {name!r} of {type(scheduler).__name__}",
        found="an option that it does not take",
        wanted=f"{START_INDEX} or a number for set_timesteps or step",
        cause="a misspelling, or another scheduler's option",
        remedy=nearest(name, [*names, START_INDEX]),
    )


def holders(scheduler: Any) -> list[Any]:
    """The objects whose attributes are the loop's state: the scheduler and what it holds that is itself stateful."""
    found: list[Any] = []
    queue = [scheduler]
    while queue:
        holder = queue.pop()
        if any(holder is seen for seen in found):
            continue
        found.append(holder)
        queue.extend(v for v in vars(holder).values() if isinstance(v, BrownianPath) or hasattr(v, "set_timesteps"))
    return found


def state_names(holder: Any) -> list[str]:
    """The attributes that can hold tensors of the loop: tensors and containers, the configuration apart."""
    kinds = (torch.Tensor, list, tuple, dict)
    return [name for name, value in vars(holder).items() if isinstance(value, kinds) and name != "_internal_dict"]


def replace_tensors(value: Any, kind: type[torch.Tensor], new: Callable[[Any], Any]) -> Any:
    """`value` with each tensor of class `kind` inside containers replaced; lists and dicts are edited in place."""
    if isinstance(value, kind):
        return new(value)
    if isinstance(value, list):
        value[:] = [replace_tensors(item, kind, new) for item in value]
    elif isinstance(value, dict):
        for key in value:
            value[key] = replace_tensors(value[key], kind, new)
    elif type(value) is tuple:
        return tuple(replace_tensors(item, kind, new) for item in value)
    return value
