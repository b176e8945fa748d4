"""What a run does between engine calls, where its registers live: feed the graph, combine the branches, operate.

Registers are host arrays, or, where every engine of a program brings arithmetic for its own buffers
(`quantempo.contracts.engine.BufferMath`), buffers of the engine: then latents never cross over between calls, and only
noise, the latents that a step callback sees, and the final ones do.  Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Buffer, BufferMath, math_of
from quantempo.contracts.program import (
    LATENTS,
    PREDICTION,
    Call,
    Clamp,
    Correct,
    Lin,
    Noise,
    Operation,
    State,
    StepProgram,
    Terms,
)
from quantempo.contracts.variants import Vectors, variants_of
from quantempo.runtime.guidance import Combine
from quantempo.runtime.lanes import Lane, Model, Port
from quantempo.runtime.registers import Registers, draw_initial
from quantempo.runtime.rng import NoiseSource

Float32s = NDArray[np.float32]


class Arithmetic(Protocol):
    """Registers and guidance of one run."""

    def start(self, state: Sequence[State], latents: Float32s | None) -> None:
        """Fill the registers that the loop evolves; `latents` are the first one's standard normals, else drawn."""

    def feed(self, call: Call, number: int) -> None:
        """Fill the register-fed inputs of a lane; lanes go in order, since later ones copy the first one's."""

    def wait(self) -> None:
        """Return when everything that was fed or computed may be read by an engine."""

    def combine(self) -> None:
        """Make the register `prediction` of what the lanes' engines computed."""

    def apply(self, operation: Operation) -> None:
        """Run one operation of a program."""

    def latents(self) -> Float32s:
        """A copy of the latents, the caller's own."""

    def replace(self, latents: Float32s) -> None:
        """Put other latents in their place."""


def plan_arithmetic(
    model: Model, program: StepProgram, lanes: list[Lane], combine: Combine, noise: NoiseSource
) -> Arithmetic:
    """The arithmetic of a run: on the engines' device where that can replay the program, else on the host."""
    shape = (combine.batch, *model.denoiser.latents_shape)
    math = device_math(model, program)
    if math is None:
        return HostArithmetic(Registers(program.registers(), shape, model.vectors), lanes, combine, noise)
    return DeviceArithmetic(math, program, shape, model.vectors, lanes, combine, noise)


def device_math(model: Model, program: StepProgram) -> BufferMath | None:
    """What computes on the engines' buffers, or `None` where a program needs the host.

    That is so where an engine brings no arithmetic, an input or the prediction is not float32, a linear form is longer
    than a kernel takes, or rows decide at run time whether they reuse features (rows are gathered on the host).
    """
    engines = [model.engines[name] for name in variants_of(program)]
    found = [math_of(engine) for engine in engines]
    math = found[0]
    if math is None or None in found or any(call.decide is not None for call in program.calls):
        return None
    if max((len(terms) for terms in _forms(program)), default=0) > math.most_terms:
        return None
    fed = {name for call in program.calls for name in call.inputs}
    specs = [s for e in engines for n, s in (*e.inputs.items(), *e.outputs.items())
             if n in fed or n == model.denoiser.prediction]  # fmt: skip
    return math if all(spec.dtype == "float32" for spec in specs) else None


def _forms(program: StepProgram) -> Iterable[Terms]:
    for call in program.calls:
        yield from call.inputs.values()
        yield from (operation.terms for operation in call.update if isinstance(operation, Lin))


class HostArithmetic:
    """Registers as host arrays; the prediction is the engine's own output where nothing is guided."""

    def __init__(self, registers: Registers, lanes: list[Lane], combine: Combine, noise: NoiseSource) -> None:
        self._registers, self._lanes, self._combine, self._noise = registers, lanes, combine, noise
        self._batch = combine.batch
        self._combined: Float32s = np.empty(registers.shape, np.float32)

    @property
    def registers(self) -> Registers:
        """All registers of the run."""
        return self._registers

    def start(self, state: Sequence[State], latents: Float32s | None) -> None:
        """See `Arithmetic.start`."""
        for index, each in enumerate(state):
            draw_initial(each, latents if index == 0 else None, self._noise, self._registers[each.name])

    def feed(self, call: Call, number: int) -> None:
        """See `Arithmetic.feed`."""
        lane, first = self._lanes[number], self._lanes[0]
        for name, terms in call.inputs.items():
            port = lane.ports[name]
            if lane is first:
                self._registers.lin(terms, port.array[: self._batch])
                for row in range(self._batch, len(lane.rows)):
                    port.array[row] = port.array[lane.rows.samples[row]]
            else:
                for row, sample in enumerate(lane.rows.samples):
                    port.array[row] = first.ports[name].array[sample]
            port.push()

    def wait(self) -> None:
        """Nothing is ever queued."""

    def combine(self) -> None:
        """See `Arithmetic.combine`."""
        lanes = self._lanes
        for lane in lanes:
            lane.prediction.pull()
        prediction: Float32s = lanes[0].prediction.array
        if self._combine.guided:
            null = prediction[self._batch :] if len(lanes) == 1 else lanes[1].prediction.array
            self._combine(prediction[: self._batch], null, self._combined)
            prediction = self._combined
        self._registers.place(PREDICTION, prediction)

    def apply(self, operation: Operation) -> None:
        """See `Arithmetic.apply`."""
        self._registers.apply(operation, self._noise)

    def latents(self) -> Float32s:
        """See `Arithmetic.latents`."""
        return self._registers[LATENTS].copy()

    def replace(self, latents: Float32s) -> None:
        """See `Arithmetic.replace`."""
        np.copyto(self._registers[LATENTS], latents)


