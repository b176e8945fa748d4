"""Lanes: the rows that go through the engines together, and the memory that all graph variants share for them.

Tensors are shared by name.  The variants of a lane read one `sample`, write one `prediction`, and a cached feature that
one variant writes is the very buffer that another one reads; nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Binding, Buffer, Engine, dtype_of
from quantempo.contracts.manifest import Denoiser
from quantempo.contracts.program import INDICATOR, StepProgram
from quantempo.contracts.tensors import TensorSpec
from quantempo.contracts.variants import Variant, Vectors, runs_of
from quantempo.errors import EngineError, RequestError, nearest
from quantempo.runtime.guidance import CONDITIONAL, Rows

Array = NDArray[Any]
Conditioning = Mapping[str, tuple[Array, "Array | None"]]


class Port:
    """One side of a bound tensor as a host array: the buffer itself, or a copy that is moved over on demand.

    `buffer` is what is not host memory, else `None`.
    """

    def __init__(self, buffer: Buffer, host: bool) -> None:
        self.buffer = None if host else buffer
        self.array: Array = buffer.array if host else np.zeros(buffer.shape, dtype_of(buffer.spec))

    def push(self) -> None:
        """Make what was written to `array` visible to the engine."""
        if self.buffer is not None:
            self.buffer.upload(self.array)

    def pull(self) -> None:
        """Make what the engine wrote visible in `array`."""
        if self.buffer is not None:
            np.copyto(self.array, self.buffer.download())


@dataclass(frozen=True)
class Model:
    """What a loop knows about its graphs.

    Args:
        engines: by variant; only those that a program runs are looked up.
        denoiser: how the graphs are fed.
        variants: what each reads and writes.
        vectors: of the bundle.
    """

    engines: Mapping[str, Engine]
    denoiser: Denoiser
    variants: Mapping[str, Variant]
    vectors: Vectors

    def shared(self, variant: str) -> set[str]:
        """The outputs of a variant that live in the lane's memory; others (taps) are its own."""
        return {self.denoiser.prediction, INDICATOR, *self.variants[variant].writes}


