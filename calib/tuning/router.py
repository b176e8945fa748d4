"""Learning-to-Cache: which sublayers of a DiT a call can reuse, learned by gradient (Ma et al. 2024).

A router has one number per reusing call and sublayer.  While it is trained, a sublayer's output is
`w·fresh + (1 - w)·cached` with `w = sigmoid(number)`, before the gate, so that gate and modulation stay those of the
call.  The loss is the squared error to the full model on points of its own trajectories plus `penalty·Σ w`.  The model
itself is not changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantempo.calib.cache.schedules import check_schedule, serving
from quantempo.errors import CalibrationError, RequestError

Tensor = torch.Tensor
CLAMP = 5.0
"""Router numbers stay within ± this: beyond, the sigmoid has no slope to come back on."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Points of the float model's own trajectories, from which training draws.

    Args:
        samples: (calls, n, channels, height, width) float32, what the model was fed.
        timesteps: (calls,).
        conditioning: further arguments of the model, each (n, …), such as `class_labels`.
    """

    samples: NDArray[np.float32]
    timesteps: Sequence[float]
    conditioning: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterSettings:
    """How a router is trained.

    Args:
        penalty: price of a fresh sublayer, in units of the error of a call that reuses all of them, so that it means
            the same for every model.
        rounds: how often each reusing call is visited.
        batch: samples per visit.
        rate: of AdamW.
        start: initial value of the numbers; at 2, w is 0.88.
        seed: of the draws.
    """

    penalty: float = 0.02
    rounds: int = 40
    batch: int = 8
    rate: float = 0.1
    start: float = 2.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Router:
    """A trained router.

    Args:
        weights: (calls, sublayers), w of each; 1 at refreshing calls.
        refreshes: the schedule.
        losses: per visit, the squared error alone.
    """

    weights: NDArray[np.float64]
    refreshes: tuple[int, ...]
    losses: tuple[float, ...] = ()

    def reused(self, threshold: float = 0.5) -> NDArray[np.bool_]:
        """Masks (calls, sublayers), True where w is at most the threshold; a negative threshold reuses nothing."""
        masks: NDArray[np.bool_] = self.weights <= threshold
        masks[list(self.refreshes)] = False
        return masks

    def reused_count(self, count: int) -> NDArray[np.bool_]:
        """Masks that reuse the `count` pairs of call and sublayer with the least w."""
        order = np.argsort(np.where(self._refreshing(), np.inf, self.weights), axis=None, kind="stable")
        masks = np.zeros(self.weights.shape, bool)
        masks[np.unravel_index(order[:count], masks.shape)] = True
        return masks & ~self._refreshing()

    def _refreshing(self) -> NDArray[np.bool_]:
        rows = np.zeros(self.weights.shape, bool)
        rows[list(self.refreshes)] = True
        return rows


class SublayerBlend:
    """Hooks on a model's attention and MLP layers that record their outputs or blend them with recorded ones.

    Args:
        model: a diffusers transformer with `transformer_blocks`, each with `attn1` and `ff`.

    Raises:
        CalibrationError: the model has no such blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = getattr(model, "transformer_blocks", ())
        pairs = ((getattr(block, "attn1", None), getattr(block, "ff", None)) for block in blocks)
        self.layers = [layer for pair in pairs for layer in pair]
        if not self.layers or any(layer is None for layer in self.layers):
            raise CalibrationError(
                "learned masks", found=f"a {type(model).__name__} without attention and MLP in transformer_blocks",
                wanted="a DiT of diffusers", cause="masks of sublayers are defined for transformers",
                remedy="choose another cache policy",
            )
        self._cached: list[Tensor] = []
        self._fresh: list[Tensor] = []
        self._weights: Tensor | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hooks are on within this block, and off afterwards whatever happens."""
        hooks = [
            layer.register_forward_hook(lambda module, args, out, i=index: self._blend(i, out))
            for index, layer in enumerate(self.layers) if layer is not None
        ]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _blend(self, index: int, out: Tensor) -> Tensor:
        if self._weights is None:
            self._fresh.append(out)
            return out
        w = self._weights[index]
        return w * out + (1 - w) * self._cached[index]

    def record(self, model: nn.Module, feed: Mapping[str, Any]) -> Tensor:
        """Run in full, keep all sublayers' outputs as the cache, return the prediction."""
        self._fresh, self._weights = [], None
        out = predict(model, feed)
        self._cached = [tensor.detach() for tensor in self._fresh]
        return out

    def reuse(self, model: nn.Module, feed: Mapping[str, Any], weights: Tensor) -> Tensor:
        """Run with blended outputs; `weights` is (sublayers,), 1 for fresh ones."""
        self._weights = weights
        try:
            return predict(model, feed)
        finally:
            self._weights = None


def predict(model: nn.Module, feed: Mapping[str, Any]) -> Tensor:
    """The model's prediction, without a predicted variance."""
    out: Tensor = model(**feed, return_dict=False)[0]
    return out[:, : feed["hidden_states"].shape[1]]