class _Feed(NamedTuple):
    """How an input of a lane is filled: a linear form into `form`, then copies of rows."""

    form: Buffer | None
    copies: list[tuple[Buffer, Buffer]]


class DeviceArithmetic:
    """Registers as buffers of the engine.  Everything is allocated, and every view made, when the run is planned."""

    def __init__(
        self, math: BufferMath, program: StepProgram, shape: tuple[int, ...], vectors: Vectors, lanes: list[Lane],
        combine: Combine, noise: NoiseSource,
    ) -> None:
        math.prepare()
        self._math, self._lanes, self._noise = math, lanes, noise
        self._guided, self._rescale, batch = bool(combine.guided), combine.rescale, shape[0]
        self._registers = {name: math.allocate(shape) for name in program.registers()}
        self._host: Float32s = np.empty(shape, np.float32)
        self._rows: dict[tuple[str, int], Buffer] = {}
        self._tables: dict[str, Buffer] = {}
        for call in program.calls:
            for operation in call.update:
                if isinstance(operation, Correct):
                    self._take_rows(operation, vectors)
        fed = {name for call in program.calls for name in call.inputs}
        self._feeds = [{name: self._plan_feed(name, lane, batch) for name in fed} for lane in lanes]
        prediction = _device(lanes[0].prediction)
        self._prediction = prediction
        if self._guided:
            one = len(lanes) == 1
            null = math.rows(prediction, batch, len(combine.guided)) if one else _device(lanes[1].prediction)
            self._branches = math.rows(prediction, 0, batch), null
            self._prediction = math.allocate(shape)
            self._null_rows, self._scales = math.allocate((batch,), "int32"), math.allocate((batch,), "float64")
            null_rows, scales = np.full(batch, -1, np.int32), np.ones(batch, np.float64)
            for row, (sample, scale) in enumerate(combine.guided):
                null_rows[sample], scales[sample] = row, scale
            self._null_rows.upload(null_rows)
            self._scales.upload(scales)
        self._registers[PREDICTION] = self._prediction

    def _take_rows(self, operation: Correct, vectors: Vectors) -> None:
        for name in (operation.gain, operation.bias):
            if name not in self._tables:
                self._tables[name] = self._math.allocate(vectors[name].shape)
                self._tables[name].upload(vectors[name])
            if (name, operation.row) not in self._rows:
                self._rows[name, operation.row] = self._math.rows(self._tables[name], operation.row, 1)

    def _plan_feed(self, name: str, lane: Lane, batch: int) -> _Feed:
        source, target = _device(self._lanes[0].ports[name]), _device(lane.ports[name])
        form = self._math.rows(target, 0, batch) if lane is self._lanes[0] else None
        start = 0 if form is None else batch
        return _Feed(form, [
            (self._math.rows(source, lane.rows.samples[row], 1), self._math.rows(target, row, 1))
            for row in range(start, len(lane.rows))
        ])  # fmt: skip

    def start(self, state: Sequence[State], latents: Float32s | None) -> None:
        """See `Arithmetic.start`."""
        for index, each in enumerate(state):
            draw_initial(each, latents if index == 0 else None, self._noise, self._host)
            self._registers[each.name].upload(self._host)

    def feed(self, call: Call, number: int) -> None:
        """See `Arithmetic.feed`."""
        for name, terms in call.inputs.items():
            feed = self._feeds[number][name]
            if feed.form is not None:
                self._lin(terms, feed.form)
            for source, out in feed.copies:
                self._math.copy(source, out)

    def wait(self) -> None:
        """See `Arithmetic.wait`."""
        self._math.wait()

    def combine(self) -> None:
        """See `Arithmetic.combine`; without guidance the register is the engine's output already."""
        if self._guided:
            places = *self._branches, self._null_rows, self._scales
            self._math.guide(*places, self._rescale, self._prediction)

    def apply(self, operation: Operation) -> None:
        """See `Arithmetic.apply`."""
        out = self._registers[operation.to]
        if isinstance(operation, Lin):
            self._lin(operation.terms, out)
        elif isinstance(operation, Clamp):
            self._math.clamp(self._registers[operation.source], operation.low, operation.high, out)
        elif isinstance(operation, Noise):
            self._noise.draw(operation.draw, self._host)
            out.upload(self._host)
        else:
            gain, bias = (self._rows[name, operation.row] for name in (operation.gain, operation.bias))
            self._math.correct(self._registers[operation.source], gain, bias, out)

    def _lin(self, terms: Terms, out: Buffer) -> None:
        if len(terms) == 1 and terms[0][1] == 1.0:
            self._math.copy(self._registers[terms[0][0]], out)
        else:
            self._math.lin([(self._registers[name], coefficient) for name, coefficient in terms], out)

    def latents(self) -> Float32s:
        """See `Arithmetic.latents`."""
        copied: Float32s = self._registers[LATENTS].download()
        return copied

    def replace(self, latents: Float32s) -> None:
        """See `Arithmetic.replace`."""
        self._registers[LATENTS].upload(latents)


def _device(port: Port) -> Buffer:
    assert port.buffer is not None, "the engine says that its buffers are not host memory"
    return port.buffer