class Lane:
    """Rows with their buffers, and a binding per variant; `prediction` is one port, whichever variant computes it.

    Args:
        model: the graphs.
        rows: what each row is.
    """

    prediction: Port

    def __init__(self, model: Model, rows: Rows) -> None:
        self.rows = rows
        self.ports: dict[str, Port] = {}
        self.bindings: dict[str, Binding] = {}
        self.sizes: dict[str, dict[str, int]] = {}
        self.parts: dict[tuple[str, int], Part] = {}
        self.model = model
        self._buffers: dict[str, Buffer] = {}
        self._timestep: Port | None = None
        self._group: Port | None = None

    def bind(self, variant: str, fed: Collection[str], conditioning: Conditioning) -> None:
        """Bind a variant to the lane's memory, or check that it still takes what it will be fed.

        Raises:
            RequestError, EngineError: a shape or a name does not fit.
        """
        engine = self.model.engines[variant]
        sizes = _sizes(engine, variant, self._shapes(engine, variant, fed, conditioning))
        if variant in self.bindings:
            return
        known = {*engine.inputs, *self.model.shared(variant) & set(engine.outputs)}
        binding = engine.bind(sizes, {name: b for name, b in self._buffers.items() if name in known})
        for name, buffer in (*binding.inputs.items(), *binding.outputs.items()):
            if name in known and name not in self._buffers:
                self._buffers[name] = buffer
                self.ports[name] = Port(buffer, engine.host)
        self.bindings[variant], self.sizes[variant] = binding, sizes
        denoiser = self.model.denoiser
        if denoiser.prediction in self.ports:
            self.prediction = self.ports[denoiser.prediction]
        self._timestep = self.ports.get(denoiser.timestep_input)
        self._group = self.ports.get(denoiser.group_input) if denoiser.group_input else None

    def set_scalars(self, timestep: float, group: int | None) -> None:
        """Feed timestep and scale group."""
        if self._timestep is not None:
            self._timestep.array.fill(timestep)
            self._timestep.push()
        if self._group is not None:
            self._group.array.fill(group)
            self._group.push()

    def set_vectors(self, rows: Mapping[str, int]) -> None:
        """Feed the vectors of a call."""
        for name, row in rows.items():
            port = self.ports[name]
            np.copyto(port.array, self.model.vectors[name][row].reshape(port.array.shape))
            port.push()

    def condition(self, conditioning: Conditioning) -> None:
        """Feed what stays the same for a whole run."""
        for name, (conditional, unconditional) in conditioning.items():
            port = self.ports.get(name)
            if port is None:
                continue
            for row, (sample, branch) in enumerate(zip(self.rows.samples, self.rows.branches, strict=True)):
                source = conditional if branch == CONDITIONAL or unconditional is None else unconditional
                port.array[row] = source[sample]
            port.push()

    def _shapes(
        self, engine: Engine, variant: str, fed: Collection[str], conditioning: Conditioning
    ) -> dict[str, tuple[int, ...]]:
        rows, denoiser = len(self.rows), self.model.denoiser
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(fed, (rows, *denoiser.latents_shape))
        shapes[denoiser.timestep_input] = (rows,)
        if denoiser.group_input:
            shapes[denoiser.group_input] = ()
        shapes.update({name: (rows, *pair[0].shape[1:]) for name, pair in conditioning.items()})
        shapes.update({name: self._buffers[name].shape for name in self.model.variants[variant].reads})
        for name, spec in engine.inputs.items():
            if name in self.model.vectors:
                shapes[name] = _vector_shape(variant, spec, self.model.vectors[name].shape[1])
            if name not in shapes:
                raise RequestError(
                    f"graph {variant!r}, input {name!r}", found="no value for it", wanted=f"{spec.dtype} {spec.shape}",
                    cause="the call leaves a conditioning input out", remedy=f"pass {name}=...",
                )
        latents = (rows, *denoiser.latents_shape)
        for name in sorted(fed):  # a register has this size, whatever else an input of that name is fed with
            if shapes[name] != latents:
                raise EngineError(
                    f"graph {variant!r}, input {name!r}", found=f"shape {shapes[name]}",
                    wanted=f"shape {latents}, since the program feeds registers to it",
                    cause="program and graph do not belong together", remedy="compile the bundle again",
                )
        return shapes

    def part(self, variant: str, count: int) -> Part:
        """A binding of a variant for some of the rows, made when it is first needed."""
        key = variant, count
        if key not in self.parts:
            self.parts[key] = Part(self, variant, count)
        return self.parts[key]


class Part:
    """A binding for `count` of a lane's rows, with memory of its own that rows are gathered to and scattered from."""

    def __init__(self, lane: Lane, variant: str, count: int) -> None:
        model = lane.model
        engine = model.engines[variant]
        batch = batch_symbol(engine, variant, model.denoiser)
        self.binding = engine.bind({**lane.sizes[variant], batch: count})
        features = model.variants[variant].reads
        self._given: list[tuple[Port, Port, bool]] = []
        self._whole: list[tuple[Port, Port]] = []
        self._made: list[tuple[Port, Port]] = []
        for name, buffer in self.binding.inputs.items():
            port = Port(buffer, engine.host)
            if engine.inputs[name].shape[:1] == (batch,):
                self._given.append((port, lane.ports[name], name in features))
            else:
                self._whole.append((port, lane.ports[name]))
        for name in model.shared(variant) & set(self.binding.outputs):
            self._made.append((Port(self.binding.outputs[name], engine.host), lane.ports[name]))

    def gather(self, rows: Sequence[int]) -> None:
        """Copy these rows' inputs and features in."""
        index = np.asarray(rows)
        for port, source, feature in self._given:
            if feature:
                source.pull()
            port.array[...] = source.array[index]
            port.push()
        for port, source in self._whole:
            np.copyto(port.array, source.array)
            port.push()

    def scatter(self, rows: Sequence[int]) -> None:
        """Copy what was computed to these rows of the lane."""
        for port, target in self._made:
            port.pull()
            target.pull()
            target.array[list(rows)] = port.array
            target.push()


