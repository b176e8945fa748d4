"""The sampling loop: replays a step program over engines.

A call is: feed the graph (linear forms of registers, timestep, scale group), run the engine, hand its buffers to the
observer, combine the branches, run the call's register operations.  All memory is allocated when a run is planned;
buffers of an engine with host memory are used in place.

A `Loop` is not thread-safe: it owns its bindings.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Binding, Buffer, Engine, dtype_of
from quantempo.contracts.manifest import Denoiser
from quantempo.contracts.partition import Partition
from quantempo.contracts.program import LATENTS, PREDICTION, Call, StepProgram
from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import EngineError, RequestError, nearest
from quantempo.runtime.guidance import CONDITIONAL, Combine, Mode, Rows, plan_rows
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
    """

    index: int
    call: Call
    group: int | None
    seeds: tuple[int, ...]
    samples: tuple[int, ...]
    branches: tuple[str, ...]


Observer = Callable[[Observation, Mapping[str, Buffer]], None]
"""Called after each engine call with the output buffers, which the next call overwrites."""

StepCallback = Callable[[int, float, Float32s], "Float32s | None"]
"""Called after each step with its index, its first call's timestep and a copy of the latents; may return new ones."""


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


@dataclass(frozen=True, eq=False)
class LoopResult:
    """Final latents (float32, the caller's own) and where the time went.

    Args:
        engine_seconds: spent in the engine's `run`.
        total_seconds: the whole loop, planning apart.
        engine_calls: how often the engine ran.
        plan_seconds: allocation and the upload of conditioning, once per run.
    """

    latents: Float32s
    engine_seconds: float
    total_seconds: float
    engine_calls: int
    plan_seconds: float

    @property
    def overhead_per_call(self) -> float:
        """Seconds of the loop itself per engine call."""
        return (self.total_seconds - self.engine_seconds) / max(1, self.engine_calls)


class Port:
    """One side of a bound tensor as a host array: the buffer itself, or a copy that is moved over on demand."""

    def __init__(self, buffer: Buffer, host: bool) -> None:
        self._buffer = None if host else buffer
        self.array: Array = buffer.array if host else np.zeros(buffer.shape, dtype_of(buffer.spec))

    def push(self) -> None:
        """Make what was written to `array` visible to the engine."""
        if self._buffer is not None:
            self._buffer.upload(self.array)

    def pull(self) -> None:
        """Make what the engine wrote visible in `array`."""
        if self._buffer is not None:
            np.copyto(self.array, self._buffer.download())


class Lane:
    """One bound engine call of a denoiser evaluation: its rows and the ports that the loop writes and reads."""

    def __init__(self, engine: Engine, binding: Binding, rows: Rows, denoiser: Denoiser) -> None:
        self.rows = rows
        self.binding = binding
        self.inputs = {name: Port(buffer, engine.host) for name, buffer in binding.inputs.items()}
        self.prediction = Port(binding.outputs[denoiser.prediction], engine.host)
        self.timestep = self.inputs.get(denoiser.timestep_input)
        self.group = self.inputs.get(denoiser.group_input) if denoiser.group_input else None

    def set_scalars(self, timestep: float, group: int | None) -> None:
        """Feed timestep and scale group."""
        if self.timestep is not None:
            self.timestep.array.fill(timestep)
            self.timestep.push()
        if self.group is not None:
            self.group.array.fill(group)
            self.group.push()


