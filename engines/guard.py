"""The latency guard: a quantized engine is timed against its float twin before it is handed over.

Two variants run in alternation, so that both see the same machine: whatever slows one round slows both.  The verdict
rests on paired ratios, and it counts as a difference only what stands out of their scatter.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, Literal

from numpy.typing import NDArray

from quantempo.contracts.engine import Binding, Engine
from quantempo.engines.shapes import sizes_of
from quantempo.errors import EngineError

Outcome = Literal["faster", "slower", "even"]

_DISTRIBUTIONS = {
    "ort": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",), "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",), "ort-cuda": ("onnxruntime-gpu",), "ort-tensorrt": ("onnxruntime-gpu",),
    "ort-rtx": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx"),
}
"""What `pip list` calls a backend's library."""


@dataclass(frozen=True, eq=False)
class Variant:
    """Something that can be timed.

    Args:
        label: for people, e.g. `openvino int8`.
        backend: name in the registry.
        open: opens the engine.
        feeds: what it is run on.
    """

    label: str
    backend: str
    open: Callable[[], Engine]
    feeds: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Timing:
    """How to time.

    Args:
        rounds: samples of each variant.
        warmup: calls that do not count.
        sample_s: a sample has as many calls as fit into this time, at least two.
        margin: relative difference that counts as one, where the scatter is smaller.
        clock: seconds.
        alone: open one variant at a time, where both would fill the memory: half of the rounds of the first, those of
            the second, the other half of the first.
    """

    rounds: int = 9
    warmup: int = 3
    sample_s: float = 0.05
    margin: float = 0.01
    clock: Callable[[], float] = time.perf_counter
    alone: bool = False


@dataclass(frozen=True)
class Round:
    """Milliseconds a call of both variants, measured one after the other."""

    baseline: float
    candidate: float