def train_router(
    model: nn.Module, trajectories: Trajectories, refreshes: Sequence[int], settings: RouterSettings | None = None
) -> Router:
    """Learn which sublayers each reusing call needs fresh.

    Raises:
        RequestError: settings out of range, or a schedule that does not fit.
        CalibrationError: see `SublayerBlend`.
    """
    s = settings or RouterSettings()
    _check(s)
    calls = len(trajectories.timesteps)
    schedule = check_schedule(refreshes, calls)
    source = serving(schedule, calls)
    reusing = [call for call in range(calls) if source[call] != call]
    blend = SublayerBlend(model)
    # A parameter per call: the optimiser's momentum must not move the calls that are not being visited.
    numbers = [nn.Parameter(torch.full((len(blend.layers),), s.start)) for _ in range(calls)]
    optimiser = torch.optim.AdamW(numbers, lr=s.rate, weight_decay=0.0)
    rng = np.random.Generator(np.random.Philox(s.seed))
    losses: list[float] = []
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        with blend.active():
            worst = _worst_errors(model, blend, trajectories, source, reusing, s.batch)
            for _ in range(s.rounds):
                for call in rng.permutation(reusing):
                    rows = rng.choice(trajectories.samples.shape[1], min(s.batch, trajectories.samples.shape[1]), False)
                    with torch.no_grad():
                        teacher = predict_at(model, blend, trajectories, source[call], int(call), rows)
                    w = torch.sigmoid(numbers[int(call)])
                    student = blend.reuse(model, feed_of(trajectories, int(call), rows), w)
                    error = torch.mean((student - teacher) ** 2)
                    loss = error / worst[int(call)] + s.penalty * w.sum()
                    optimiser.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    with torch.no_grad():
                        numbers[int(call)].clamp_(-CLAMP, CLAMP)
                    losses.append(float(error.detach()))
    finally:
        for parameter, flag in frozen:
            parameter.requires_grad_(flag)
    weights = torch.sigmoid(torch.stack(list(numbers)).detach()).double().numpy()
    weights[list(schedule)] = 1.0
    return Router(weights, schedule, tuple(losses))


def feed_of(trajectories: Trajectories, call: int, rows: NDArray[np.intp]) -> dict[str, Any]:
    """The model's arguments at a call for some samples."""
    sample = torch.from_numpy(np.ascontiguousarray(trajectories.samples[call][rows]))
    feed: dict[str, Any] = {"hidden_states": sample}
    feed["timestep"] = torch.full((len(rows),), trajectories.timesteps[call], dtype=torch.float32)
    for name, values in trajectories.conditioning.items():
        feed[name] = torch.from_numpy(np.ascontiguousarray(values[rows]))
    return feed


def predict_at(
    model: nn.Module, blend: SublayerBlend, trajectories: Trajectories, refresh: int, call: int, rows: NDArray[np.intp]
) -> Tensor:
    """The full prediction at a call; afterwards the cache holds the sublayers of its refresh."""
    teacher = blend.record(model, feed_of(trajectories, call, rows))
    blend.record(model, feed_of(trajectories, refresh, rows))
    return teacher


def mask_errors(
    model: nn.Module, trajectories: Trajectories, refreshes: Sequence[int], reused: NDArray[np.bool_], batch: int = 16
) -> NDArray[np.float64]:
    """Mean squared error of the prediction at each call under given masks, (calls,); 0 at refreshes."""
    calls = len(trajectories.timesteps)
    source = serving(refreshes, calls)
    blend = SublayerBlend(model)
    errors = np.zeros(calls)
    total = trajectories.samples.shape[1]
    with blend.active(), torch.no_grad():
        for call in range(calls):
            if source[call] == call:
                continue
            for start in range(0, total, batch):
                rows = np.arange(start, min(start + batch, total))
                teacher = predict_at(model, blend, trajectories, source[call], call, rows)
                w = torch.from_numpy(~reused[call]).float()
                student = blend.reuse(model, feed_of(trajectories, call, rows), w)
                errors[call] += float(((student - teacher) ** 2).mean()) * len(rows) / total
    return errors


def _worst_errors(
    model: nn.Module, blend: SublayerBlend, trajectories: Trajectories, source: Sequence[int], reusing: Sequence[int],
    batch: int,
) -> dict[int, float]:
    """Per reusing call, the error of reusing every sublayer: the unit in which errors are weighed."""
    rows = np.arange(min(batch, trajectories.samples.shape[1]))
    found = {}
    with torch.no_grad():
        for call in reusing:
            teacher = predict_at(model, blend, trajectories, source[call], call, rows)
            student = blend.reuse(model, feed_of(trajectories, call, rows), torch.zeros(len(blend.layers)))
            found[call] = max(float(((student - teacher) ** 2).mean()), 1e-20)
    return found


def _check(s: RouterSettings) -> None:
    for name, value, legal in (
        ("penalty", s.penalty, s.penalty >= 0), ("rounds", s.rounds, s.rounds >= 1), ("batch", s.batch, s.batch >= 1),
        ("rate", s.rate, s.rate > 0),
    ):  # fmt: skip
        if not legal:
            raise RequestError(
                f"learned masks, {name}", found=str(value), wanted="a positive number",
                cause="a slip in the settings", remedy=f"use {getattr(RouterSettings(), name)}",
            )
