"""The sampling loop: replays a step program over engines.

A call is: feed the graph (linear forms of registers, timestep, scale group, vectors), run the engine, hand its buffers
to the observer, combine the branches, run the call's register operations.  All memory is allocated when a run is
planned; registers are where the engine's buffers are (`quantempo.runtime.arithmetic`).  Where rows decide for
themselves whether they reuse cached features, those that differ from the rest are run apart
(`quantempo.runtime.feature_cache`).

A `Loop` is not thread-safe: it owns its bindings.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Binding, Buffer, Engine
from quantempo.contracts.manifest import Denoiser
from quantempo.contracts.partition import Partition
from quantempo.contracts.program import INDICATOR, Call, Decide, StepProgram
from quantempo.contracts.variants import Variant, Vectors, check_variants
from quantempo.errors import EngineError, RequestError
from quantempo.runtime.arithmetic import HostArithmetic, plan_arithmetic
from quantempo.runtime.feature_cache import Decisions, chunks
from quantempo.runtime.guidance import Combine, Mode, Rows, plan_rows
from quantempo.runtime.lanes import Lane, Lanes, Model
from quantempo.runtime.registers import Registers
from quantempo.runtime.rng import NoiseSource

Float32s = NDArray[np.float32]
Array = NDArray[Any]


class OutsideCalibration(UserWarning):
    """A call's group key lies outside the range that was calibrated; the nearest group's scales are used."""


@dataclass(frozen=True)
class Observation:
    """What an observer learns about an engine call, beside its buffers.

    Args:
        index: of the call in the program.
        call: the program's entry.
        group: the scale group; `None` without a partition.
        seeds: per row, as given in the request (0 where none was given).
        samples, branches: per row.
        graph: the variant that ran; where rows decide for themselves, a call runs several, each on some of the rows.
    """

    index: int
    call: Call
    group: int | None
    seeds: tuple[int, ...]
    samples: tuple[int, ...]
    branches: tuple[str, ...]
    graph: str = "full"


Observer = Callable[[Observation, Mapping[str, Buffer]], None]
"""Called after each engine call with the output buffers, which the next call overwrites."""

StepCallback = Callable[[int, float, Float32s], "Float32s | None"]
"""Called after each step with its index, its first call's timestep and a copy of the latents; may return new ones."""

PredictionHook = Callable[[int, Registers, NoiseSource], None]
"""Called with each call's index, all registers and the run's noise, when the prediction is combined and before the
call's operations run; it may overwrite the prediction."""


@dataclass(frozen=True, eq=False)
class LoopRequest:
    """What a run needs beside the program.

    Args:
        latents: standard normals (batch, …), which are scaled by the program's `initial_scale`; `None` draws them.
        batch: samples.
        guidance: one scale per sample; 1 or less means the conditional branch alone.
        noise: where noise comes from.
        conditioning: per graph input, the conditional rows and the unconditional ones (`None` where both are equal),
            each of length `batch`.
        rescale: guidance rescale factor, 0 for none.
        mode: both branches in one engine call, or in two.
        seeds: one per sample, for the observer.
        observer: sees each engine call.
        on_step: sees and may replace the latents after each step.
        on_prediction: sees the registers, and may overwrite the prediction, before each call's operations; for engines
            whose registers are host memory.
    """

    batch: int
    guidance: Sequence[float]
    noise: NoiseSource
    latents: Float32s | None = None
    conditioning: Mapping[str, tuple[Array, Array | None]] = field(default_factory=dict)
    rescale: float = 0.0
    mode: Mode = "batched"
    seeds: Sequence[int] = ()
    observer: Observer | None = None
    on_step: StepCallback | None = None
    on_prediction: PredictionHook | None = None


@dataclass
class Tally:
    """What one graph variant did in a run: engine calls, rows evaluated in them, seconds."""

    runs: int = 0
    rows: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class LoopResult:
    """Final latents (float32, the caller's own) and where the time went.

    Args:
        engine_seconds: spent in the engine's `run`.
        total_seconds: the whole loop, planning apart.
        engine_calls: how often the engine ran.
        plan_seconds: allocation and the upload of conditioning, once per run.
        rows: evaluations of the denoiser, one for each row of each call.
        reused: how many of them took cached features instead of computing everything.
        variants: the same by graph variant; a probe counts there alone.
    """

    latents: Float32s
    engine_seconds: float
    total_seconds: float
    engine_calls: int
    plan_seconds: float
    rows: int
    reused: int
    variants: Mapping[str, Tally]

    @property
    def overhead_per_call(self) -> float:
        """Seconds of the loop itself per engine call."""
        return (self.total_seconds - self.engine_seconds) / max(1, self.engine_calls)