@dataclass(frozen=True)
class Verdict:
    """What a comparison found; plain data for a sidecar.

    Args:
        baseline, candidate: labels.
        backend: of the candidate.
        outcome: of the candidate, against the baseline.
        baseline_ms, candidate_ms: medians over the rounds.
        ratio: candidate over baseline, median of the rounds' ratios; below 1 is faster.
        noise: relative uncertainty of `ratio` (about three standard errors).
        rounds: the single measurements.
        versions: of the libraries.
        note: what else happened, e.g. that nothing is left quantized.
    """

    baseline: str
    candidate: str
    backend: str
    outcome: Outcome
    baseline_ms: float
    candidate_ms: float
    ratio: float
    noise: float
    rounds: tuple[Round, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def wins(self) -> bool:
        """Whether the candidate is faster."""
        return self.outcome == "faster"

    def __str__(self) -> str:
        return (
            f"{self.candidate}: {self.candidate_ms:.3g} ms a call, {self.baseline}: {self.baseline_ms:.3g} ms; "
            f"{self.ratio:.3f}× ± {self.noise:.3f}, {self.outcome}{f' ({self.note})' if self.note else ''}"
        )


def compare(baseline: Variant, candidate: Variant, timing: Timing | None = None) -> Verdict:
    """Time two variants in alternation.

    Raises:
        EngineError: one of them cannot be opened or run.
    """
    timing = timing or Timing()
    if timing.alone:
        samples = _one_after_another(baseline, candidate, timing)
    else:
        with ExitStack() as stack:
            bindings = [_bound(variant, stack) for variant in (baseline, candidate)]
            samples = _alternate(bindings, timing)
    rounds = tuple(Round(*pair) for pair in zip(*samples, strict=True))
    ratio, noise = paired_ratio([(r.baseline, r.candidate) for r in rounds])
    return Verdict(
        baseline.label, candidate.label, candidate.backend, outcome(ratio, noise, timing.margin),
        statistics.median(samples[0]), statistics.median(samples[1]), ratio, noise, rounds,
        library_versions(baseline.backend, candidate.backend),
    )


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Median of second over first, and about three standard errors of it.

    The scatter is taken from the median absolute deviation of the logarithms, which a few disturbed rounds do not move;
    a median is known 1.25 times worse than a mean would be.
    """
    logs = [math.log(second / first) for first, second in pairs]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median([abs(value - middle) for value in logs])
    return math.exp(middle), math.exp(middle) * 3 * 1.2533 * spread / math.sqrt(len(logs))


def outcome(ratio: float, noise: float, margin: float) -> Outcome:
    """Whether a ratio stands out of its noise and of the margin below which nobody cares."""
    least = max(noise, margin)
    return "faster" if ratio < 1 - least else "slower" if ratio > 1 + least else "even"


def library_versions(*backends: str) -> dict[str, str]:
    """Versions of quantempo, numpy and the libraries of some backends, as far as they are installed."""
    found = {}
    for name in ("quantempo", "numpy", *(name for backend in backends for name in _DISTRIBUTIONS.get(backend, ()))):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return dict(sorted(found.items()))


def _bound(variant: Variant, stack: ExitStack) -> Binding:
    engine = variant.open()
    stack.callback(engine.close)
    binding = engine.bind(sizes_of(variant.label, engine.inputs, variant.feeds))
    for name, values in variant.feeds.items():
        binding.inputs[name].upload(values)
    return binding


def _alternate(bindings: Sequence[Binding], timing: Timing) -> list[list[float]]:
    """Milliseconds a call, per binding and round.

    Each round goes forwards and backwards (`ABBA`) and takes the mean, so that steady drift cancels within it.
    """
    calls = []
    for binding in bindings:
        for _ in range(max(1, timing.warmup)):
            binding.run()
        once = _sample(binding, 1, timing.clock)
        calls.append(max(1, round(timing.sample_s * 500 / once)) if once > 0 else 1)
    samples: list[list[float]] = [[] for _ in bindings]
    order = list(range(len(bindings)))
    for _ in range(max(1, timing.rounds)):
        passes: list[list[float]] = [[] for _ in bindings]
        for index in (*order, *reversed(order)):
            passes[index].append(_sample(bindings[index], calls[index], timing.clock))
        for index in order:
            samples[index].append(statistics.fmean(passes[index]))
    return samples


def _one_after_another(baseline: Variant, candidate: Variant, timing: Timing) -> list[list[float]]:
    """Milliseconds a call, per variant and round; steady drift cancels between the halves of the baseline."""

    def block(variant: Variant, rounds: int) -> list[float]:
        if not rounds:
            return []
        with ExitStack() as stack:
            (samples,) = _alternate([_bound(variant, stack)], replace(timing, rounds=rounds))
        return samples

    half = (timing.rounds + 1) // 2
    before = block(baseline, half)
    middle = block(candidate, timing.rounds)
    return [[*before, *block(baseline, timing.rounds - half)], middle]


def _sample(binding: Binding, calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        binding.run()
    return (clock() - start) * 1000 / calls


@dataclass(frozen=True)
class Timed:
    """A candidate's median, and the scatter between its rounds."""

    label: str
    backend: str
    ms: float
    refused: str = ""


@dataclass(frozen=True)
class Choice:
    """What `pick_fastest` found.

    Args:
        label: the fastest candidate.
        timed: all of them, fastest first; refused ones at the end.
        versions: of the libraries.
    """

    label: str
    timed: tuple[Timed, ...]
    versions: Mapping[str, str] = field(default_factory=dict)


def pick_fastest(candidates: Sequence[Variant], timing: Timing | None = None) -> Choice:
    """Time candidates in turns and name the fastest; within the margin, the one that was named first.

    Args:
        candidates: with labels of their own; one that cannot be opened or run is passed over, and the choice says why.
        timing: see there.

    Raises:
        EngineError: none of them runs, or two have the same label.
    """
    timing = timing or Timing()
    labels = [variant.label for variant in candidates]
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        running = []
        for variant in candidates:
            try:
                binding = _bound(variant, stack)
                binding.run()
            except (EngineError, ImportError) as error:
                refused[variant.label] = str(error).split("\n")[0]
                continue
            running.append((variant, binding))
        if not running or len(set(labels)) < len(labels):
            raise EngineError(
                "choice of an engine", found="; ".join(f"{k}: {v}" for k, v in refused.items()) or f"labels {labels}",
                wanted="at least one engine that runs the model, each with a label of its own",
                cause="no engine is installed, or none of them reads the bundle's graphs",
                remedy="install one, e.g.: pip install 'quantempo[cpu]'",
            )
        samples = _alternate([binding for _, binding in running], timing)
    best = 0
    for index in range(1, len(running)):
        # The likelier one is taken, certain or not: a choice has to be made.
        ratio, _ = paired_ratio(list(zip(samples[best], samples[index], strict=True)))
        if ratio < 1 - timing.margin:
            best = index
    timed = [Timed(v.label, v.backend, statistics.median(s)) for (v, _), s in zip(running, samples, strict=True)]
    timed.sort(key=lambda item: (item.label != running[best][0].label, item.ms))
    left_out = [Timed(v.label, v.backend, 0.0, refused[v.label]) for v in candidates if v.label in refused]
    backends = [variant.backend for variant in candidates]
    return Choice(running[best][0].label, (*timed, *left_out), library_versions(*backends))