class Loop:
    """Runs step programs over the graph variants of one model.

    Args:
        engines: by variant, as `Call.graph` names them.
        denoiser: how the graphs are fed.
        partition: what the scale groups mean; needed where a graph has a group input.
    """

    def __init__(self, engines: Mapping[str, Engine], denoiser: Denoiser, partition: Partition | None = None) -> None:
        self._engines = engines
        self._denoiser = denoiser
        self._partition = partition
        self._lanes: dict[tuple[object, ...], Lane] = {}
        grouped = [n for n, e in engines.items() if denoiser.group_input and denoiser.group_input in e.inputs]
        if grouped and partition is None:
            raise EngineError(
                f"graph {grouped[0]!r}", found=f"an input {denoiser.group_input!r}", wanted="a partition with it",
                cause="the manifest has no partition", remedy="compile the bundle again",
            )

    def run(self, program: StepProgram, request: LoopRequest) -> LoopResult:
        """Replay a program.

        Raises:
            EngineError: the engine refuses a shape or fails.
            RequestError: conditioning or a replacement of the latents does not fit.
        """
        started = time.perf_counter()
        run = _Run(self, program, request)
        planned = time.perf_counter()
        with np.errstate(over="ignore", invalid="ignore"):
            run.calls()
        ended = time.perf_counter()
        return LoopResult(
            run.registers[LATENTS].copy(), run.engine_seconds, ended - planned, run.engine_calls, planned - started
        )

    def lanes(self, program: StepProgram, rows: Sequence[Rows], request: LoopRequest) -> dict[str, list[Lane]]:
        """The bound lanes of each graph that a program calls."""
        fed: dict[str, set[str]] = {}
        for call in program.calls:
            fed.setdefault(call.graph, set()).update(call.inputs)
        return {graph: [self._lane(graph, i, r, request, names) for i, r in enumerate(rows)]
                for graph, names in fed.items()}  # fmt: skip

    def _lane(self, graph: str, index: int, rows: Rows, request: LoopRequest, fed: set[str]) -> Lane:
        """A bound lane; bindings are kept from run to run as long as the sizes stay the same."""
        engine = self._engines.get(graph)
        if engine is None:
            raise EngineError(
                "program", found=f"a call of graph {graph!r}", wanted=f"one of {', '.join(sorted(self._engines))}",
                cause="program and bundle do not belong together", remedy=nearest(graph, self._engines),
            )
        shapes = self._shapes(engine, graph, rows, request, fed)
        sizes = _sizes(engine, graph, shapes)
        key = (graph, index, len(rows), tuple(sorted(sizes.items())))
        lane = self._lanes.get(key)
        if lane is None:
            self._lanes = {k: v for k, v in self._lanes.items() if k[:2] != key[:2]}
            lane = self._lanes[key] = Lane(engine, engine.bind(sizes), rows, self._denoiser)
        lane.rows = rows
        self._condition(lane, request)
        return lane

    def _shapes(
        self, engine: Engine, graph: str, rows: Rows, request: LoopRequest, fed: set[str]
    ) -> dict[str, tuple[int, ...]]:
        for name in sorted(fed - set(engine.inputs)):
            raise EngineError(
                f"graph {graph!r}", found=f"no input {name!r}, which the program feeds",
                wanted=f"one of {', '.join(engine.inputs)}", cause="program and graph do not belong together",
                remedy=nearest(name, engine.inputs),
            )
        shapes: dict[str, tuple[int, ...]] = {name: (len(rows), *self._denoiser.latents_shape) for name in fed}
        shapes[self._denoiser.timestep_input] = (len(rows),)
        if self._denoiser.group_input:
            shapes[self._denoiser.group_input] = ()
        shapes.update({name: (len(rows), *pair[0].shape[1:]) for name, pair in request.conditioning.items()})
        for name, spec in engine.inputs.items():
            if name not in shapes:
                raise RequestError(
                    f"graph {graph!r}, input {name!r}", found="no value for it", wanted=f"{spec.dtype} {spec.shape}",
                    cause="the call leaves a conditioning input out", remedy=f"pass {name}=...",
                )
        return shapes

    def _condition(self, lane: Lane, request: LoopRequest) -> None:
        for name, (conditional, unconditional) in request.conditioning.items():
            port = lane.inputs.get(name)
            if port is None:
                continue
            for row, (sample, branch) in enumerate(zip(lane.rows.samples, lane.rows.branches, strict=True)):
                source = conditional if branch == CONDITIONAL or unconditional is None else unconditional
                port.array[row] = source[sample]
            port.push()