class Loop:
    """Runs step programs over the graph variants of one model.

    Args:
        engines: by variant, as `Call.graph` names them.
        denoiser: how the graphs are fed.
        partition: what the scale groups mean; needed where a graph has a group input.
        variants: what each variant reads and writes; default: no features, and names as the engines have them.
        vectors: arrays (rows, channels) that programs take vectors from.
    """

    def __init__(
        self, engines: Mapping[str, Engine], denoiser: Denoiser, partition: Partition | None = None,
        variants: Mapping[str, Variant] | None = None, vectors: Vectors | None = None,
    ) -> None:
        if variants is None:
            variants = {n: Variant(tuple(e.inputs), tuple(e.outputs)) for n, e in engines.items()}
        self._model = Model(engines, denoiser, variants, vectors or {})
        self._partition = partition
        self._lanes = Lanes(self._model)
        grouped = [n for n, v in variants.items() if denoiser.group_input and denoiser.group_input in v.inputs]
        if grouped and partition is None:
            raise EngineError(
                f"graph {grouped[0]!r}", found=f"an input {denoiser.group_input!r}", wanted="a partition with it",
                cause="the manifest has no partition", remedy="compile the bundle again",
            )

    def run(self, program: StepProgram, request: LoopRequest) -> LoopResult:
        """Replay a program.

        Raises:
            DataError: the program does not fit the variants; see `check`.
            EngineError: the engine refuses a shape or fails.
            RequestError: conditioning or a replacement of the latents does not fit.
        """
        started = time.perf_counter()
        self.check(program)
        run = _Run(self, program, request)
        planned = time.perf_counter()
        with np.errstate(over="ignore", invalid="ignore"):
            run.calls()
        ended = time.perf_counter()
        tallies = run.tallies.values()
        return LoopResult(
            run.arithmetic.latents(), sum(t.seconds for t in tallies), ended - planned,
            sum(t.runs for t in tallies), planned - started, run.rows, run.reused, run.tallies,
        )

    def check(self, program: StepProgram) -> None:
        """Refuse a program that the variants cannot replay, before anything runs; see `check_variants`.

        Raises:
            DataError.
        """
        model = self._model
        check_variants(
            program, model.variants, model.vectors, model.denoiser.latents_shape[0], f"program of {program.scheduler}"
        )


class _Here(NamedTuple):
    """Which call is being run."""

    number: int
    call: Call
    group: int | None