def batch_symbol(engine: Engine, variant: str, denoiser: Denoiser) -> str:
    """The name of a graph's batch dimension.

    Raises:
        EngineError: the graph has a fixed batch, so its rows cannot be evaluated apart.
    """
    name = next((n for n in (denoiser.sample_input, denoiser.timestep_input) if n in engine.inputs), None)
    size = (engine.inputs[name] if name else engine.outputs[denoiser.prediction]).shape[0]
    if isinstance(size, str):
        return size
    raise EngineError(
        f"graph {variant!r}", found=f"a fixed batch of {size}",
        wanted="a free batch, since each row decides for itself whether it reuses features",
        cause="the graph was compiled for one batch", remedy="sample without caching, or one row per call",
    )


class Lanes:
    """The lanes of a model; memory is kept from run to run as long as the shapes stay the same."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._kept: dict[int, tuple[object, Lane]] = {}

    def plan(self, program: StepProgram, rows: Sequence[Rows], conditioning: Conditioning) -> list[Lane]:
        """The lanes of a program, bound to every variant that it may run, and conditioned."""
        lanes = [self._lane(index, each, conditioning) for index, each in enumerate(rows)]
        for variant, fed in _fed(program, self._model.engines).items():
            for lane in lanes:
                lane.bind(variant, fed, conditioning)
        for call in program.calls:
            if call.decide is not None:
                for variant in (call.graph, call.decide.refresh):
                    if any(len(each) > 1 for each in rows):
                        batch_symbol(self._model.engines[variant], variant, self._model.denoiser)
        for lane in lanes:
            lane.condition(conditioning)
        return lanes

    def _lane(self, index: int, rows: Rows, conditioning: Conditioning) -> Lane:
        key = len(rows), tuple(sorted((name, pair[0].shape[1:]) for name, pair in conditioning.items()))
        kept = self._kept.get(index)
        lane = kept[1] if kept is not None and kept[0] == key else Lane(self._model, rows)
        lane.rows = rows
        self._kept[index] = key, lane
        return lane


def _fed(program: StepProgram, engines: Mapping[str, Engine]) -> dict[str, set[str]]:
    """The register-fed inputs of each variant, in the order in which variants first run.

    Raises:
        EngineError: a call feeds what none of its variants takes.
    """
    fed: dict[str, set[str]] = {}
    for call in program.calls:
        takers = runs_of(call)
        for variant in takers:
            fed.setdefault(variant, set()).update(n for n in call.inputs if n in engines[variant].inputs)
        for name in call.inputs:
            if not any(name in fed[variant] for variant in takers):
                inputs = engines[call.graph].inputs
                raise EngineError(
                    f"graph {call.graph!r}", found=f"no input {name!r}, which the program feeds",
                    wanted=f"one of {', '.join(inputs)}", cause="program and graph do not belong together",
                    remedy=nearest(name, inputs),
                )
    return fed


def _vector_shape(variant: str, spec: TensorSpec, channels: int) -> tuple[int, ...]:
    shape = tuple(d for d in spec.shape if isinstance(d, int))
    if len(shape) != len(spec.shape) or math.prod(shape) != channels or spec.dtype != "float32":
        raise EngineError(
            f"graph {variant!r}, input {spec.name!r}", found=f"{spec.dtype} {spec.shape}",
            wanted=f"float32 of {channels} elements", cause="graph and vectors file do not belong together",
            remedy="compile the bundle again",
        )
    return shape


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