def _sizes(engine: Engine, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of the symbolic dimensions of an engine's inputs, checked against the shapes that will be fed."""
    sizes: dict[str, int] = {}
    for name, spec in engine.inputs.items():
        shape = shapes[name]
        # A rank-0 timestep or a [1] group is fed by `fill`; only symbolic rank-1 inputs tell a size.
        if len(shape) != len(spec.shape) or not _fits(shape, spec, sizes):
            if len(shape) <= 1 and all(isinstance(d, int) for d in spec.shape):
                continue
            legal = tuple(sizes.get(d, d) if isinstance(d, str) else d for d in spec.shape)
            raise RequestError(
                f"graph {graph!r}, input {name!r}", found=f"shape {shape}", wanted=f"shape {spec.shape}",
                cause="batch or resolution outside what the graph takes", remedy=f"the nearest legal shape is {legal}",
            )
    return sizes


def _fits(shape: tuple[int, ...], spec: TensorSpec, sizes: dict[str, int]) -> bool:
    return all(
        n == d if isinstance(d, int) else sizes.setdefault(d, n) == n for n, d in zip(shape, spec.shape, strict=True)
    )


class _Run:
    """State of one run."""

    def __init__(self, loop: Loop, program: StepProgram, request: LoopRequest) -> None:
        self._loop, self._program, self._request = loop, program, request
        shape = (request.batch, *loop._denoiser.latents_shape)
        self.registers = Registers(program.registers(), shape)
        self._rows = plan_rows(request.guidance, request.mode)
        self._lanes = loop.lanes(program, self._rows, request)
        seeds = tuple(request.seeds) or (0,) * request.batch
        self._seeds = [tuple(seeds[s] for s in rows.samples) for rows in self._rows]
        self._combine = Combine(request.guidance, request.rescale, shape[1:])
        self._combined: Float32s = np.empty(shape, np.float32)
        self._notified = False
        self.engine_seconds = 0.0
        self.engine_calls = 0
        self._start()

    def _start(self) -> None:
        for index, state in enumerate(self._program.state):
            register = self.registers[state.name]
            if index == 0 and self._request.latents is not None:
                np.copyto(register, self._request.latents)
            else:
                self._request.noise.draw(0, register)
            scaled = register.astype(np.float64) * state.initial_scale
            np.copyto(register, scaled, casting="same_kind")

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

    def _call(self, index: int, call: Call) -> None:
        group = self._group(call)
        lanes = self._lanes[call.graph]
        for number, lane in enumerate(lanes):
            self._feed(call, lane, lanes[0])
            lane.set_scalars(call.timestep, group)
            started = time.perf_counter()
            lane.binding.run()
            self.engine_seconds += time.perf_counter() - started
            self.engine_calls += 1
            if self._request.observer is not None:
                seen = Observation(index, call, group, self._seeds[number], lane.rows.samples, lane.rows.branches)
                self._request.observer(seen, lane.binding.outputs)
            lane.prediction.pull()
        self.registers.place(PREDICTION, self._guided(lanes))
        for operation in call.update:
            self.registers.apply(operation, self._request.noise)

    def _feed(self, call: Call, lane: Lane, first: Lane) -> None:
        batch = self._request.batch
        for name, terms in call.inputs.items():
            port = lane.inputs[name]
            if lane is first:
                self.registers.lin(terms, port.array[:batch])
                for row in range(batch, len(lane.rows)):
                    port.array[row] = port.array[lane.rows.samples[row]]
            else:
                for row, sample in enumerate(lane.rows.samples):
                    port.array[row] = first.inputs[name].array[sample]
            port.push()

    def _guided(self, lanes: list[Lane]) -> Float32s:
        batch = self._request.batch
        prediction: Float32s = lanes[0].prediction.array
        if not self._combine.guided:
            return prediction
        null = prediction[batch:] if len(lanes) == 1 else lanes[1].prediction.array
        self._combine(prediction[:batch], null, self._combined)
        return self._combined

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
        latents = self.registers[LATENTS]
        replaced = self._request.on_step(step, timestep, latents.copy())
        if replaced is None:
            return
        array = np.asarray(replaced)
        if array.shape != latents.shape or array.dtype != latents.dtype:
            raise RequestError(
                f"callback after step {step}: latents", found=f"{array.dtype} {array.shape}",
                wanted=f"float32 {latents.shape}", cause="the callback returned other latents than it was given",
                remedy="return an array of the same shape and type",
            )
        np.copyto(latents, array)