class _Run:
    """State of one run."""

    def __init__(self, loop: Loop, program: StepProgram, request: LoopRequest) -> None:
        self._loop, self._program, self._request = loop, program, request
        model = loop._model
        shape = (request.batch, *model.denoiser.latents_shape)
        rows = plan_rows(request.guidance, request.mode)
        self._lanes = loop._lanes.plan(program, rows, request.conditioning)
        self._seeds = tuple(request.seeds) or (0,) * request.batch
        self._decisions = [Decisions(len(each)) for each in rows]
        self._variants = model.variants
        self._exchanging = {name for name, v in model.variants.items() if v.reads or v.writes}
        combine = Combine(request.guidance, request.rescale, shape[1:])
        self.arithmetic = plan_arithmetic(model, program, self._lanes, combine, request.noise)
        self._registers: Registers | None = None
        if request.on_prediction is not None:
            if not isinstance(self.arithmetic, HostArithmetic):
                raise EngineError(
                    "on_prediction", found="registers in an engine's own memory", wanted="registers on the host",
                    cause="the engine does a run's arithmetic by itself", remedy="use an engine on the CPU",
                )
            self._registers = self.arithmetic.registers
        self._notified = False
        self.tallies: dict[str, Tally] = {}
        self.rows = 0
        self.reused = 0
        self.arithmetic.start(program.state, request.latents)

    def calls(self) -> None:
        """Run all calls."""
        calls = self._program.calls
        first = calls[0].timestep
        for index, call in enumerate(calls):
            if index and call.step != calls[index - 1].step:
                first = call.timestep
            self._call(index, call)
            if self._request.on_step and (index + 1 == len(calls) or calls[index + 1].step != call.step):
                self._report(call.step, first)
        self.arithmetic.wait()

    def _call(self, index: int, call: Call) -> None:
        group = self._group(call)
        arithmetic = self.arithmetic
        for number, lane in enumerate(self._lanes):
            arithmetic.feed(call, number)
            lane.set_scalars(call.timestep, group)
            if call.vectors:
                lane.set_vectors(call.vectors)
            arithmetic.wait()
            here = _Here(index, call, group)
            self.rows += len(lane.rows)
            if call.decide is None:
                self._evaluate(here, call.graph, lane.bindings[call.graph], lane.rows)
                if call.graph in self._exchanging:
                    self._account(call.graph, number, len(lane.rows))
            else:
                self._decide(here, call.decide, lane, self._decisions[number])
        arithmetic.combine()
        if self._registers is not None and self._request.on_prediction is not None:
            self._request.on_prediction(index, self._registers, self._request.noise)
        for operation in call.update:
            arithmetic.apply(operation)

    def _evaluate(self, here: _Here, variant: str, binding: Binding, rows: Rows) -> None:
        started = time.perf_counter()
        binding.run()
        ended = time.perf_counter()
        tally = self.tallies.get(variant)
        if tally is None:
            tally = self.tallies[variant] = Tally()
        tally.runs += 1
        tally.rows += len(rows)
        tally.seconds += ended - started
        if self._request.observer is not None:
            seeds = tuple(self._seeds[sample] for sample in rows.samples)
            seen = Observation(here.number, here.call, here.group, seeds, rows.samples, rows.branches, variant)
            self._request.observer(seen, binding.outputs)

    def _account(self, variant: str, number: int, rows: int) -> None:
        """Keep the book of a call that was not decided at run time."""
        described = self._variants[variant]
        if described.reads:
            self.reused += rows
        if described.writes:
            self._decisions[number].forget()
        elif described.reads:
            self._decisions[number].reused()

    def _decide(self, here: _Here, decide: Decide, lane: Lane, decisions: Decisions) -> None:
        """Run the probe, then each row's own choice; rows that agree with all others need no copy."""
        self._evaluate(here, decide.probe, lane.bindings[decide.probe], lane.rows)
        lane.ports[INDICATOR].pull()
        refresh = decisions.choose(decide, lane.ports[INDICATOR].array)
        self.reused += int(np.count_nonzero(~refresh))
        for variant, chosen in ((decide.refresh, refresh), (here.call.graph, ~refresh)):
            if chosen.all():
                self._evaluate(here, variant, lane.bindings[variant], lane.rows)
                continue
            for rows in chunks(np.flatnonzero(chosen)):
                part = lane.part(variant, len(rows))
                part.gather(rows)
                self._evaluate(here, variant, part.binding, lane.rows.pick(rows))
                part.scatter(rows)

    def _group(self, call: Call) -> int | None:
        partition = self._loop._partition
        if partition is None:
            return None
        if not self._notified and not partition.calibrated(call.key):
            self._notified = True
            warnings.warn(
                f"{partition.unit} {call.key:g} lies outside the calibrated range {partition.low:g} to "
                f"{partition.high:g}; the nearest group's scales are used (calibrate with this scheduler to cover it)",
                OutsideCalibration,
                stacklevel=2,
            )
        return partition.group_of(call.key)

    def _report(self, step: int, timestep: float) -> None:
        assert self._request.on_step is not None
        latents = self.arithmetic.latents()
        shape, dtype = latents.shape, latents.dtype
        replaced = self._request.on_step(step, timestep, latents)
        if replaced is None:
            return
        array = np.asarray(replaced)
        if array.shape != shape or array.dtype != dtype:
            raise RequestError(
                f"callback after step {step}: latents", found=f"{array.dtype} {array.shape}",
                wanted=f"float32 {shape}", cause="the callback returned other latents than it was given",
                remedy="return an array of the same shape and type",
            )
        self.arithmetic.replace(array)
